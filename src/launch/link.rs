//! One guard, as the launcher sees it: the one of this host, at the end of two pipes, or one on another host, behind
//! ssh and an agent.
#![forbid(unsafe_code)]

use super::guard::Order;
use super::output::{Sink, Splitter};
use super::remote::words::{Piece, Reader};
use super::remote::{PING_EVERY, SILENCE_LAUNCHER};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::time::Instant;

/// The launcher's end.
pub struct Link {
    /// The host; none for this one.
    pub host: Option<String>,
    /// The guard, or the ssh client that leads to it.
    pub pid: i32,
    /// What waits to be sent.
    pub orders: Sink,
    /// Reports, and behind ssh also what the ranks write.
    pub reports: File,
    /// What ssh and the agent have to say.
    pub errors: Option<File>,
    /// The ranks that are there.
    pub ranks: Range<usize>,
    /// Where its ranks find the rendezvous.
    pub rendezvous: String,
    /// The interfaces that the probes have chosen for its ranks, if they had to choose.
    pub interfaces: Option<String>,
    /// Whether the guard has ended, or the connection.
    pub gone: bool,
    /// What ssh or the agent said last.
    pub last_words: String,
    reader: Reader,
    splitter: Splitter,
    heard: Instant,
    ping_due: Instant,
}

impl Link {
    /// The guard of this host.
    pub fn local(pid: i32, orders: OwnedFd, reports: OwnedFd, ranks: Range<usize>) -> Link {
        Link::new(None, pid, orders, File::from(reports), None, ranks, Reader::default())
    }

    /// A guard elsewhere, with what has been read of its agent so far.
    pub fn new(
        host: Option<String>,
        pid: i32,
        orders: OwnedFd,
        reports: File,
        errors: Option<File>,
        ranks: Range<usize>,
        reader: Reader,
    ) -> Link {
        let now = Instant::now();
        Link {
            host,
            pid,
            orders: Sink::new(orders),
            reports,
            errors,
            ranks,
            rendezvous: String::new(),
            interfaces: None,
            gone: false,
            last_words: String::new(),
            reader,
            splitter: Splitter::default(),
            heard: now,
            ping_due: now + PING_EVERY,
        }
    }

    /// Whether it is on another host.
    pub fn is_remote(&self) -> bool {
        self.host.is_some()
    }

    /// Queues an order.
    pub fn order(&mut self, order: &Order) {
        self.orders.push(&[order.line().as_bytes()]);
        // A guard on this host is told at once; its pipe is never full.
        if !self.is_remote() {
            while !self.orders.is_empty() {
                self.orders.write_some();
            }
        }
    }

    /// Reads once; `None` at the end.
    pub fn read(&mut self) -> Option<Vec<Piece>> {
        self.heard = Instant::now();
        self.reader.read(&self.reports)
    }

    /// Reads whole lines of what ssh and the agent say.
    pub fn read_errors(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        let Some(errors) = &mut self.errors else { return lines };
        let mut chunk = [0; 4096];
        let mut emit = |line: &[u8]| {
            let line = String::from_utf8_lossy(line).trim().to_owned();
            if !line.is_empty() {
                lines.push(line);
            }
        };
        match errors.read(&mut chunk) {
            Ok(n) if n > 0 => self.splitter.feed(&chunk[..n], emit),
            Err(e)
                if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted) => {}
            _ => {
                self.splitter.finish(&mut emit);
                self.errors = None;
            }
        }
        if let Some(last) = lines.last() {
            self.last_words.clone_from(last);
        }
        lines
    }

    /// When something is due that nothing comes in for.
    pub fn deadline(&self) -> Option<Instant> {
        (self.is_remote() && !self.gone).then_some(self.ping_due)
    }

    /// Keeps the agent alive. Whether it has kept silent for too long; who does not listen cannot say so.
    pub fn keep_alive(&mut self, now: Instant, listening: bool) -> bool {
        if !self.is_remote() || self.gone || now < self.ping_due {
            return false;
        }
        self.ping_due = now + PING_EVERY;
        self.orders.push(&[b"ping\n"]);
        if !listening {
            self.heard = now;
        }
        now.duration_since(self.heard) >= SILENCE_LAUNCHER
    }

    /// Ends the connection, and so the agent; reaps ssh or the guard.
    pub fn close(&mut self) {
        if let Some(pid) = Pid::from_raw(self.pid) {
            if self.is_remote() {
                // It may have ended already, and is not reaped before.
                let _ = kill_process(pid, Signal::KILL);
            }
            let _ = waitpid(Some(pid), WaitOptions::empty());
        }
        self.gone = true;
    }
}
