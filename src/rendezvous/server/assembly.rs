//! Who has come for the next epoch, where ranks come and go: the workers of an elastic job at the launcher's service,
//! or the ranks of one epoch among themselves. Without sockets; the time is an argument.
//!
//! A *worker* is a process, known by a number that no other process of the job ever has; among themselves ranks are
//! known by their ranks. An epoch's ranks are its workers in order: those that go on keep their order, and
//! new ones follow in order of their numbers.
#![forbid(unsafe_code)]

use super::rounds::{Number, Verdict, contradiction};
use crate::membership::regroup::{Authority, Decision, Regroup, Rules};
use crate::rendezvous::card::{Answer, Card, Knob, News, Registration, Table};
use crate::rendezvous::past::{Past, Sets};
use crate::rendezvous::place::Hints;
use crate::rendezvous::secret::JobId;
use crate::types::{Epoch, Rank, Time};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

/// What a worker is known by.
pub type Worker = u32;

/// How an assembly behaves.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Who allows to go on without ranks that may be alive.
    pub authority: Authority,
    /// The fewest ranks of an epoch.
    pub min: u32,
    /// How long a rank that lives is waited for.
    pub patience: Duration,
    /// How long those who are there wait for so many that there are enough.
    pub shortage: Duration,
}

/// What has happened, for the launcher.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// An epoch has begun.
    Formed {
        /// Its number.
        epoch: Epoch,
        /// The worker of each rank.
        workers: Vec<Worker>,
    },
    /// These took part in the epoch before and may be alive, but the others have gone on without them.
    Excluded(Vec<Worker>),
    /// There will be no epoch: too few came for too long.
    TooFew {
        /// How many came.
        here: u32,
    },
}

/// Who has come for the next epoch.
pub struct Assembly {
    job: JobId,
    terms: Terms,
    origin: Instant,
    /// The last epoch and the worker of each of its ranks.
    epoch: Option<Epoch>,
    members: Vec<Worker>,
    cards: Vec<Card>,
    knobs: Vec<Knob>,
    regroup: Regroup,
    here: BTreeMap<Worker, Arrival>,
    /// Workers that were started and have not come yet.
    expected: BTreeSet<Worker>,
    /// Ranks that have said goodbye. They may have done so in order to come here, so they are waited for as long as
    /// their doors are open.
    goodbyes: BTreeSet<Rank>,
    /// Workers that are to leave.
    dismissed: BTreeSet<Worker>,
    /// When there began to be too few.
    short_since: Option<Instant>,
    /// When the first came for the first epoch.
    opened: Option<Instant>,
    events: VecDeque<Event>,
}

struct Arrival {
    number: Number,
    registration: Registration,
}

impl Assembly {
    /// Nobody has come yet. `last`: the epoch whose ranks meet; none before the first.
    pub fn new(job: JobId, terms: Terms, last: Option<&Table>) -> Assembly {
        let mut assembly = Assembly {
            job,
            terms,
            origin: Instant::now(),
            epoch: None,
            members: Vec::new(),
            cards: Vec::new(),
            knobs: Vec::new(),
            regroup: Regroup::new(0, rules(&terms)),
            here: BTreeMap::new(),
            expected: BTreeSet::new(),
            goodbyes: BTreeSet::new(),
            dismissed: BTreeSet::new(),
            short_since: None,
            opened: None,
            events: VecDeque::new(),
        };
        if let Some(table) = last {
            assembly.begin(table, (0..table.cards.len() as u32).collect());
        }
        assembly
    }

    fn begin(&mut self, table: &Table, workers: Vec<Worker>) {
        self.epoch = Some(table.epoch);
        self.regroup = Regroup::new(workers.len() as u32, rules(&self.terms));
        self.members = workers;
        self.cards = table.cards.clone();
        self.knobs = table.knobs.clone();
        self.goodbyes.clear();
        self.short_since = None;
    }

    fn time(&self, at: Instant) -> Time {
        Time(at.saturating_duration_since(self.origin).as_nanos() as u64)
    }

    fn rank_of(&self, worker: Worker) -> Option<Rank> {
        self.members.iter().position(|&member| member == worker).map(|rank| Rank(rank as u32))
    }

    /// A worker was started; it is waited for until it has come or ended.
    pub fn expect(&mut self, worker: Worker) {
        self.expected.insert(worker);
    }

    /// A worker's process has ended.
    pub fn ended(&mut self, worker: Worker, now: Instant) -> Vec<Verdict> {
        self.expected.remove(&worker);
        self.dismissed.remove(&worker);
        self.here.remove(&worker);
        if let Some(rank) = self.rank_of(worker) {
            self.regroup.lost(rank);
            self.regroup.dead(rank);
        }
        self.form(now)
    }

    /// A worker is to leave: it takes part in no later epoch.
    pub fn dismiss(&mut self, worker: Worker) {
        self.dismissed.insert(worker);
    }

