//! Which workers an elastic job should have: hosts and slots come and go, workers fail, hosts that failed are left
//! alone for a while. A machine without I/O: facts in, [`Step`]s out; the time is an argument.
//!
//! * A worker that fails never ends the job by itself, as long as another one lives that has the state of the
//!   training. Its host cools down: no new worker is started there for a time that doubles with each failure in a row.
//!   Workers that live there go on.
//! * Workers on a host that is listed no more (or with fewer slots) are let go: they leave at their next commit.
//! * The first worker that ends with success ends the growth of the job; when all have ended, it is over.
#![forbid(unsafe_code)]

use super::discovery::Slots;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

/// The number of a worker; no two of a job have the same.
pub type Worker = usize;

/// What the user asked for.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// The fewest workers.
    pub min: u32,
    /// The most.
    pub max: u32,
    /// How many there must be slots for before the job begins.
    pub first: u32,
    /// How many times the job may form a new epoch.
    pub reset_limit: Option<u32>,
    /// For how long a host is left alone after its first failure, and at most.
    pub cooldown: (Duration, Duration),
    /// How long there may be too few slots.
    pub timeout: Duration,
    /// Whether other hosts may be found later.
    pub changing: bool,
}

/// What is to be done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// Start a worker.
    Start {
        /// Its number.
        worker: Worker,
        /// Where.
        host: String,
    },
    /// It is to leave at the next change of epochs.
    Dismiss(Worker),
    /// It must go now: the others have gone on without it.
    Kill(Worker),
    /// The job is over, with this exit code; the words, if there are any, say why.
    End {
        /// The exit code.
        code: i32,
        /// Why, if not because everybody has ended well.
        why: Option<String>,
    },
    /// Words for the user.
    Say(String),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// Started; in no epoch yet.
    Starting,
    /// In the present epoch.
    Member,
    /// Let go, or left behind.
    Leaving,
}

struct Placed {
    host: String,
    state: State,
}

/// What is remembered of a host that failed.
#[derive(Clone, Copy)]
struct Failures {
    in_a_row: u32,
    /// The last.
    at: Instant,
    /// Nobody is started there before.
    until: Option<Instant>,
}

/// The workers of a job.
pub struct Plan {
    terms: Terms,
    slots: Slots,
    workers: BTreeMap<Worker, Placed>,
    failures: BTreeMap<String, Failures>,
    next: Worker,
    /// The first epoch has begun.
    trained: bool,
    resets: u32,
    /// A worker has ended with success: nobody is started any more.
    closing: bool,
    /// The code of the last failure while nobody has succeeded.
    failed: Option<i32>,
    over: bool,
    short_since: Option<Instant>,
    /// Those that were left behind, and when they are killed.
    farewells: BTreeMap<Worker, Instant>,
    steps: VecDeque<Step>,
    /// For the random part of a cool-down.
    random: u64,
}

/// Some time for a worker that was left behind to notice it and to end by itself.
const FAREWELL: Duration = Duration::from_secs(5);

