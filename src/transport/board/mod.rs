//! Boards: collectives within a host through memory that all members map, without messages.
//!
//! Each rank owns a board with a few *seats*; a process set that lives on one host takes a seat on the board of
//! each of its members. A seat has slots, which its owner fills in turn, and two counters that its owner writes
//! and everybody reads. Work goes in *ticks*, in the same order on all members; one tick moves one window:
//!
//! 1. *post*: the owner copies what the others need of it into its slot, and counts `posted`;
//! 2. *take*: when all have posted, each member takes its share out of the others' slots. Where something is
//!    reduced it reduces its own part of the vector, out of all slots at once, in member order (the canonical
//!    tree, one rounding), and writes the result both to its output and **into the slots that the operands lay
//!    in**. It counts `taken`;
//! 3. *settle*: when all have taken, the owner copies the results out of its own slot, which is then free again.
//!
//! Stages of neighbouring ticks overlap, and batches follow each other without a pause. Nothing of a user's
//! memory is written before all members are seen to have entered the batch.
//!
//! Why the result goes where the operand lay: a line that a core has just read is cheap for it to write, while a
//! line of its own that another core has read last is not (it must be asked back). Measured with two ranks and
//! 64 KiB: 6.5 us, against 22 us with the results in other lines, and 8.6 us for whole windows (benches/README.md).
//!
//! Where the tensors of all members lie in the arenas of their boards ([`BoardMemory::find`]), nothing is posted and
//! nothing settled: the members reduce them where they are (`lent`).
//!
//! Small collectives that repeat need no seat's turn: each has a *niche* on all boards ([`Niche`]).
//!
//! Tensors on devices go from device to device, with boards for the counters only: [`device`].
//!
//! A board is a star of single-writer words: every counter has one writer, and what a peer writes is copied out
//! through an atomic and held against what is possible before it is believed.

mod arena;
pub mod device;
mod exchange;
mod lent;
mod memory;
mod niche;
#[cfg(test)]
mod tests;

pub use arena::Block;
pub use exchange::{AREA_UNIT, Back, Exchange, Part, Place, Share};
pub use memory::{BOARD_BYTES, BoardMemory};
pub use niche::{Niche, Progress, Room, Shown};

use crate::error::Cause;
use crate::limits::BOARD_SLOTS;
use crate::memory::{Memory, RunId};
use exchange::Job;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Windows that are moved in one call: then the links get their turn.
const STEPS_PER_CALL: usize = 16;

/// A process set at its boards: a machine that is told what to exchange and moves what can be moved.
#[derive(Debug)]
pub struct Seat {
    me: usize,
    /// By member.
    places: Vec<Place>,
    jobs: VecDeque<Job>,
    spare: Vec<Job>,
    /// Ticks of all jobs so far.
    end: u64,
    posting: Stage,
    taking: Stage,
    settling: Stage,
    /// The least that all others have posted and taken, when last looked at.
    posted_seen: u64,
    taken_seen: u64,
    /// Whether a counter has moved that a sleeping peer may wait for.
    published: bool,
}

/// How far a stage has come.
#[derive(Clone, Copy, Default, Debug)]
struct Stage {
    /// Ticks done.
    done: u64,
    /// The job of the next tick.
    job: usize,
}

/// Which member broke the protocol, and how.
pub type Blame = (usize, Cause);

impl Seat {
    /// The seats of a set's members, in member order; `me` is this one.
    #[must_use]
    pub fn new(me: usize, places: Vec<Place>) -> Seat {
        assert!(places.len() > 1 && me < places.len(), "a set at its boards has several members");
        Seat {
            me,
            places,
            jobs: VecDeque::new(),
            spare: Vec::new(),
            end: 0,
            posting: Stage::default(),
            taking: Stage::default(),
            settling: Stage::default(),
            posted_seen: 0,
            taken_seen: 0,
            published: false,
        }
    }

    /// The boards and seats of the members.
    #[must_use]
    pub fn places(&self) -> &[Place] {
        &self.places
    }

    /// Takes the next batch. All members take the same batches in the same order.
    pub fn push(&mut self, run: RunId, exchange: &Arc<Exchange>) {
        assert!(exchange.ticks > 0, "a batch without bytes is complete by itself");
        let job = match self.spare.pop() {
            Some(mut job) => {
                job.renew(run, Arc::clone(exchange), self.end);
                job
            }
            None => Job::new(run, Arc::clone(exchange), self.end),
        };
        self.jobs.push_back(job);
        self.end += exchange.ticks;
    }

    /// Whether nothing is under way.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Whether all members are seen to have begun with the oldest batch.
    #[must_use]
    pub fn is_entered(&self) -> bool {
        self.jobs.front().is_some_and(|job| self.posted_seen > job.first)
    }

    /// Moves what can be moved, and appends the batches that are complete. Says whether anything moved.
    pub fn progress(&mut self, memory: &Memory, complete: &mut Vec<RunId>) -> Result<bool, Blame> {
        let mut moved = false;
        for _ in 0..STEPS_PER_CALL {
            if self.jobs.is_empty() {
                break;
            }
            self.look()?;
            // The oldest first: what it frees lets the others go on.
            let mut any = self.settle(memory, complete);
            any |= self.take(memory)?;
            any |= self.post(memory);
            if !any {
                break;
            }
            moved = true;
        }
        Ok(moved)
    }

