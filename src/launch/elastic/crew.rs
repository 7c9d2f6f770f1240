//! The loop of an elastic job: what workers write, the guard's reports, what the rendezvous and the host discovery tell,
//! signals, and the orders that come of it all.
#![forbid(unsafe_code)]

use super::super::guard::{Lines, Order, RankSpec, Report};
use super::super::output::{Sink, Stream};
use super::super::processes::{descendants, kill_descendants};
use super::super::sys::{Signals, signal_name};
use super::discovery::Discovery;
use super::parcel;
use super::plan::{Plan, Step, Worker};
use crate::error::Result;
use crate::rendezvous::server::assembly::Event;
use crate::rendezvous::server::{Server, Word};
use crate::transport::wake::Waker;
use crossbeam::channel::Receiver;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, WaitOptions, waitpid};
use std::collections::{BTreeMap, HashSet};
use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// After SIGTERM, this long until SIGKILL.
const TERM_GRACE: Duration = Duration::from_secs(3);
/// How long output is awaited when all processes have ended: somebody outside the job may hold a pipe.
const DRAIN: Duration = Duration::from_secs(1);

/// Makes the pipes of a worker on a host: its end, and ours.
pub type MakeWorker = Box<dyn Fn(Worker, &str) -> Result<(RankSpec, [Stream; 2])>>;

/// What a crew is made of.
pub struct Setup {
    /// The guard's process id.
    pub guard: i32,
    /// Orders to the guard.
    pub orders: File,
    /// Orders to start a worker.
    pub parcels: OwnedFd,
    /// The guard's reports.
    pub reports: File,
    /// The launcher's signals.
    pub signals: Signals,
    /// Who there should be.
    pub plan: Plan,
    /// Where workers meet.
    pub server: Server,
    /// What the rendezvous tells.
    pub events: Receiver<Event>,
    /// Rung for events and for what the discovery has found.
    pub bell: Waker,
    /// Looks for hosts, if they can change.
    pub discovery: Option<Discovery>,
    /// How a worker is made.
    pub make: MakeWorker,
    /// The command, for messages.
    pub command: OsString,
    /// From the user's first signal to SIGKILL.
    pub kill_after: Duration,
    /// Whether to tell what is done.
    pub verbose: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Running,
    /// The user asked for the end; the workers may end by themselves.
    Ending,
    /// SIGTERM was sent.
    Terminated,
    /// The guard was told to kill what is left.
    Finishing,
}

struct Person {
    streams: [Stream; 2],
    runs: bool,
}

/// Looks after one elastic job.
pub struct Crew {
    setup: Setup,
    sinks: [Sink; 2],
    lines: Lines,
    people: BTreeMap<Worker, Person>,
    stage: Stage,
    code: Option<i32>,
    deadline: Option<Instant>,
    guard_gone: bool,
    drained_by: Option<Instant>,
    strangers: HashSet<i32>,
}

enum Ready {
    Signals,
    Reports,
    Bell,
    Sink(usize),
    Stream(Worker, usize),
}

impl Crew {
    /// A crew whose guard waits for orders.
    pub fn new(setup: Setup) -> std::io::Result<Crew> {
        let me = rustix::process::getpid().as_raw_nonzero().get();
        let strangers = descendants(me).iter().map(|p| p.pid).filter(|pid| *pid != setup.guard).collect();
        let sinks = [
            Sink::new(std::io::stdout().as_fd().try_clone_to_owned()?),
            Sink::new(std::io::stderr().as_fd().try_clone_to_owned()?),
        ];
        Ok(Crew {
            setup,
            sinks,
            lines: Lines::default(),
            people: BTreeMap::new(),
            stage: Stage::Running,
            code: None,
            deadline: None,
            guard_gone: false,
            drained_by: None,
            strangers,
        })
    }

    /// Looks after the job until nothing of it is left, and returns the launcher's exit code.
    pub fn supervise(&mut self) -> i32 {
        while !self.is_over() {
            self.plan();
            self.turn();
        }
        self.code.unwrap_or(0)
    }

