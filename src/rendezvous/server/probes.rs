//! Whether those who are waited for live: a few threads at a time knock at their doors.
#![forbid(unsafe_code)]

use super::assembly::Found;
use crate::rendezvous::approach::{Caller, Reached};
use crate::rendezvous::card::Card;
use crate::transport::wake::Waker;
use crate::types::{Epoch, Rank};
use crossbeam::channel::{Receiver, Sender, bounded};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Ranks that are looked for at one time.
const AT_ONE_TIME: usize = 16;
/// Most ranks come by themselves within this time; and so long is the pause between two looks at one.
const PAUSE: Duration = Duration::from_millis(100);

/// What was found out about which rank of which epoch.
type Result = (Epoch, Rank, Found);

/// Who is looked for.
pub struct Probes {
    caller: Caller,
    bell: Waker,
    results: (Sender<Result>, Receiver<Result>),
    /// When each is looked for next; none while a thread does.
    next: BTreeMap<Rank, Option<Instant>>,
    epoch: Epoch,
}

impl Probes {
    /// Nobody is looked for. `bell` is rung when something was found out.
    pub fn new(caller: Caller, bell: Waker) -> Probes {
        let epoch = caller.epoch;
        Probes { caller, bell, results: bounded(AT_ONE_TIME), next: BTreeMap::new(), epoch }
    }

    /// Looks for these, when it is time; the others are forgotten.
    pub fn look<'a>(&mut self, epoch: Epoch, awaited: impl Iterator<Item = (Rank, &'a Card)>, now: Instant) {
        if epoch != self.epoch {
            self.epoch = epoch;
            self.next.retain(|_, at| at.is_none());
        }
        let awaited: BTreeMap<Rank, &Card> = awaited.collect();
        self.next.retain(|rank, at| at.is_none() || awaited.contains_key(rank));
        for (rank, card) in awaited {
            let at = *self.next.entry(rank).or_insert(Some(now + PAUSE));
            let busy = self.next.values().filter(|at| at.is_none()).count();
            if at.is_some_and(|at| at <= now) && busy < AT_ONE_TIME && self.spawn(epoch, rank, card.clone()) {
                self.next.insert(rank, None);
            }
        }
    }

    fn spawn(&self, epoch: Epoch, rank: Rank, card: Card) -> bool {
        let (results, bell) = (self.results.0.clone(), self.bell.clone());
        let caller = Caller { epoch, ..self.caller.clone() };
        let look = move || {
            let found = match caller.approach(&card) {
                Reached::Meeting(_) | Reached::NotYet | Reached::Elsewhere(_) => Found::Alive,
                Reached::GoneOn(epoch) => Found::GoneOn(epoch),
                Reached::Dead => Found::Dead,
                Reached::Silent => Found::Silent,
            };
            // There is room for one result of each thread.
            let _ = results.try_send((epoch, rank, found));
            bell.wake();
        };
        std::thread::Builder::new().name("carole-probe".into()).spawn(look).is_ok()
    }

    /// What was found out since the last call.
    pub fn found(&mut self, now: Instant) -> Option<Result> {
        let found = self.results.1.try_recv().ok()?;
        self.next.insert(found.1, Some(now + PAUSE));
        Some(found)
    }

    /// When [`Probes::look`] has something to do.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.next.values().flatten().min().copied()
    }
}