impl Plan {
    /// Nothing is known of any host yet.
    pub fn new(terms: Terms, now: Instant, seed: u64) -> Plan {
        Plan {
            terms,
            slots: Slots::new(),
            workers: BTreeMap::new(),
            failures: BTreeMap::new(),
            next: 0,
            trained: false,
            resets: 0,
            closing: false,
            failed: None,
            over: false,
            short_since: Some(now),
            farewells: BTreeMap::new(),
            steps: VecDeque::new(),
            random: seed | 1,
        }
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Option<Step> {
        self.steps.pop_front()
    }

    /// Hosts and their slots, as they are now, in order of preference.
    pub fn discovered(&mut self, slots: Slots, now: Instant) {
        self.slots = slots;
        let gone: Vec<String> = self
            .failures
            .keys()
            .filter(|host| !self.slots.iter().any(|(h, _)| h == *host))
            .cloned()
            .collect();
        // A host that comes back under its old name is a new one.
        for host in gone {
            self.failures.remove(&host);
        }
        self.let_go();
        self.fill(now);
    }

    /// Lets go of those who have no slot any more, the youngest first.
    fn let_go(&mut self) {
        let hosts: BTreeSet<String> = self.workers.values().map(|placed| placed.host.clone()).collect();
        for host in hosts {
            let room = self.slots.iter().find(|(h, _)| *h == host).map_or(0, |(_, slots)| *slots) as usize;
            let there = self.workers.iter_mut().filter(|(_, p)| p.host == host && p.state != State::Leaving);
            let mut there: Vec<(&Worker, &mut Placed)> = there.collect();
            while there.len() > room {
                let (worker, placed) = there.pop().expect("more than there is room for");
                let started = placed.state == State::Starting;
                placed.state = State::Leaving;
                let worker = *worker;
                self.steps.push_back(Step::Dismiss(worker));
                if started {
                    self.steps.push_back(Step::Kill(worker));
                }
            }
        }
    }

    fn on(&self, host: &str) -> usize {
        self.workers.values().filter(|placed| placed.host == host).count()
    }

    fn staying(&self) -> usize {
        self.workers.values().filter(|placed| placed.state != State::Leaving).count()
    }

    /// Starts workers in the slots that are free, as many as there may be.
    fn fill(&mut self, now: Instant) {
        if self.closing || self.over {
            return;
        }
        let mut free = Vec::new();
        for (host, slots) in &self.slots {
            let taken = self.on(host);
            if !self.cools(host, now) {
                free.extend((taken..*slots as usize).map(|_| host.clone()));
            }
        }
        let staying = self.staying();
        let enough = if self.trained || staying > 0 { 0 } else { self.terms.first as usize };
        if free.len() < enough {
            self.short_since.get_or_insert(now);
            return;
        }
        for host in free.into_iter().take((self.terms.max as usize).saturating_sub(staying)) {
            let worker = self.next;
            self.next += 1;
            self.workers.insert(worker, Placed { host: host.clone(), state: State::Starting });
            self.steps.push_back(Step::Start { worker, host });
        }
        self.short_since = match (self.staying() as u32) < self.terms.min {
            true => self.short_since.or(Some(now)),
            false => None,
        };
    }

    /// An epoch has begun with these.
    pub fn formed(&mut self, workers: &[Worker]) {
        for worker in workers {
            if let Some(placed) = self.workers.get_mut(worker)
                && placed.state == State::Starting
            {
                placed.state = State::Member;
            }
        }
        if !std::mem::replace(&mut self.trained, true) {
            return;
        }
        self.resets += 1;
        if self.terms.reset_limit.is_some_and(|limit| self.resets > limit) {
            let limit = self.terms.reset_limit.unwrap_or_default();
            self.end(
                1,
                Some(format!(
                    "the job has formed a new epoch more than {limit} times (--reset-limit); ending it"
                )),
            );
        }
    }

    /// The others have gone on without these.
    pub fn excluded(&mut self, workers: &[Worker], now: Instant) {
        for worker in workers {
            if let Some(placed) = self.workers.get_mut(worker) {
                let (known, host) = (placed.state == State::Leaving, placed.host.clone());
                placed.state = State::Leaving;
                if !known {
                    self.steps.push_back(Step::Say(format!(
                        "worker {worker} did not answer, and the others have gone on without it; ending it"
                    )));
                    self.farewells.insert(*worker, now + FAREWELL);
                    self.cool(&host, now);
                }
            }
        }
    }

    /// Too few workers came together for too long.
    pub fn too_few(&mut self, here: u32) {
        let (min, seconds) = (self.terms.min, self.terms.timeout.as_secs_f64());
        self.end(
            self.failed.unwrap_or(1),
            Some(format!(
                "only {here} workers came together in {seconds} s, and at least {min} are needed (--min-np)"
            )),
        );
    }

    /// A worker has ended.
    pub fn ended(&mut self, worker: Worker, code: i32, words: &str, now: Instant) {
        let Some(placed) = self.workers.get(&worker) else { return };
        let (state, host) = (placed.state, placed.host.clone());
        if code != 0 && state != State::Leaving && !self.over {
            self.cool(&host, now);
            let (left, pause) = (self.staying() - 1, self.pause(&host, now));
            self.steps.push_back(Step::Say(format!(
                "worker {worker} on {host} {words}; {left} left; no new one is started there for {pause:.1} s"
            )));
        }
        self.gone(worker, code, now);
    }

    /// A host is lost, and all workers with it.
    pub fn lost(&mut self, host: &str, code: i32, why: &str, now: Instant) {
        let workers = self.those_on(host);
        if !self.over {
            self.cool(host, now);
            let (count, pause) = (workers.len(), self.pause(host, now));
            let stay = |w: &&Worker| self.workers[*w].state != State::Leaving;
            let left = self.staying() - workers.iter().filter(stay).count();
            self.steps.push_back(Step::Say(format!(
                "host '{host}' is lost, and with it {count} workers: {why}; {left} left; no new one is started there for \
                 {pause:.1} s"
            )));
        }
        workers.into_iter().for_each(|worker| self.gone(worker, code, now));
    }

    /// On a host nothing can be started, so these of its workers never will be. `code`: of the job, if that ends it;
    /// `heals`: it may be otherwise later.
    pub fn unfit(
        &mut self,
        host: &str,
        workers: &[Worker],
        why: &str,
        (code, heals): (i32, bool),
        now: Instant,
    ) {
        workers.iter().for_each(|worker| drop(self.workers.remove(worker)));
        if self.over {
            return;
        }
        self.cool(host, now);
        let left = self.slots.iter().filter(|(host, _)| !self.cools(host, now));
        let usable: u32 = left.map(|(_, slots)| slots).sum();
        let hopeless = match self.terms.changing {
            true => !heals && self.workers.is_empty(),
            false => usable < self.terms.min,
        };
        if !self.trained && hopeless {
            self.steps.push_back(Step::Say(why.to_owned()));
            let min = self.terms.min;
            let why =
                format!("{usable} slots are left on other hosts, and at least {min} are needed (--min-np)");
            return self.end(code, Some(why));
        }
        let pause = self.pause(host, now);
        self.steps
            .push_back(Step::Say(format!("{why}; it is left out for {pause:.1} s, and then tried again")));
        self.settle(code, now);
    }

    /// The workers on a host.
    pub fn those_on(&self, host: &str) -> Vec<Worker> {
        self.workers.iter().filter(|(_, placed)| placed.host == host).map(|(worker, _)| *worker).collect()
    }

    /// Whether a host is listed or has workers.
    pub fn needs(&self, host: &str) -> bool {
        self.slots.iter().any(|(listed, _)| listed == host) || self.on(host) > 0
    }

    /// A worker is no more.
    fn gone(&mut self, worker: Worker, code: i32, now: Instant) {
        self.farewells.remove(&worker);
        let Some(Placed { state, .. }) = self.workers.remove(&worker) else { return };
        if code != 0 && state != State::Leaving && !self.over {
            self.failed = Some(code);
        }
        if code == 0 && state == State::Member {
            self.closing = true;
            self.failed = None;
        }
        if self.over {
            return;
        }
        let (survivors, _) = self.survivors();
        if !self.closing && !survivors && code != 0 && state != State::Leaving {
            // Nobody has the state of the training any more; or nobody can even start.
            self.end(code, Some("all workers have failed".to_owned()));
        } else {
            self.settle(self.failed.unwrap_or(0), now);
        }
    }

    /// Whether somebody has the state of the training, or is in the epoch or has just left it. Before the first epoch
    /// anybody will do.
    fn survivors(&self) -> (bool, bool) {
        let any = |state| self.workers.values().any(|placed| placed.state == state);
        let members = any(State::Member);
        (members || (!self.trained && any(State::Starting)), members || any(State::Leaving))
    }

    /// Some are there no more: others take their places, or the job is over.
    fn settle(&mut self, code: i32, now: Instant) {
        let (survivors, here) = self.survivors();
        if self.closing {
            // Those that have just come have nobody to train with.
            if !here {
                self.end(self.failed.unwrap_or(0), None);
            }
        } else if !survivors && self.trained {
            self.end(code, Some("no worker is left".to_owned()));
        } else {
            self.fill(now);
        }
    }

    /// A worker cannot be started at all: that is nothing that time would heal.
    pub fn refused(&mut self, worker: Worker, code: i32, why: String) {
        self.workers.remove(&worker);
        self.end(code, Some(why));
    }

    /// Whether a host is left alone.
    fn cools(&self, host: &str, now: Instant) -> bool {
        self.failures.get(host).is_some_and(|failures| failures.until.is_some_and(|until| now < until))
    }

    /// For how many seconds no worker is started on a host.
    fn pause(&self, host: &str, now: Instant) -> f64 {
        let until = self.failures.get(host).and_then(|failures| failures.until);
        until.map_or(0.0, |until| until.duration_since(now).as_secs_f64())
    }

    fn cool(&mut self, host: &str, now: Instant) {
        if self.cools(host, now) {
            // Of the same failure, most likely: nobody was started there since.
            return;
        }
        let (least, most) = self.terms.cooldown;
        let before = self.failures.get(host).filter(|failures| now < failures.at + 2 * most);
        let in_a_row = before.map_or(0, |failures| failures.in_a_row);
        let doubled = least.saturating_mul(1u32.checked_shl(in_a_row).unwrap_or(u32::MAX)).min(most);
        // So that hosts that failed together do not come back together.
        let pause = (doubled + least.mul_f64(self.fraction())).min(most);
        let until = Some(now + pause);
        self.failures
            .insert(host.to_owned(), Failures { in_a_row: in_a_row.saturating_add(1), at: now, until });
    }

    fn fraction(&mut self) -> f64 {
        // xorshift64
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) as f64 / (1u64 << 53) as f64
    }