    fn is_over(&self) -> bool {
        let silent = self.people.values().flat_map(|p| &p.streams).all(|stream| stream.pipe().is_none());
        self.guard_gone && silent && self.sinks.iter().all(Sink::is_empty)
    }

    /// Does what the plan wants.
    fn plan(&mut self) {
        while let Some(step) = self.setup.plan.poll() {
            match step {
                Step::Start { worker, host } => self.start(worker, &host),
                Step::Dismiss(worker) => self.setup.server.tell(Word::Dismissed(worker as u32)),
                Step::Kill(worker) => self.signal(worker, libc::SIGKILL),
                Step::Say(words) => self.say(&words),
                Step::End { code, why } => {
                    if let Some(why) = why {
                        self.say(&why);
                    }
                    self.code = self.code.or(Some(code));
                    self.end();
                }
            }
        }
    }

    fn start(&mut self, worker: Worker, host: &str) {
        if self.stage != Stage::Running {
            return;
        }
        if self.setup.verbose {
            self.say(&format!("starting worker {worker} on {host}"));
        }
        let made = (self.setup.make)(worker, host);
        let sent = made.map_err(|e| e.to_string()).and_then(|(spec, streams)| {
            self.people.insert(worker, Person { streams, runs: true });
            // Before it can come there.
            self.setup.server.tell(Word::Started(worker as u32));
            parcel::send(&self.setup.parcels, worker, &spec)
                .map_err(|e| format!("the guard takes no orders: {e}"))
        });
        if let Err(why) = sent {
            self.setup.plan.refused(worker, super::super::USAGE, why);
        }
    }

    /// Ends what still runs.
    fn end(&mut self) {
        if self.people.values().any(|person| person.runs) {
            if self.stage < Stage::Terminated {
                self.signal_all(libc::SIGTERM);
                self.enter(Stage::Terminated, Some(TERM_GRACE));
            }
        } else {
            self.finish();
        }
    }

    fn turn(&mut self) {
        let mut fds = vec![
            PollFd::new(&self.setup.signals, PollFlags::IN),
            PollFd::new(&self.setup.bell, PollFlags::IN),
        ];
        let mut meaning = vec![Ready::Signals, Ready::Bell];
        if !self.guard_gone {
            fds.push(PollFd::new(&self.setup.reports, PollFlags::IN));
            meaning.push(Ready::Reports);
        }
        for (index, sink) in self.sinks.iter().enumerate() {
            if !sink.is_empty() {
                fds.push(PollFd::from_borrowed_fd(sink.descriptor(), PollFlags::OUT));
                meaning.push(Ready::Sink(index));
            }
        }
        for (worker, person) in &self.people {
            for (index, stream) in person.streams.iter().enumerate() {
                if let Some(pipe) = stream.pipe().filter(|_| !self.sinks[index].is_full()) {
                    fds.push(PollFd::new(pipe, PollFlags::IN));
                    meaning.push(Ready::Stream(*worker, index));
                }
            }
        }
        let timeout = self.timeout();
        if poll(&mut fds, timeout.as_ref()).is_err() {
            return;
        }
        let ready: Vec<Ready> = fds
            .iter()
            .zip(meaning)
            .filter(|(fd, _)| !fd.revents().is_empty())
            .map(|(_, meaning)| meaning)
            .collect();
        drop(fds);
        ready.into_iter().for_each(|ready| self.on_ready(ready));
        while let Some(signal) = self.setup.signals.next() {
            self.on_signal(signal);
        }
        self.on_deadline(Instant::now());
        // Whoever has ended and written its last leaves nothing behind.
        self.people.retain(|_, p| p.runs || p.streams.iter().any(|stream| stream.pipe().is_some()));
    }

    fn timeout(&self) -> Option<Timespec> {
        let plan = self.setup.plan.deadline().filter(|_| self.stage == Stage::Running);
        let next = [self.deadline, self.drained_by, plan].into_iter().flatten().min()?;
        Some(crate::rendezvous::reactor::timespec(next.saturating_duration_since(Instant::now())))
    }

