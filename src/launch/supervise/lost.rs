//! Guards and hosts that have gone: as they should at the end of a job, or before.
#![forbid(unsafe_code)]

use super::super::ending::{Ending, LOST};
use super::super::processes::{descendants, kill_descendants};
use super::{DRAIN, GRACE, Stage, Supervisor, TERM_GRACE};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, WaitOptions, waitpid};
use std::collections::HashSet;
use std::time::Instant;

impl Supervisor<'_> {
    /// A guard has ended, or the connection to it: as it should, or not.
    pub(super) fn on_link_gone(&mut self, index: usize) {
        if self.setup.links[index].is_remote() {
            self.on_host_gone(index);
        } else {
            self.on_guard_gone(index);
        }
        if self.all_gone() {
            self.deadline = None;
            self.drained_by = Some(Instant::now() + DRAIN);
        }
    }

    /// The guard of this host has ended. If it was killed, its orphans are ours.
    fn on_guard_gone(&mut self, index: usize) {
        self.settle_now();
        if self.stage != Stage::Finishing {
            self.say("the guard process was killed; ending the job");
            self.code = self.code.or(Some(128 + libc::SIGKILL));
            self.setup.links[index].gone = true;
            self.finish();
            let me = rustix::process::getpid().as_raw_nonzero().get();
            let others = self.setup.links.iter().filter(|link| link.is_remote()).map(|link| link.pid);
            let spared: HashSet<i32> = self.strangers.iter().copied().chain(others).collect();
            let deadline = Instant::now() + TERM_GRACE;
            while kill_descendants(me, &spared) > 0 && Instant::now() < deadline {
                let mut fds = [PollFd::new(self.setup.signals, PollFlags::IN)];
                let _ = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 10_000_000 }));
                while self.setup.signals.next().is_some() {}
                self.reap_adopted();
            }
        }
        self.setup.links[index].close();
        self.reap_adopted();
    }

    /// The connection to another host has ended. If it should not have, its ranks are lost.
    fn on_host_gone(&mut self, index: usize) {
        for line in self.setup.links[index].read_errors() {
            let host = self.setup.links[index].host.clone().unwrap_or_default();
            self.say(&format!("host '{host}': {line}"));
        }
        let link = &mut self.setup.links[index];
        link.close();
        let (ranks, host) = (link.ranks.clone(), link.host.clone().unwrap_or_default());
        let words = link.last_words.clone();
        for rank in ranks.clone() {
            for (stream, sink) in self.setup.streams[rank].iter_mut().zip(&mut self.sinks) {
                stream.close(sink);
            }
        }
        let lost: Vec<usize> = ranks.filter(|&rank| self.endings[rank].is_none()).collect();
        if self.stage == Stage::Finishing || lost.is_empty() {
            return;
        }
        let why = if words.is_empty() { String::new() } else { format!(" ({words})") };
        let count = lost.len();
        self.say(&format!("host '{host}' is lost, and with it {count} ranks: its connection ended{why}"));
        for &rank in &lost {
            self.endings[rank] = Some(Ending::Lost);
            self.verdict.ended(rank, true, None);
        }
        self.code = self.code.or(Some(LOST));
        if self.endings.iter().all(Option::is_some) {
            self.finish();
        } else if self.stage == Stage::Running {
            self.enter(Stage::Ending, Some(GRACE));
        }
    }

    /// Hosts that do not say that they have ended what is left there are not waited for any longer.
    pub(super) fn give_up_remote(&mut self) {
        self.deadline = None;
        for index in 0..self.setup.links.len() {
            let link = &self.setup.links[index];
            if link.is_remote() && !link.gone {
                let host = link.host.clone().unwrap_or_default();
                self.say(&format!(
                    "host '{host}' does not say whether its ranks have ended; they do when its agent hears nothing \
                     for a minute"
                ));
                self.on_link_gone(index);
            }
        }
    }

    /// Children of the process that hosts us (Python, say) are left for it to reap.
    fn reap_adopted(&self) {
        let me = rustix::process::getpid().as_raw_nonzero().get();
        for process in descendants(me) {
            if process.zombie && process.parent == me && !self.strangers.contains(&process.pid) {
                let _ = waitpid(Pid::from_raw(process.pid), WaitOptions::NOHANG);
            }
        }
    }
}
