//! How an elastic job ends: signals, deadlines, guards that have gone.
#![forbid(unsafe_code)]

use super::super::super::guard::Order;
use super::super::super::output::{Sink, Stream};
use super::super::super::processes::{descendants, kill_descendants};
use super::super::super::sys::signal_name;
use super::super::plan::Worker;
use super::{Crew, Stage};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, WaitOptions, waitpid};
use std::collections::HashSet;
use std::time::{Duration, Instant};

/// After SIGTERM, this long until SIGKILL.
const TERM_GRACE: Duration = Duration::from_secs(3);
/// How long output is awaited when all processes have ended: somebody outside the job may hold a pipe.
const DRAIN: Duration = Duration::from_secs(1);
/// How long other hosts may take to end what is left there and to say so.
const FINISH_REMOTE: Duration = Duration::from_secs(15);

impl Crew {
    /// Ends what still runs.
    pub(super) fn end(&mut self) {
        if self.people.values().any(|person| person.runs) {
            if self.stage < Stage::Terminated {
                self.signal_all(libc::SIGTERM);
                self.enter(Stage::Terminated, Some(TERM_GRACE));
            }
        } else {
            self.finish();
        }
    }

    pub(super) fn on_signal(&mut self, signal: i32) {
        match signal {
            libc::SIGCHLD | libc::SIGTTOU => {}
            libc::SIGUSR1 | libc::SIGUSR2 => self.signal_all(signal),
            _ if self.stage >= Stage::Finishing => {
                // Everything is being killed already; who asks again does not want to wait for output either.
                self.drained_by = Some(Instant::now());
                self.sinks.iter_mut().for_each(Sink::give_up);
                self.setup.sites.give_up();
            }
            _ if self.stage == Stage::Terminated => self.finish(),
            _ => {
                let first = signal == libc::SIGINT && self.stage == Stage::Running;
                let sent = if signal == libc::SIGINT && !first { libc::SIGTERM } else { signal };
                self.say(&format!(
                    "{}: passing {} on to the workers",
                    signal_name(signal),
                    signal_name(sent)
                ));
                self.code = self.code.or(Some(128 + signal));
                self.signal_all(sent);
                let stage = if first { Stage::Ending } else { Stage::Terminated };
                self.enter(stage, Some(self.setup.kill_after));
                if !self.people.values().any(|person| person.runs) {
                    self.finish();
                }
            }
        }
    }

    pub(super) fn on_deadline(&mut self, now: Instant) {
        let listening = !self.is_full();
        self.setup.sites.tick(now, listening);
        if self.stage == Stage::Running {
            self.setup.plan.expire(now);
        }
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            match self.stage {
                Stage::Ending => {
                    self.signal_all(libc::SIGTERM);
                    self.enter(Stage::Terminated, Some(TERM_GRACE));
                }
                Stage::Finishing => {
                    self.deadline = None;
                    self.setup.sites.give_up();
                }
                _ => self.finish(),
            }
        }
        if self.drained_by.is_some_and(|deadline| deadline <= now) {
            self.drained_by = None;
            for person in self.people.values_mut() {
                for (stream, sink) in person.streams.iter_mut().zip(&mut self.sinks) {
                    if stream.is_open() {
                        stream.close(sink);
                    }
                }
            }
        }
    }

    /// The guard of this host has ended: as it should, or killed. Then its orphans are ours.
    pub(super) fn on_guard_gone(&mut self) {
        self.setup.guard.gone = true;
        if self.stage != Stage::Finishing {
            self.say("the guard process was killed; ending the job");
            self.code = self.code.or(Some(128 + libc::SIGKILL));
            self.finish();
            let me = rustix::process::getpid().as_raw_nonzero().get();
            let spared: HashSet<i32> =
                self.strangers.iter().copied().chain(self.setup.sites.pids()).collect();
            let deadline = Instant::now() + TERM_GRACE;
            while kill_descendants(me, &spared) > 0 && Instant::now() < deadline {
                let mut fds = [PollFd::new(&self.setup.signals, PollFlags::IN)];
                let _ = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 10_000_000 }));
                while self.setup.signals.next().is_some() {}
                self.reap_adopted();
            }
        }
        self.setup.guard.close();
        self.reap_adopted();
        self.people
            .values_mut()
            .filter(|person| person.host.is_none())
            .for_each(|person| person.runs = false);
        self.look_whether_all_have_gone();
    }

    /// When nobody is left who may write, what is on its way is awaited for a bounded time.
    pub(super) fn look_whether_all_have_gone(&mut self) {
        let open = self.people.values().flat_map(|person| &person.streams).any(Stream::is_open);
        if self.all_gone() && open && self.drained_by.is_none() {
            self.deadline = None;
            self.drained_by = Some(Instant::now() + DRAIN);
        }
    }

    /// Children of the process that hosts us (Python, say) are left for it to reap.
    fn reap_adopted(&self) {
        let me = rustix::process::getpid().as_raw_nonzero().get();
        let clients: HashSet<i32> = self.setup.sites.pids().collect();
        let ours = |pid: &i32| !self.strangers.contains(pid) && !clients.contains(pid);
        for process in descendants(me) {
            if process.zombie && process.parent == me && ours(&process.pid) {
                let _ = waitpid(Pid::from_raw(process.pid), WaitOptions::NOHANG);
            }
        }
    }

    pub(super) fn enter(&mut self, stage: Stage, limit: Option<Duration>) {
        self.stage = stage;
        self.deadline = limit.map(|limit| Instant::now() + limit);
    }

    /// Has everything killed that is left of the job.
    pub(super) fn finish(&mut self) {
        if self.stage != Stage::Finishing {
            let remote = !self.setup.sites.is_empty();
            self.enter(Stage::Finishing, remote.then_some(FINISH_REMOTE));
            // No script of the discovery may be taken for something of the job.
            self.setup.discovery = None;
            self.setup.sites.finish();
            if !self.setup.guard.gone {
                self.setup.guard.order(&Order::Finish);
            }
        }
    }

    pub(super) fn signal(&mut self, worker: Worker, signal: i32) {
        match self.people.get(&worker).map(|person| person.host.as_deref()) {
            Some(Some(host)) => self.setup.sites.signal(host, worker, signal),
            Some(None) if !self.setup.guard.gone => {
                self.setup.guard.order(&Order::Signal { rank: worker, signal, group: true });
            }
            _ => {}
        }
    }

    pub(super) fn signal_all(&mut self, signal: i32) {
        let running: Vec<Worker> = self.people.iter().filter(|(_, p)| p.runs).map(|(w, _)| *w).collect();
        running.into_iter().for_each(|worker| self.signal(worker, signal));
    }
}