    fn on_ready(&mut self, ready: Ready) {
        match ready {
            Ready::Signals => {}
            Ready::Bell => self.on_bell(),
            Ready::Reports => match self.lines.read(&self.setup.reports) {
                None => self.on_guard_gone(),
                Some(lines) => {
                    for line in lines {
                        let report = Report::parse(&line).expect("the guard writes only reports");
                        self.on_report(report);
                    }
                }
            },
            Ready::Sink(index) => {
                self.sinks[index].write_some();
                if self.sinks[index].is_closed() && index == 0 && self.stage == Stage::Running {
                    self.say("standard output was closed by its reader; ending the job");
                    self.code = self.code.or(Some(128 + libc::SIGPIPE));
                    self.end();
                }
            }
            Ready::Stream(worker, index) => {
                let mut complaints = Vec::new();
                if let Some(person) = self.people.get_mut(&worker) {
                    person.streams[index].read(&mut self.sinks[index], &mut complaints);
                }
                complaints.iter().for_each(|words| self.say(words));
            }
        }
    }

    fn on_bell(&mut self) {
        self.setup.bell.clear();
        let now = Instant::now();
        while let Ok(event) = self.setup.events.try_recv() {
            match event {
                Event::Formed { epoch, workers } => {
                    let workers: Vec<Worker> = workers.into_iter().map(|worker| worker as Worker).collect();
                    self.rename(&workers);
                    if self.setup.verbose {
                        self.say(&format!("epoch {} begins with workers {workers:?}", epoch.0));
                    }
                    self.setup.plan.formed(&workers);
                }
                Event::Excluded(workers) => {
                    let alive = |worker: &Worker| self.people.get(worker).is_some_and(|person| person.runs);
                    let workers = workers.into_iter().map(|worker| worker as Worker);
                    let workers: Vec<Worker> = workers.filter(alive).collect();
                    self.setup.plan.excluded(&workers, now);
                }
                Event::TooFew { here } => self.setup.plan.too_few(here),
            }
        }
        while let Some(found) = self.setup.discovery.as_ref().and_then(Discovery::poll) {
            match found {
                Ok(slots) => {
                    if self.setup.verbose {
                        self.say(&format!("hosts and slots: {slots:?}"));
                    }
                    self.setup.plan.discovered(slots, now);
                }
                // It may work the next time; the hosts that were known stay known.
                Err(why) => self.say(&why),
            }
        }
    }

    /// From now on what workers write stands under their new ranks.
    fn rename(&mut self, workers: &[Worker]) {
        for (rank, worker) in workers.iter().enumerate() {
            if let Some(person) = self.people.get_mut(worker) {
                for (stream, name) in person.streams.iter_mut().zip(["stdout", "stderr"]) {
                    stream.rename(&format!("[{rank}]<{name}>:"));
                }
            }
        }
    }

    fn on_report(&mut self, report: Report) {
        match report {
            Report::Started { rank, pid } => {
                if self.setup.verbose {
                    self.say(&format!("worker {rank} is process {pid}"));
                }
            }
            Report::Refused { rank, errno } => self.on_refused(rank, errno),
            Report::Exited { rank, code } => self.on_end(rank, code, &format!("exited with code {code}")),
            Report::Killed { rank, signal } => {
                self.on_end(rank, 128 + signal, &format!("was killed by {}", signal_name(signal)));
            }
            Report::Left { count } => {
                self.say(&format!("{count} processes of the job do not die of SIGKILL; see ps for state D"));
            }
        }
    }

    fn on_refused(&mut self, worker: Worker, errno: i32) {
        self.setup.server.tell(Word::Ended(worker as u32));
        if let Some(person) = self.people.get_mut(&worker) {
            person.runs = false;
        }
        let command = self.setup.command.to_string_lossy();
        let error = std::io::Error::from_raw_os_error(errno);
        let code = if errno == libc::ENOENT { 127 } else { 126 };
        self.setup.plan.refused(worker, code, format!("the command '{command}' cannot be started: {error}"));
    }

