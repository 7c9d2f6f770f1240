//! The loop of an elastic job: what workers write, the reports of this host's guard and of those on other hosts
//! ([`Sites`]), what the rendezvous and the host discovery tell, signals, and the orders that come of it all.
#![forbid(unsafe_code)]

mod ends;
mod news;

use super::super::link::Link;
use super::super::output::{Sink, Stream};
use super::super::processes::descendants;
use super::super::sys::Signals;
use super::discovery::{Discovery, Hosts};
use super::maker::Maker;
use super::parcel;
use super::plan::{Plan, Step, Worker};
use super::sites::{Part, Sites};
use crate::rendezvous::server::assembly::Event;
use crate::rendezvous::server::{Server, Word};
use crate::transport::wake::Waker;
use crossbeam::channel::Receiver;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// What a crew is made of.
pub struct Setup {
    /// The guard of this host.
    pub guard: Link,
    /// Orders to it to start a worker.
    pub parcels: OwnedFd,
    /// The other hosts.
    pub sites: Sites,
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
    /// Names of this host among those that are known from the beginning.
    pub here: BTreeSet<String>,
    /// Looks for hosts, if they can change.
    pub discovery: Option<Discovery>,
    /// Makes workers.
    pub maker: Maker,
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
    /// The host; none for this one.
    host: Option<String>,
    streams: [Stream; 2],
    runs: bool,
}

/// Looks after one elastic job.
pub struct Crew {
    setup: Setup,
    sinks: [Sink; 2],
    /// Names of this host.
    here: BTreeSet<String>,
    people: BTreeMap<Worker, Person>,
    stage: Stage,
    code: Option<i32>,
    deadline: Option<Instant>,
    drained_by: Option<Instant>,
    strangers: HashSet<i32>,
}

enum Ready {
    Signals,
    Reports,
    Bell,
    Site(usize, Part),
    Sink(usize),
    Stream(Worker, usize),
}

impl Crew {
    /// A crew whose guard waits for orders.
    pub fn new(mut setup: Setup) -> std::io::Result<Crew> {
        let me = rustix::process::getpid().as_raw_nonzero().get();
        let strangers = descendants(me).iter().map(|p| p.pid).filter(|pid| *pid != setup.guard.pid).collect();
        let sinks = [
            Sink::new(std::io::stdout().as_fd().try_clone_to_owned()?),
            Sink::new(std::io::stderr().as_fd().try_clone_to_owned()?),
        ];
        Ok(Crew {
            here: std::mem::take(&mut setup.here),
            setup,
            sinks,
            people: BTreeMap::new(),
            stage: Stage::Running,
            code: None,
            deadline: None,
            drained_by: None,
            strangers,
        })
    }

    /// Looks after the job until nothing of it is left, and returns the launcher's exit code.
    pub fn supervise(&mut self) -> i32 {
        while !self.is_over() {
            self.plan();
            self.turn();
            self.release();
        }
        self.code.unwrap_or(0)
    }

    fn is_over(&self) -> bool {
        let open = self.people.values().flat_map(|p| &p.streams).any(Stream::is_open);
        self.all_gone() && !open && self.sinks.iter().all(Sink::is_empty)
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
        let local = self.here.contains(host);
        // Before it can come there. One whose host is still to be reached is waited for, too.
        self.setup.server.tell(Word::Started(worker as u32));
        let started = if local { self.start_here(worker, host) } else { self.start_there(worker, host) };
        if let Err(why) = started {
            self.setup.server.tell(Word::Ended(worker as u32));
            self.setup.plan.refused(worker, super::super::USAGE, why);
        }
    }

    fn start_here(&mut self, worker: Worker, host: &str) -> Result<(), String> {
        let (spec, streams) = self.setup.maker.local(worker, host).map_err(|e| e.to_string())?;
        self.setup.sites.use_local();
        self.people.insert(worker, Person { host: None, streams, runs: true });
        parcel::send(&self.setup.parcels, worker, &spec)
            .map_err(|e| format!("the guard takes no orders: {e}"))
    }

    fn start_there(&mut self, worker: Worker, host: &str) -> Result<(), String> {
        let streams = self.setup.maker.remote(worker).map_err(|e| e.to_string())?;
        self.people.insert(worker, Person { host: Some(host.to_owned()), streams, runs: true });
        let variables = self.setup.maker.variables(worker, host);
        self.setup.sites.start(host, worker, variables, Instant::now());
        Ok(())
    }

    fn turn(&mut self) {
        let mut fds = vec![
            PollFd::new(&self.setup.signals, PollFlags::IN),
            PollFd::new(&self.setup.bell, PollFlags::IN),
        ];
        let mut meaning = vec![Ready::Signals, Ready::Bell];
        if !self.setup.guard.gone {
            fds.push(PollFd::new(&self.setup.guard.reports, PollFlags::IN));
            meaning.push(Ready::Reports);
        }
        for (index, part, link) in self.setup.sites.watched(!self.is_full()) {
            fds.push(match part {
                Part::Reports => PollFd::new(&link.reports, PollFlags::IN),
                Part::Errors => PollFd::new(link.errors.as_ref().expect("it is watched"), PollFlags::IN),
                Part::Orders => PollFd::from_borrowed_fd(link.orders.descriptor(), PollFlags::OUT),
            });
            meaning.push(Ready::Site(index, part));
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
        self.on_news();
        // Whoever has ended and written its last leaves nothing behind.
        self.people.retain(|_, p| p.runs || p.streams.iter().any(Stream::is_open));
    }

    fn timeout(&self) -> Option<Timespec> {
        if self.setup.sites.has_news() {
            return Some(Timespec { tv_sec: 0, tv_nsec: 0 });
        }
        let plan = self.setup.plan.deadline().filter(|_| self.stage == Stage::Running);
        let own = [self.deadline, self.drained_by, plan, self.setup.sites.deadline()];
        let next = own.into_iter().flatten().min()?;
        Some(crate::rendezvous::reactor::timespec(next.saturating_duration_since(Instant::now())))
    }

    fn on_ready(&mut self, ready: Ready) {
        match ready {
            Ready::Signals => {}
            Ready::Bell => self.on_bell(),
            Ready::Reports => match self.setup.guard.read() {
                None => self.on_guard_gone(),
                Some(pieces) => pieces.into_iter().for_each(|piece| self.on_piece(piece)),
            },
            Ready::Site(index, part) => self.setup.sites.on_ready(index, part),
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
        self.setup.sites.on_bell();
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
                Ok(Hosts { slots, here }) => {
                    if self.setup.verbose {
                        self.say(&format!("hosts and slots: {slots:?}"));
                    }
                    self.setup.plan.discovered(slots, now);
                    self.here = here;
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

    /// Whether so much waits to be written that nothing more is taken from other hosts.
    fn is_full(&self) -> bool {
        self.sinks.iter().any(Sink::is_full)
    }

    fn all_gone(&self) -> bool {
        self.setup.guard.gone && self.setup.sites.is_empty()
    }

    fn say(&mut self, words: &str) {
        self.sinks[1].push(&[b"carolerun: ", words.as_bytes(), b"\n"]);
    }
}
