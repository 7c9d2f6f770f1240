//! The agents of a job, from the first attempt to reach their hosts until they have nothing left to answer.
#![forbid(unsafe_code)]

use super::super::link::Link;
use super::super::sys::{self, Signals, signal_name};
use super::ssh::{MISSING, Ssh};
use super::words::{GREETING, NOISE_BYTES_MAX, PROTOCOL, Piece, Reader, unescape_text};
use crate::error::{Error, Result};
use crate::rendezvous::build;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// Attempts to reach a host that refuses connections: it may just be starting.
const ATTEMPTS: u32 = 5;
/// Attempts to reach one that does not answer at all, each of which takes ssh's own limit.
const ATTEMPTS_SILENT: u32 = 2;
/// Before the second attempt; twice as long before each further one.
const PAUSE: Duration = Duration::from_millis(250);
/// After so long, and then again and again at longer intervals, it is said who is waited for.
const PATIENCE: Duration = Duration::from_secs(3);
/// Lines of what ssh says that are kept for an error.
const WORDS_MAX: usize = 8;
/// Hosts that are reached at one time: sshd and the launcher's own processors have their limits.
const AT_ONCE: usize = 32;

/// An agent that answers.
pub struct Agent {
    /// The host, as the user named it.
    pub host: String,
    /// What tells it from other hosts.
    pub host_id: String,
    /// The name that it gives itself.
    pub hostname: String,
    /// The way to it.
    pub link: Link,
    answers: VecDeque<String>,
}

/// All agents of a job. Dropping it ends those that are still in it.
pub struct Crew<'a> {
    /// In the order of their hosts.
    pub agents: Vec<Agent>,
    signals: &'a Signals,
}

/// A host that is being reached.
struct Candidate {
    host: String,
    since: Instant,
    attempts: u32,
    retry_at: Option<Instant>,
    link: Option<Link>,
    said: Vec<String>,
    noise: usize,
    agent: Option<Agent>,
}

impl<'a> Crew<'a> {
    /// Starts an agent on every host. `say` tells the user what takes long.
    pub fn connect(
        ssh: &Ssh,
        hosts: &[String],
        signals: &'a Signals,
        limit: Duration,
        mut say: impl FnMut(&str),
    ) -> Result<Crew<'a>> {
        let start = Instant::now();
        let mut candidates: Vec<Candidate> = hosts.iter().map(|host| Candidate::new(host, start)).collect();
        let (mut told, mut patience) = (start, PATIENCE);
        loop {
            if candidates.iter().all(|candidate| candidate.agent.is_some()) {
                let agents = candidates.iter_mut().filter_map(|candidate| candidate.agent.take()).collect();
                return Ok(Crew { agents, signals });
            }
            let result = step(&mut candidates, ssh, signals);
            let now = Instant::now();
            let result = match result {
                Ok(()) if now >= start + limit => Err(too_late(&candidates, limit)),
                result => result,
            };
            if let Err(error) = result {
                candidates.iter_mut().for_each(Candidate::close);
                return Err(error);
            }
            if now >= told + patience {
                say(&progress(&candidates, now));
                (told, patience) = (now, patience * 2);
            }
        }
    }

    /// Sends each agent its orders, one text for each answer that is awaited, and returns the answers.
    pub fn exchange(
        &mut self,
        orders: impl Fn(usize) -> Vec<String>,
        limit: Duration,
    ) -> Result<Vec<Vec<String>>> {
        let mut awaited = Vec::new();
        for (index, agent) in self.agents.iter_mut().enumerate() {
            let orders = orders(index);
            orders.iter().for_each(|order| agent.link.orders.push(&[order.as_bytes()]));
            awaited.push(orders.len());
        }
        let deadline = Instant::now() + limit;
        while let Some(late) = self.agents.iter().zip(&awaited).position(|(a, &n)| a.answers.len() < n) {
            if Instant::now() >= deadline {
                return Err(Error::usage(format!(
                    "host '{}' does not answer any more ({} s); is it overloaded, or has the network failed?",
                    self.agents[late].host,
                    limit.as_secs()
                )));
            }
            self.turn()?;
        }
        Ok(self.agents.iter_mut().zip(awaited).map(|(a, n)| a.answers.drain(..n).collect()).collect())
    }

    /// Waits for something from or to the agents, and takes it.
    fn turn(&mut self) -> Result<()> {
        let links: Vec<&Link> = self.agents.iter().map(|agent| &agent.link).collect();
        let ready = wait(&links, self.signals, Duration::from_millis(500))?;
        for (index, readiness) in ready.into_iter().enumerate() {
            let agent = &mut self.agents[index];
            agent.link.keep_alive(Instant::now(), true);
            if readiness.orders {
                agent.link.orders.write_some();
            }
            if readiness.errors {
                agent.link.read_errors();
            }
            if !readiness.reports {
                continue;
            }
            let Some(pieces) = agent.link.read() else {
                let words = agent.link.last_words.clone();
                return Err(Error::usage(format!(
                    "the connection to host '{}' has ended{}",
                    agent.host,
                    if words.is_empty() { String::new() } else { format!(": {words}") }
                )));
            };
            let lines = pieces.into_iter().filter_map(|piece| match piece {
                Piece::Line(line) if line != "pong" => Some(line),
                _ => None,
            });
            agent.answers.extend(lines);
        }
        Ok(())
    }
}

