//! The agents of a job, from the first attempt to reach their hosts until they have nothing left to answer.
#![forbid(unsafe_code)]

use super::super::link::Link;
use super::super::sys::{Signals, signal_name};
use super::candidate::{Agent, Candidate, PAUSE};
use super::ssh::Ssh;
use super::words::Piece;
use crate::error::{Error, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::time::{Duration, Instant};

/// After so long, and then again and again at longer intervals, it is said who is waited for.
const PATIENCE: Duration = Duration::from_secs(3);
/// Hosts that are reached at one time: sshd and the launcher's own processors have their limits.
pub const AT_ONCE: usize = 32;

/// All agents of a job. Dropping it ends those that are still in it.
pub struct Crew<'a> {
    /// In the order of their hosts.
    pub agents: Vec<Agent>,
    signals: &'a Signals,
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