    /// Nobody posts any more, and whoever may still live does nothing for others: completes the batches that all have
    /// done their part of, and appends them. Does nothing for others either, so that all find the same.
    pub fn finish(&mut self, memory: &Memory, complete: &mut Vec<RunId>) {
        // Of one that does not keep to the rules nothing is taken.
        while !self.jobs.is_empty() && self.look().is_ok() {
            let mut any = self.settle(memory, complete);
            if self.jobs.get(self.taking.job).is_some_and(|job| !job.returns()) {
                any |= self.take(memory).is_ok_and(|any| any);
            }
            if !any {
                break;
            }
        }
    }

    /// Whether counters have moved since the last call; then sleeping peers must be woken.
    pub fn take_published(&mut self) -> bool {
        std::mem::take(&mut self.published)
    }

    /// Whether a peer has counted since this side last looked: then there may be something to do.
    #[must_use]
    pub fn has_news(&self) -> bool {
        let (posted, taken) = self.least();
        !self.jobs.is_empty() && (posted != self.posted_seen || taken != self.taken_seen)
    }

    /// Members that have not begun with what this one waits for.
    pub fn missing(&self) -> impl Iterator<Item = usize> {
        let awaited = self.jobs.front().map_or(0, |job| job.first + 1);
        self.others()
            .filter(move |(_, place)| place.posted().load(Ordering::Acquire) < awaited)
            .map(|(member, _)| member)
    }

    /// Whether a member has not done its part of all batches so far.
    #[must_use]
    pub fn needs(&self, member: usize) -> bool {
        let place = &self.places[member];
        !self.jobs.is_empty()
            && place.posted().load(Ordering::Acquire).min(place.taken().load(Ordering::Acquire)) < self.end
    }

    fn others(&self) -> impl Iterator<Item = (usize, &Place)> {
        self.places.iter().enumerate().filter(|(member, _)| *member != self.me)
    }

    fn least(&self) -> (u64, u64) {
        self.others().fold((u64::MAX, u64::MAX), |(posted, taken), (_, place)| {
            let one = place.posted().load(Ordering::Acquire);
            let other = place.taken().load(Ordering::Acquire);
            (posted.min(one), taken.min(other))
        })
    }

    /// Reads the others' counters. Each is copied out first, then held against what is possible: a member posts
    /// only into slots that are free, and takes only what this one has posted.
    fn look(&mut self) -> Result<(), Blame> {
        let (mut posted, mut taken) = (u64::MAX, u64::MAX);
        for (member, place) in self.others() {
            let one = place.posted().load(Ordering::Acquire);
            let other = place.taken().load(Ordering::Acquire);
            if one > self.taking.done + BOARD_SLOTS as u64 || other > self.posting.done {
                let cause =
                    Cause::Misbehaved(format!("impossible counters on its board ({one} and {other})"));
                return Err((member, cause));
            }
            (posted, taken) = (posted.min(one), taken.min(other));
        }
        (self.posted_seen, self.taken_seen) = (posted, taken);
        Ok(())
    }

    /// Fills the next slot, if it is free.
    fn post(&mut self, memory: &Memory) -> bool {
        let tick = self.posting.done;
        let free = tick < self.taken_seen.min(self.settling.done) + BOARD_SLOTS as u64;
        if tick == self.end || !free {
            return false;
        }
        let job = &mut self.jobs[self.posting.job];
        if job.awaits_cards(tick, self.taking.done) {
            return false;
        }
        let place = &self.places[self.me];
        job.post(tick, self.me, place, memory);
        self.posting.advance(job);
        place.posted().store(self.posting.done, Ordering::Release);
        self.published = true;
        true
    }

    /// Takes this member's share of the next tick that all have posted.
    fn take(&mut self, memory: &Memory) -> Result<bool, Blame> {
        let tick = self.taking.done;
        if tick >= self.posted_seen.min(self.posting.done) {
            return Ok(false);
        }
        let job = &mut self.jobs[self.taking.job];
        job.take(tick, self.me, &self.places, memory)?;
        self.taking.advance(job);
        let place = &self.places[self.me];
        place.taken().store(self.taking.done, Ordering::Release);
        self.published = true;
        Ok(true)
    }

    /// Copies the results of the next tick out, once all have taken their share of it.
    fn settle(&mut self, memory: &Memory, complete: &mut Vec<RunId>) -> bool {
        let tick = self.settling.done;
        let Some(job) = self.jobs.front_mut() else { return false };
        let awaited = if job.returns() { self.taken_seen.min(self.taking.done) } else { self.taking.done };
        if tick >= awaited {
            return false;
        }
        job.settle(tick, self.me, &self.places[self.me], memory);
        self.settling.done += 1;
        if self.settling.done == job.first + job.exchange.ticks {
            complete.push(job.run);
            let job = self.jobs.pop_front().expect("it was just looked at");
            self.spare.push(job);
            self.posting.job -= 1;
            self.taking.job -= 1;
        }
        true
    }
}

impl Stage {
    fn advance(&mut self, job: &Job) {
        self.done += 1;
        self.job += usize::from(self.done == job.first + job.exchange.ticks);
    }
}