impl Drop for Crew<'_> {
    fn drop(&mut self) {
        self.agents.iter_mut().for_each(|agent| agent.link.close());
    }
}

/// What can be done on a link.
#[derive(Clone, Copy, Default)]
struct Readiness {
    orders: bool,
    reports: bool,
    errors: bool,
}

/// Waits until something can be done. A signal that ends the launcher is an error.
fn wait(links: &[&Link], signals: &Signals, at_most: Duration) -> Result<Vec<Readiness>> {
    let mut fds = vec![PollFd::new(signals, PollFlags::IN)];
    let mut meaning = vec![(usize::MAX, 0)];
    for (index, link) in links.iter().enumerate() {
        if !link.gone {
            fds.push(PollFd::new(&link.reports, PollFlags::IN));
            meaning.push((index, 0));
        }
        if let Some(errors) = &link.errors {
            fds.push(PollFd::new(errors, PollFlags::IN));
            meaning.push((index, 1));
        }
        if !link.orders.is_empty() {
            fds.push(PollFd::from_borrowed_fd(link.orders.descriptor(), PollFlags::OUT));
            meaning.push((index, 2));
        }
    }
    let timeout = Timespec { tv_sec: at_most.as_secs() as i64, tv_nsec: at_most.subsec_nanos().into() };
    let mut ready = vec![Readiness::default(); links.len()];
    if poll(&mut fds, Some(&timeout)).is_err() {
        return Ok(ready);
    }
    for (fd, (index, kind)) in fds.iter().zip(meaning).filter(|(fd, _)| !fd.revents().is_empty()) {
        match (ready.get_mut(index), kind) {
            (Some(ready), 0) => ready.reports = true,
            (Some(ready), 1) => ready.errors = true,
            (Some(ready), _) => ready.orders = true,
            (None, _) => {
                let _ = fd;
                while let Some(signal) = signals.next() {
                    if !matches!(signal, libc::SIGCHLD | libc::SIGTTOU | libc::SIGUSR1 | libc::SIGUSR2) {
                        return Err(Error::usage(format!(
                            "ended by {} before the start",
                            signal_name(signal)
                        )));
                    }
                }
            }
        }
    }
    Ok(ready)
}

/// One round over all hosts that are being reached.
fn step(candidates: &mut [Candidate], ssh: &Ssh, signals: &Signals) -> Result<()> {
    let now = Instant::now();
    let mut busy = candidates.iter().filter(|c| c.link.is_some()).count();
    for candidate in candidates.iter_mut() {
        let due = candidate.retry_at.is_some_and(|at| at <= now);
        if due && busy < AT_ONCE {
            candidate.start(ssh)?;
            busy += 1;
        }
    }
    let waiting: Vec<usize> = (0..candidates.len()).filter(|&i| candidates[i].link.is_some()).collect();
    let links: Vec<&Link> = waiting.iter().filter_map(|&i| candidates[i].link.as_ref()).collect();
    let next = candidates.iter().filter_map(|c| c.retry_at).map(|at| at.saturating_duration_since(now)).min();
    let at_most = next.filter(|_| busy < AT_ONCE).unwrap_or(PAUSE).clamp(Duration::from_millis(1), PAUSE);
    let ready = wait(&links, signals, at_most)?;
    for (index, readiness) in waiting.into_iter().zip(ready) {
        let candidate = &mut candidates[index];
        if readiness.errors {
            candidate.read_errors();
        }
        if readiness.reports {
            candidate.read(ssh)?;
        }
    }
    Ok(())
}