    /// What the members of this epoch should know: that others wait, or that some are to leave.
    #[must_use]
    pub fn news(&self) -> News {
        let added = self.here.keys().any(|&worker| self.is_new(worker) && !self.dismissed.contains(&worker));
        News { added, removed: self.members.iter().any(|worker| self.dismissed.contains(worker)) }
    }

    /// Whether this worker takes part in the present epoch and has not come for the next.
    #[must_use]
    pub fn is_away(&self, worker: Worker) -> bool {
        self.rank_of(worker).is_some() && !self.here.contains_key(&worker)
    }

    /// Whether it has not come out of the last epoch.
    fn is_new(&self, worker: Worker) -> bool {
        self.rank_of(worker).is_none()
            || self.here.get(&worker).is_some_and(|arrival| arrival.registration.past.is_none())
    }

    /// A proven worker registers.
    pub fn register(
        &mut self,
        number: Number,
        worker: Worker,
        registration: Registration,
        now: Instant,
    ) -> Vec<Verdict> {
        let tell = |answer| vec![Verdict { to: vec![number], answer }];
        if self.dismissed.contains(&worker) {
            return tell(Answer::Excluded(self.epoch.unwrap_or_default()));
        }
        let rank = self.rank_of(worker);
        match (&registration.past, self.epoch) {
            (Some(past), Some(epoch)) if past.epoch < epoch => return tell(Answer::Excluded(epoch)),
            (Some(past), epoch) if Some(past.epoch) != epoch || Some(past.rank) != rank => {
                return tell(Answer::Refused(format!(
                    "this process was rank {} in epoch {}, of which this rendezvous knows nothing; start the job again",
                    past.rank.0, past.epoch.0
                )));
            }
            (Some(past), _) => {
                let past = past.clone();
                self.regroup.arrived(past.rank, self.time(now));
                self.believe(&past);
            }
            (None, _) => {
                if let Some(why) = self.unfit(&registration) {
                    return tell(Answer::Refused(why));
                }
                if let Some(rank) = rank {
                    // It has left and comes again from the beginning.
                    self.regroup.lost(rank);
                    self.regroup.left(rank);
                }
            }
        }
        self.expected.remove(&worker);
        self.opened.get_or_insert(now);
        self.here.insert(worker, Arrival { number, registration });
        self.form(now)
    }

    /// What a rank knows of the others.
    fn believe(&mut self, past: &Past) {
        past.dead.iter().for_each(|&rank| self.regroup.dead(rank));
        self.goodbyes.extend(&past.left);
        past.silent.iter().for_each(|&rank| self.regroup.suspected(rank));
    }

    /// Why a newcomer does not fit those who are there, so that it alone is refused.
    fn unfit(&self, newcomer: &Registration) -> Option<String> {
        let card = self.cards.first()?;
        let member = Registration { card: card.clone(), size: 0, knobs: self.knobs.clone(), past: None };
        contradiction(&[member, newcomer.clone()])
    }

    /// A connection is gone: its worker is no longer here.
    pub fn forget(&mut self, number: Number) {
        let Some(worker) = self.here.iter().find(|(_, a)| a.number == number).map(|(worker, _)| *worker)
        else {
            return;
        };
        self.here.remove(&worker);
        if let Some(rank) = self.rank_of(worker) {
            self.regroup.lost(rank);
        }
    }