    fn on_end(&mut self, worker: Worker, code: i32, words: &str) {
        self.setup.server.tell(Word::Ended(worker as u32));
        if self.setup.verbose {
            self.say(&format!("worker {worker} {words}"));
        }
        if let Some(person) = self.people.get_mut(&worker) {
            person.runs = false;
        }
        if self.stage == Stage::Running {
            self.setup.plan.ended(worker, code, words, Instant::now());
        } else if !self.people.values().any(|person| person.runs) {
            self.finish();
        }
    }

    fn on_signal(&mut self, signal: i32) {
        match signal {
            libc::SIGCHLD | libc::SIGTTOU => {}
            libc::SIGUSR1 | libc::SIGUSR2 => self.signal_all(signal),
            _ if self.stage >= Stage::Finishing => {
                // Everything is being killed already; who asks again does not want to wait for output either.
                self.drained_by = Some(Instant::now());
                self.sinks.iter_mut().for_each(Sink::give_up);
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

    fn on_deadline(&mut self, now: Instant) {
        if self.stage == Stage::Running {
            self.setup.plan.expire(now);
        }
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            match self.stage {
                Stage::Ending => {
                    self.signal_all(libc::SIGTERM);
                    self.enter(Stage::Terminated, Some(TERM_GRACE));
                }
                _ => self.finish(),
            }
        }
        if self.drained_by.is_some_and(|deadline| deadline <= now) {
            self.drained_by = None;
            for person in self.people.values_mut() {
                for (stream, sink) in person.streams.iter_mut().zip(&mut self.sinks) {
                    if stream.pipe().is_some() {
                        stream.close(sink);
                    }
                }
            }
        }
    }

    /// The guard has ended: as it should, or killed. Then its orphans are ours.
    fn on_guard_gone(&mut self) {
        self.guard_gone = true;
        self.deadline = None;
        let me = rustix::process::getpid().as_raw_nonzero().get();
        if self.stage != Stage::Finishing {
            self.stage = Stage::Finishing;
            self.say("the guard process was killed; ending the job");
            self.code = self.code.or(Some(128 + libc::SIGKILL));
            let deadline = Instant::now() + TERM_GRACE;
            while kill_descendants(me, &self.strangers) > 0 && Instant::now() < deadline {
                let mut fds = [PollFd::new(&self.setup.signals, PollFlags::IN)];
                let _ = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 10_000_000 }));
                while self.setup.signals.next().is_some() {}
                self.reap_adopted();
            }
        }
        let _ = waitpid(Pid::from_raw(self.setup.guard), WaitOptions::empty());
        self.reap_adopted();
        self.people.values_mut().for_each(|person| person.runs = false);
        self.drained_by = Some(Instant::now() + DRAIN);
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

    fn enter(&mut self, stage: Stage, limit: Option<Duration>) {
        self.stage = stage;
        self.deadline = limit.map(|limit| Instant::now() + limit);
    }

    /// Has everything killed that is left of the job.
    fn finish(&mut self) {
        if self.stage != Stage::Finishing {
            self.enter(Stage::Finishing, None);
            // No script of the discovery may be taken for something of the job.
            self.setup.discovery = None;
            self.order(&Order::Finish);
        }
    }

    fn signal(&mut self, worker: Worker, signal: i32) {
        self.order(&Order::Signal { rank: worker, signal, group: true });
    }

    fn signal_all(&mut self, signal: i32) {
        let running: Vec<Worker> = self.people.iter().filter(|(_, p)| p.runs).map(|(w, _)| *w).collect();
        running.into_iter().for_each(|worker| self.signal(worker, signal));
    }

    fn order(&mut self, order: &Order) {
        // A guard that has gone is noticed by the end of its reports.
        let _ = self.setup.orders.write_all(order.line().as_bytes());
    }

    fn say(&mut self, words: &str) {
        self.sinks[1].push(&[b"carolerun: ", words.as_bytes(), b"\n"]);
    }
}