impl Candidate {
    fn new(host: &str, now: Instant) -> Candidate {
        Candidate {
            host: host.to_owned(),
            since: now,
            attempts: 0,
            retry_at: Some(now),
            link: None,
            said: Vec::new(),
            noise: 0,
            agent: None,
        }
    }

    fn start(&mut self, ssh: &Ssh) -> Result<()> {
        self.attempts += 1;
        self.retry_at = None;
        self.said.clear();
        self.noise = 0;
        let mut command = ssh.agent(&self.host);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        sys::prepare_client(&mut command);
        let mut child = command.spawn().map_err(|e| {
            let program = command.get_program().to_string_lossy().into_owned();
            Error::usage(format!(
                "'{program}', which is to reach host '{}', cannot be started: {e}; install it (Debian: openssh-client), \
                 or name another in --ssh-command",
                self.host
            ))
        })?;
        let pipe = |end: Option<OwnedFd>| end.expect("all three were piped");
        let orders = pipe(child.stdin.take().map(OwnedFd::from));
        let reports = File::from(pipe(child.stdout.take().map(OwnedFd::from)));
        let errors = File::from(pipe(child.stderr.take().map(OwnedFd::from)));
        for end in [&reports, &errors] {
            rustix::io::ioctl_fionbio(end, true).map_err(|e| super::super::system(e.into()))?;
        }
        let (host, pid) = (Some(self.host.clone()), child.id() as i32);
        self.link = Some(Link::new(host, pid, orders, reports, Some(errors), 0..0, Reader::default()));
        Ok(())
    }

    fn read_errors(&mut self) {
        let Some(link) = &mut self.link else { return };
        self.said.extend(link.read_errors());
        let surplus = self.said.len().saturating_sub(WORDS_MAX);
        self.said.drain(..surplus);
    }

    fn read(&mut self, ssh: &Ssh) -> Result<()> {
        let Some(link) = &mut self.link else { return Ok(()) };
        let Some(pieces) = link.read() else {
            while self.link.as_ref().is_some_and(|link| link.errors.is_some()) {
                let before = self.said.len();
                self.read_errors();
                // Somebody else may hold the pipe.
                if self.said.len() == before {
                    break;
                }
            }
            self.close();
            return self.failed(ssh);
        };
        for piece in pieces {
            let Piece::Line(line) = piece else { continue };
            if let Some(words) = line.strip_prefix(GREETING) {
                return self.greeted(words.trim());
            }
            self.noise += line.len();
            // What a shell says instead of running the agent is worth as much as what ssh says.
            self.said.push(line);
        }
        if self.noise > NOISE_BYTES_MAX {
            return Err(Error::usage(format!(
                "host '{}': its shell prints without end where the agent should speak; see what ~/.bashrc does there",
                self.host
            )));
        }
        Ok(())
    }

    fn greeted(&mut self, words: &str) -> Result<()> {
        let words: Vec<Option<String>> = words.split(' ').map(unescape_text).collect();
        let [Some(protocol), Some(version), Some(host_id), Some(hostname)] = &words[..] else {
            let version = words.get(1).and_then(Option::as_deref);
            return Err(self.other_version(version.unwrap_or("another version")));
        };
        if *protocol != PROTOCOL.to_string() || version != build() {
            return Err(self.other_version(version));
        }
        let link = self.link.take().expect("it has just spoken");
        self.agent = Some(Agent {
            host: self.host.clone(),
            host_id: host_id.clone(),
            hostname: hostname.clone(),
            link,
            answers: VecDeque::new(),
        });
        Ok(())
    }

    fn other_version(&self, version: &str) -> Error {
        Error::usage(format!(
            "versions differ: host '{}' has {version}, and this host {}; install the same version of Carole on both",
            self.host,
            build()
        ))
    }

    fn close(&mut self) {
        for link in self.link.iter_mut().chain(self.agent.iter_mut().map(|agent| &mut agent.link)) {
            link.close();
        }
        self.link = None;
    }

    /// ssh has ended without an agent: tries again where that may help.
    fn failed(&mut self, ssh: &Ssh) -> Result<()> {
        let said = self.said.join("; ");
        let (attempts, advice) = diagnose(&self.host, &said);
        if self.attempts < attempts {
            self.retry_at = Some(Instant::now() + PAUSE * (1 << (self.attempts - 1)));
            return Ok(());
        }
        let times =
            if self.attempts > 1 { format!(" after {} attempts", self.attempts) } else { String::new() };
        let said = if said.is_empty() { "without a word".to_owned() } else { said };
        Err(Error::usage(format!(
            "host '{}' cannot be used{times} ({said}): {advice}; to see for yourself: {}",
            self.host,
            ssh.shown(&self.host)
        )))
    }
}