    /// Ranks that are waited for, with their cards: it is to be seen whether they live.
    pub fn awaited(&self) -> impl Iterator<Item = (Rank, &Card)> + '_ {
        let meets = self.regroup.deadline().is_some();
        let awaited = self.regroup.awaited().filter(move |_| meets);
        awaited.map(|rank| (rank, &self.cards[rank.0 as usize]))
    }

    /// Whether `rank` of the epoch whose ranks meet was found to be alive, dead, or silent.
    pub fn found(&mut self, epoch: Epoch, rank: Rank, what: Found, now: Instant) -> Vec<Verdict> {
        if self.epoch != Some(epoch) {
            return Vec::new();
        }
        match what {
            Found::Alive => self.regroup.alive(rank),
            Found::Dead | Found::Silent if self.goodbyes.contains(&rank) => self.regroup.left(rank),
            Found::Dead => self.regroup.dead(rank),
            Found::Silent => self.regroup.suspected(rank),
            Found::GoneOn(theirs) => return self.dissolve(Answer::Excluded(theirs)),
        }
        self.form(now)
    }

    fn dissolve(&mut self, answer: Answer) -> Vec<Verdict> {
        let here = std::mem::take(&mut self.here);
        let to = here.values().map(|arrival| arrival.number).collect();
        for worker in here.into_keys() {
            if let Some(rank) = self.rank_of(worker) {
                self.regroup.lost(rank);
            }
        }
        self.opened = None;
        vec![Verdict { to, answer }]
    }

    /// The last epoch that has begun.
    #[must_use]
    pub fn epoch(&self) -> Option<Epoch> {
        self.epoch
    }

    /// What has happened since the last call.
    pub fn event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When [`Assembly::expire`] has something to do.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let first = self.opened.filter(|_| self.epoch.is_none()).map(|opened| opened + self.terms.patience);
        let next = self.regroup.deadline().map(|at| self.origin + Duration::from_nanos(at.0));
        let next = next.filter(|_| self.short_since.is_none());
        let shortage = self.short_since.map(|since| since + self.terms.shortage);
        let first = first.filter(|_| self.short_since.is_none());
        [first, next, shortage].into_iter().flatten().min()
    }

    /// Lets time pass.
    pub fn expire(&mut self, now: Instant) -> Vec<Verdict> {
        match self.deadline() {
            Some(at) if at <= now => self.form(now),
            _ => Vec::new(),
        }
    }

    /// Begins the next epoch, if those are there who should be.
    fn form(&mut self, now: Instant) -> Vec<Verdict> {
        let old = match self.epoch {
            None => {
                let late = self.opened.is_some_and(|opened| now >= opened + self.terms.patience);
                if self.here.is_empty() || !(self.expected.is_empty() || late) {
                    return Vec::new();
                }
                Vec::new()
            }
            Some(_) => match self.regroup.decide(self.time(now)) {
                Decision::Wait => return Vec::new(),
                Decision::Minority { here, of } => return self.dissolve(Answer::Minority { here, of }),
                Decision::Form(ranks) => ranks.iter().map(|rank| self.members[rank.0 as usize]).collect(),
            },
        };
        let stays = |worker: &Worker| self.here.contains_key(worker) && !self.dismissed.contains(worker);
        let mut workers: Vec<Worker> = old.into_iter().filter(stays).collect();
        let new = self.here.keys().copied().filter(|&worker| self.is_new(worker));
        let new: Vec<Worker> = new.filter(|worker| !workers.contains(worker)).filter(stays).collect();
        workers.extend(new);
        if (workers.len() as u32) < self.terms.min.max(1) {
            return self.fall_short(workers.len() as u32, now);
        }
        self.complete(workers)
    }

    /// Too few are here.
    fn fall_short(&mut self, here: u32, now: Instant) -> Vec<Verdict> {
        let since = *self.short_since.get_or_insert(now);
        if now < since + self.terms.shortage {
            return Vec::new();
        }
        self.events.push_back(Event::TooFew { here });
        self.dissolve(Answer::Refused(format!(
            "{here} processes have come together for {} s, and at least {} are needed (--min-np); see whether hosts \
             have failed, or allow more time (--elastic-timeout)",
            self.terms.shortage.as_secs_f64(),
            self.terms.min
        )))
    }

    fn complete(&mut self, workers: Vec<Worker>) -> Vec<Verdict> {
        let here = |worker: &Worker| &self.here[worker];
        let registrations: Vec<Registration> =
            workers.iter().map(|worker| here(worker).registration.clone()).collect();
        if let Some(reason) = contradiction(&registrations) {
            return self.dissolve(Answer::Refused(reason));
        }
        let to = workers.iter().map(|worker| here(worker).number).collect();
        let cards = registrations.iter().enumerate().map(|(rank, r)| Card {
            rank: Rank(rank as u32),
            // They told the places of the first epoch.
            hints: if self.epoch.is_some() { Hints::default() } else { r.card.hints },
            ..r.card.clone()
        });
        let pasts = registrations.iter().filter_map(|r| r.past.as_ref());
        let renumber = |rank: Rank| {
            let worker = self.members.get(rank.0 as usize)?;
            workers.iter().position(|w| w == worker).map(|rank| Rank(rank as u32))
        };
        let table = Table {
            epoch: Epoch(self.epoch.map_or(0, |epoch| epoch.0 + 1)),
            job: self.job,
            simd: registrations.iter().map(|r| r.card.simd).min().unwrap_or(0),
            knobs: registrations[0].knobs.clone(),
            sets: Sets::settled(pasts.map(|past| &past.sets), renumber),
            cards: cards.collect(),
        };
        let excluded: Vec<Worker> = self.members.iter().copied().filter(|w| !workers.contains(w)).collect();
        if !excluded.is_empty() {
            self.events.push_back(Event::Excluded(excluded));
        }
        self.events.push_back(Event::Formed { epoch: table.epoch, workers: workers.clone() });
        workers.iter().for_each(|worker| drop(self.here.remove(worker)));
        let mut verdicts = Vec::new();
        if self.here.keys().any(|worker| self.dismissed.contains(worker)) {
            verdicts.extend(self.dissolve(Answer::Excluded(table.epoch)));
        }
        self.begin(&table, workers);
        verdicts.push(Verdict { to, answer: Answer::Table(table) });
        verdicts
    }
}

/// What was found out about a rank that is waited for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    /// It answers.
    Alive,
    /// Its process has ended.
    Dead,
    /// It does not answer.
    Silent,
    /// It has gone on in this epoch, with others.
    GoneOn(Epoch),
}

fn rules(terms: &Terms) -> Rules {
    Rules { authority: terms.authority, patience_ns: terms.patience.as_nanos() as u64 }
}

#[cfg(test)]
#[path = "assembly_tests.rs"]
mod tests;
