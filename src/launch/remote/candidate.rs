//! One host that is being reached, from the first attempt until an agent greets or nothing more can be hoped for.
#![forbid(unsafe_code)]

use super::super::link::Link;
use super::super::sys;
use super::ssh::{MISSING, Ssh};
use super::words::{GREETING, NOISE_BYTES_MAX, PROTOCOL, Piece, Reader, unescape_text};
use crate::error::{Error, Result};
use crate::rendezvous::build;
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
pub const PAUSE: Duration = Duration::from_millis(250);
/// Lines of what ssh says that are kept for an error.
const WORDS_MAX: usize = 8;

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
    /// What it has answered and nobody has taken yet.
    pub answers: VecDeque<String>,
}

/// A host that is being reached.
pub struct Candidate {
    /// The host, as the user named it.
    pub host: String,
    /// When it was first tried.
    pub since: Instant,
    attempts: u32,
    /// When it is tried next, if it is not being tried.
    pub retry_at: Option<Instant>,
    /// The way to it, while it is being tried.
    pub link: Option<Link>,
    /// What ssh said last.
    pub said: Vec<String>,
    noise: usize,
    /// The agent, once it has greeted.
    pub agent: Option<Agent>,
}

impl Candidate {
    /// A host that is to be tried at once.
    pub fn new(host: &str, now: Instant) -> Candidate {
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

    /// Starts ssh.
    pub fn start(&mut self, ssh: &Ssh) -> Result<()> {
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

    /// Takes what ssh says.
    pub fn read_errors(&mut self) {
        let Some(link) = &mut self.link else { return };
        self.said.extend(link.read_errors());
        let surplus = self.said.len().saturating_sub(WORDS_MAX);
        self.said.drain(..surplus);
    }

    /// Takes what comes from the other side. An error when nothing more can be hoped for.
    pub fn read(&mut self, ssh: &Ssh) -> Result<()> {
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

    /// Gives it up.
    pub fn close(&mut self) {
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
}