/// From what ssh said: how many attempts are worth it, and what to do.
fn diagnose(host: &str, said: &str) -> (u32, String) {
    let says = |parts: &[&str]| parts.iter().any(|part| said.contains(part));
    if says(&[MISSING]) || says(&["not found", "No such file"]) {
        let advice = "there is no carolerun at the same place as here, nor in PATH: install Carole there, or name its \
                      place with --agent-program";
        (1, advice.to_owned())
    } else if says(&["Could not resolve", "Name or service not known", "Temporary failure in name"]) {
        (1, "there is no host of this name; see how it is spelt".to_owned())
    } else if says(&["Host key verification failed", "IDENTIFICATION HAS CHANGED"]) {
        (1, format!("its key is not the one that is known; if that is meant, run ssh-keygen -R {host}"))
    } else if says(&["Permission denied", "Too many authentication failures", "bad permissions"]) {
        let advice = format!(
            "it lets nobody in with this key; run ssh-copy-id {host}, or name the right key with -i \
             (--ssh-identity-file)"
        );
        (1, advice)
    } else if says(&["unexpected argument '--agent'"]) {
        (1, "an older version of Carole is there; install the same version on all hosts".to_owned())
    } else if says(&["timed out", "No route to host", "Network is unreachable"]) {
        (ATTEMPTS_SILENT, "it does not answer; is it up, and does a firewall let ssh through?".to_owned())
    } else {
        (ATTEMPTS, "does sshd run there, and at this port (-p)?".to_owned())
    }
}

fn too_late(candidates: &[Candidate], limit: Duration) -> Error {
    let late: Vec<String> = candidates
        .iter()
        .filter(|c| c.agent.is_none())
        .map(|c| format!("'{}'{}", c.host, c.said.last().map_or(String::new(), |said| format!(" ({said})"))))
        .collect();
    Error::usage(format!(
        "not reached within {} s: host {}; --start-timeout allows more seconds",
        limit.as_secs(),
        late.join(", ")
    ))
}

fn progress(candidates: &[Candidate], now: Instant) -> String {
    const NAMED: usize = 4;
    let late: Vec<&Candidate> = candidates.iter().filter(|c| c.agent.is_none()).collect();
    let mut text =
        format!("{} of {} hosts connected; waiting for", candidates.len() - late.len(), candidates.len());
    for (i, candidate) in late.iter().take(NAMED).enumerate() {
        let seconds = now.duration_since(candidate.since).as_secs();
        let said = candidate.said.last().map_or(String::new(), |said| format!(" ({said})"));
        let comma = if i > 0 { "," } else { "" };
        text.push_str(&format!("{comma} host {}: connecting since {seconds} s{said}", candidate.host));
    }
    if late.len() > NAMED {
        text.push_str(&format!(" and {} more", late.len() - NAMED));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ssh_says_is_turned_into_advice() {
        for (said, attempts, advice) in [
            ("ssh: Could not resolve hostname x: Name or service not known", 1, "spelt"),
            ("me@x: Permission denied (publickey).", 1, "ssh-copy-id x"),
            ("@@@; Host key verification failed.", 1, "ssh-keygen -R x"),
            ("ssh: connect to host x port 22: Connection refused", ATTEMPTS, "sshd"),
            ("ssh: connect to host x port 22: Connection timed out", ATTEMPTS_SILENT, "firewall"),
            (MISSING, 1, "--agent-program"),
            ("error: unexpected argument '--agent' found", 1, "older version"),
        ] {
            let (found, words) = diagnose("x", said);
            assert!(found == attempts && words.contains(advice), "{said}: {found}, {words}");
        }
    }

    #[test]
    fn progress_names_whom_it_waits_for_and_since_when() {
        let start = Instant::now();
        let hosts: Vec<Candidate> = (0..6).map(|i| Candidate::new(&format!("h{i}"), start)).collect();
        let text = progress(&hosts, start + Duration::from_secs(4));
        assert!(
            text.starts_with("0 of 6 hosts connected; waiting for host h0: connecting since 4 s, host h1"),
            "{text}"
        );
        assert!(text.ends_with("and 2 more"), "{text}");
    }
}