    fn end(&mut self, code: i32, why: Option<String>) {
        if !std::mem::replace(&mut self.over, true) {
            self.steps.push_back(Step::End { code, why });
        }
    }

    /// When [`Plan::expire`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        if self.over {
            return None;
        }
        let cooled = self.failures.values().filter_map(|failures| failures.until).filter(|_| !self.closing);
        let short = self.short_since.map(|since| since + self.terms.timeout);
        cooled.chain(short).chain(self.farewells.values().copied()).min()
    }

    /// Lets time pass.
    pub fn expire(&mut self, now: Instant) {
        if self.deadline().is_none_or(|at| now < at) {
            return;
        }
        // Cooled down; how often a host has failed is remembered.
        let cooled = self.failures.values_mut().filter(|failures| failures.until.is_some_and(|at| at <= now));
        cooled.for_each(|failures| failures.until = None);
        let late: Vec<Worker> =
            self.farewells.iter().filter(|(_, at)| **at <= now).map(|(w, _)| *w).collect();
        for worker in late {
            self.farewells.remove(&worker);
            self.steps.push_back(Step::Kill(worker));
        }
        self.fill(now);
        if self.short_since.is_some_and(|since| now >= since + self.terms.timeout) {
            let (found, wanted) = (self.slots.iter().map(|(_, slots)| slots).sum::<u32>(), self.terms.min);
            self.end(
                self.failed.unwrap_or(1),
                Some(format!(
                    "there were too few slots for {} s: {found} were found, and at least {} are needed; see what the \
                     host discovery says, or allow more time (--elastic-timeout)",
                    self.terms.timeout.as_secs_f64(),
                    if self.trained { wanted } else { self.terms.first }
                )),
            );
        }
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
