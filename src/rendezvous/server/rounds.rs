//! Who has registered for which epoch, and what everybody is to be told. Without sockets; the time is an
//! argument.
#![forbid(unsafe_code)]

use super::{disagreement, name_ranks};
use crate::rendezvous::card::{Answer, Registration, Table};
use crate::rendezvous::past::Sets;
use crate::rendezvous::secret::JobId;
use crate::types::Epoch;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

/// Epochs that collect ranks at one time: those of ranks that were restarted, besides the current one.
const ROUNDS_MAX: usize = 8;
/// Connections that failed their proof, remembered for the error about missing ranks.
const FAILURES_MAX: usize = 4;

/// What a connection is known by.
pub type Number = u64;

/// All rounds of a service.
pub struct Rounds {
    size: u32,
    job: JobId,
    start_timeout: Duration,
    open: BTreeMap<u32, Round>,
    /// Epochs below this have begun, or are too old.
    next: u32,
    /// A round that failed for missing ranks, and those, so that a late one learns at once what happened.
    failed: Option<(u32, String, BTreeSet<u32>)>,
    /// Why connections failed, for the error about missing ranks.
    failures: VecDeque<String>,
}

struct Round {
    deadline: Instant,
    ranks: BTreeMap<u32, (Number, Registration)>,
}

/// To be sent to these connections.
#[derive(Debug)]
pub struct Verdict {
    /// Whom to tell.
    pub to: Vec<Number>,
    /// What.
    pub answer: Answer,
}

impl Rounds {
    /// No rank has registered.
    pub fn new(size: u32, job: JobId, first: Epoch, start_timeout: Duration) -> Rounds {
        Rounds {
            size,
            job,
            start_timeout,
            open: BTreeMap::new(),
            next: first.0,
            failed: None,
            failures: VecDeque::new(),
        }
    }

    /// A connection failed before it was proven.
    pub fn note_failure(&mut self, what: String) {
        if self.failures.len() == FAILURES_MAX {
            self.failures.pop_front();
        }
        self.failures.push_back(what);
    }

    /// Whether an epoch has begun at or after the first.
    pub fn has_begun(&self, first: Epoch) -> bool {
        self.next > first.0
    }

    /// A proven rank registers. `alive` tells whether a connection still stands.
    pub fn register(
        &mut self,
        number: Number,
        epoch: Epoch,
        registration: Registration,
        now: Instant,
        alive: impl Fn(Number) -> bool,
    ) -> Option<Verdict> {
        let rank = registration.card.rank.0;
        let refuse = |reason: String| Some(Verdict { to: vec![number], answer: Answer::Refused(reason) });
        if registration.size != self.size {
            return refuse(format!(
                "rank {rank} believes that the job has {} ranks, but the rendezvous expects {}; start all with the same size",
                registration.size, self.size
            ));
        }
        if epoch.0 < self.next {
            return refuse(format!(
                "epoch {} of this job has already begun without this process (rank {rank}, process {} on {}): two processes \
                 claim the same rank, or one was restarted; start the whole job again",
                epoch.0, registration.card.pid, registration.card.hostname
            ));
        }
        if let Some((failed, reason, missing)) = &mut self.failed
            && *failed == epoch.0
            && missing.remove(&rank)
        {
            let reason = reason.clone();
            return refuse(reason);
        }
        if !self.open.contains_key(&epoch.0) && self.open.len() == ROUNDS_MAX {
            return refuse(format!(
                "ranks register for more than {ROUNDS_MAX} different epochs; start the job again"
            ));
        }
        let deadline = now + self.start_timeout;
        let round = self.open.entry(epoch.0).or_insert_with(|| Round { deadline, ranks: BTreeMap::new() });
        if let Some((older, there)) = round.ranks.get(&rank)
            && alive(*older)
        {
            return refuse(format!(
                "two processes claim rank {rank}: process {} on {} and process {} on {}; give each process its own \
                 CAROLE_RANK (the first one stays)",
                there.card.pid, there.card.hostname, registration.card.pid, registration.card.hostname
            ));
        }
        round.ranks.insert(rank, (number, registration));
        if round.ranks.len() < self.size as usize {
            return None;
        }
        let round = self.open.remove(&epoch.0).expect("it is there");
        Some(self.complete(epoch, round))
    }

    /// The ranks of the newest epoch that is being waited for.
    pub fn arrived(&self) -> Vec<u32> {
        self.open.last_key_value().map_or_else(Vec::new, |(_, round)| round.ranks.keys().copied().collect())
    }

    /// A connection is gone: its rank is no longer registered.
    pub fn forget(&mut self, number: Number) {
        for round in self.open.values_mut() {
            round.ranks.retain(|_, (theirs, _)| *theirs != number);
        }
        self.open.retain(|_, round| !round.ranks.is_empty());
    }

    /// When [`Rounds::expire`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        self.open.values().map(|round| round.deadline).min()
    }

    /// Refuses the rounds whose time is over, naming the missing ranks.
    pub fn expire(&mut self, now: Instant) -> Vec<Verdict> {
        let late: Vec<u32> = self.open.iter().filter(|(_, r)| r.deadline <= now).map(|(e, _)| *e).collect();
        late.into_iter()
            .map(|epoch| {
                let round = self.open.remove(&epoch).expect("it is there");
                let missing: Vec<u32> = (0..self.size).filter(|rank| !round.ranks.contains_key(rank)).collect();
                let mut reason = format!(
                    "{} of {} did not arrive at the rendezvous within {} s (epoch {epoch}): see whether they were started \
                     and can reach it; CAROLE_START_TIMEOUT_S allows more seconds",
                    name_ranks(&missing),
                    self.size,
                    self.start_timeout.as_secs_f64()
                );
                for failure in &self.failures {
                    reason.push_str("; a connection failed: ");
                    reason.push_str(failure);
                }
                self.failed = Some((epoch, reason.clone(), missing.into_iter().collect()));
                let to = round.ranks.values().map(|(number, _)| *number).collect();
                Verdict { to, answer: Answer::Refused(reason) }
            })
            .collect()
    }

    fn complete(&mut self, epoch: Epoch, round: Round) -> Verdict {
        let to = round.ranks.values().map(|(number, _)| *number).collect();
        let registrations: Vec<Registration> = round.ranks.into_values().map(|(_, r)| r).collect();
        if let Some(reason) = contradiction(&registrations) {
            return Verdict { to, answer: Answer::Refused(reason) };
        }
        self.next = epoch.0 + 1;
        self.failed = None;
        self.failures.clear();
        let knobs = registrations[0].knobs.clone();
        let cards: Vec<_> = registrations.into_iter().map(|r| r.card).collect();
        let simd = cards.iter().map(|card| card.simd).min().unwrap_or(0);
        Verdict {
            to,
            answer: Answer::Table(Table {
                epoch,
                job: self.job,
                cards,
                knobs,
                simd,
                sets: Sets { next: 1, ..Sets::default() },
            }),
        }
    }
}

pub(super) fn contradiction(registrations: &[Registration]) -> Option<String> {
    let first = &registrations[0].card;
    if let Some(other) = registrations.iter().map(|r| &r.card).find(|card| card.build != first.build) {
        return Some(format!(
            "versions differ: rank {} runs {} and rank {} runs {}; install the same version of Carole everywhere",
            first.rank.0, first.build, other.rank.0, other.build
        ));
    }
    let knobs: Vec<_> = registrations.iter().map(|r| (r.card.rank.0, r.knobs.as_slice())).collect();
    disagreement(&knobs)
}

#[cfg(test)]
#[path = "rounds_tests.rs"]
mod tests;
