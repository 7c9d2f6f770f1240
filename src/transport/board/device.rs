//! Collectives of tensors on devices, within a host: every rank's kernels read the memory that the others have opened
//! to it, and boards carry the counters.
//!
//! Each member of a set that is seated so has *slots* in the memory of its device. Only their owner writes them; the
//! others' kernels read them. Work goes in ticks as on boards, each of which moves one window in three stages. A
//! stage is an order on the member's own stream, which the host gives when all members are seen to have come past the
//! stage before; no kernel waits for another process:
//!
//! 1. *pack*: what the others need of the window is copied into the own slot;
//! 2. *reduce*: when all have packed, each member reduces its own part of the vector out of all slots at once, in
//!    member order, into its own slot (only where everybody wants the result);
//! 3. *gather*: when all have reduced (or packed, where nothing is reduced), each member takes out of all slots what
//!    its output lacks. A slot is filled anew when all have done that.
//!
//! A batch is complete when its last gather has been given to the stream: whoever uses the result waits for the mark
//! behind it. A member that dies leaves the others with orders that end by themselves.
#![forbid(unsafe_code)]

use super::Blame;
use super::exchange::Place;
use super::memory::LINE_BYTES;
use crate::device::accelerator::{Mark, OFFER_WORDS, Offer, Peers};
use crate::device::{DeviceOrder, Token};
use crate::error::Cause;
use crate::limits::DEVICE_SLOTS;
use crate::memory::{Memory, Region, RunId};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Stages of a tick.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// What the others need is in the owner's slot.
    Packed,
    /// The owner's part of the vector is reduced.
    Reduced,
    /// The owner needs nothing more of the others' slots.
    Taken,
}

/// All stages, in their order.
const STAGES: [Stage; 3] = [Stage::Packed, Stage::Reduced, Stage::Taken];
/// Orders that are given in one call: then the links get their turn.
const ORDERS_PER_CALL: usize = 32;

/// The line of a seat that says what its owner offers of its device; the first word says whether it does.
const OFFER_LINE: usize = STAGES.len();
const _: () = assert!(OFFER_WORDS < LINE_BYTES / 8);

impl Place {
    /// Ticks of the owner's device that have come past a stage.
    fn device_ticks(&self, stage: Stage) -> &AtomicU64 {
        self.device_word(stage as usize, 0)
    }

    /// The owner says how its device's memory is opened.
    fn make_offer(&self, offer: &Offer) {
        for (at, word) in offer.0.iter().enumerate() {
            self.device_word(OFFER_LINE, 1 + at).store(*word, Ordering::Relaxed);
        }
        self.device_word(OFFER_LINE, 0).store(1, Ordering::Release);
    }

    /// How the owner's device memory is opened, once it has said so.
    fn offer(&self) -> Option<Offer> {
        let word = |at| self.device_word(OFFER_LINE, at);
        let made = word(0).load(Ordering::Acquire) == 1;
        made.then(|| Offer(std::array::from_fn(|at| word(1 + at).load(Ordering::Relaxed))))
    }
}

/// The orders of one tick, by stage.
pub type Tick = [Option<DeviceOrder>; 3];

/// One batch, as a member carries it out. Its run has the regions of [`DeviceSeat::regions`] behind its tensors'.
#[derive(Debug)]
pub struct Rounds {
    /// The same number on all members.
    pub ticks: Vec<Tick>,
    /// Whether results lie in slots after the second stage; the same on all members.
    pub reduces: bool,
}

/// The region of a member's slot in the run of a batch of `tensors`, for a tick of the batch.
#[must_use]
pub fn slot_region(tensors: usize, member: usize, tick: usize) -> u32 {
    (2 * tensors + member * DEVICE_SLOTS + tick % DEVICE_SLOTS) as u32
}

#[derive(Debug)]
struct Job {
    run: RunId,
    rounds: Arc<Rounds>,
    /// The number of its first tick.
    first: u64,
}

/// How far a stage has come here.
#[derive(Clone, Copy, Default, Debug)]
struct Progress {
    /// Ticks whose order was given.
    given: u64,
    /// Ticks whose order is over.
    over: u64,
    /// The job of the next tick to be given.
    job: usize,
}

/// A process set whose members have opened their devices' memory to each other.
pub struct DeviceSeat {
    me: usize,
    /// By member.
    places: Vec<Place>,
    slot_bytes: u64,
    peers: Box<dyn Peers>,
    /// Each member's slots, as far as they are open.
    slots: Vec<Option<Region>>,
    jobs: VecDeque<Job>,
    /// Ticks of all jobs so far.
    end: u64,
    stages: [Progress; 3],
    /// The least that all others have come past, when last looked at.
    seen: [u64; 3],
    /// Orders that were given: their stage, and whether they are over. The first has the number `under_way_from`.
    under_way: VecDeque<(usize, bool)>,
    under_way_from: u32,
    done: Vec<Token>,
    published: bool,
}

impl Drop for DeviceSeat {
    fn drop(&mut self) {
        // A member that lags behind may still read this one's slots, and take what it finds for the result.
        if self.least(Stage::Taken) < self.end {
            self.peers.retire();
        }
    }
}

impl std::fmt::Debug for DeviceSeat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a seat at devices, at {:?} of {} ticks", self.stages, self.end)
    }
}

impl DeviceSeat {
    /// Offers the others the memory of `peers`, which has [`DEVICE_SLOTS`] slots of `slot_bytes`. The seats of the set's
    /// members come in member order; `me` is this one.
    #[must_use]
    pub fn new(me: usize, places: Vec<Place>, slot_bytes: u64, peers: Box<dyn Peers>) -> DeviceSeat {
        let own = peers.own();
        assert!(own.len() == slot_bytes * DEVICE_SLOTS as u64, "slots fill the memory");
        places[me].make_offer(&peers.offer());
        let mut slots = vec![None; places.len()];
        slots[me] = Some(own);
        DeviceSeat {
            me,
            places,
            slot_bytes,
            peers,
            slots,
            jobs: VecDeque::new(),
            end: 0,
            stages: Default::default(),
            seen: [0; 3],
            under_way: VecDeque::new(),
            under_way_from: 0,
            done: Vec::new(),
            published: false,
        }
    }

    /// Opens what the others have offered so far; whether that is all.
    pub fn open(&mut self) -> Result<bool, Cause> {
        for (slot, place) in self.slots.iter_mut().zip(&self.places) {
            if slot.is_some() {
                continue;
            }
            let Some(offer) = place.offer() else { return Ok(false) };
            let region = self.peers.open(&offer)?;
            if region.len() != self.slot_bytes * DEVICE_SLOTS as u64 {
                return Err(Cause::Misbehaved(format!("{} bytes of slots", region.len())));
            }
            *slot = Some(region);
        }
        Ok(true)
    }

    /// Where the slots of all members are for the next batch: see [`slot_region`].
    pub fn regions(&self, part: impl Fn(Region, u64, u64) -> Region, into: &mut Vec<Region>) {
        for slots in &self.slots {
            let slots = slots.expect("the seat was taken when all slots were open");
            for tick in self.end..self.end + DEVICE_SLOTS as u64 {
                into.push(part(slots, tick % DEVICE_SLOTS as u64 * self.slot_bytes, self.slot_bytes));
            }
        }
    }

    /// Takes the next batch. All members take the same batches in the same order.
    pub fn push(&mut self, run: RunId, rounds: &Arc<Rounds>) {
        assert!(!rounds.ticks.is_empty(), "a batch without bytes is complete by itself");
        self.jobs.push_back(Job { run, rounds: Arc::clone(rounds), first: self.end });
        self.end += rounds.ticks.len() as u64;
    }

    /// Whether nothing is under way.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.jobs.is_empty() && self.under_way.is_empty()
    }

    /// Whether counters have moved since the last call; then sleeping peers must be woken.
    pub fn take_published(&mut self) -> bool {
        std::mem::take(&mut self.published)
    }

    /// Whether a peer has counted since this side last looked: then there may be something to do.
    #[must_use]
    pub fn has_news(&self) -> bool {
        !self.jobs.is_empty() && STAGES.iter().any(|&stage| self.least(stage) != self.seen[stage as usize])
    }

    /// Gives what orders can be given, and appends the batches that are complete, each with the mark behind its
    /// results. Says whether anything moved.
    pub fn progress(&mut self, memory: &Memory, complete: &mut Vec<(RunId, Mark)>) -> Result<bool, Blame> {
        let mut moved = self.collect()?;
        self.look()?;
        for _ in 0..ORDERS_PER_CALL {
            // The last stage first: what it frees lets the others go on.
            let Some(&stage) = STAGES.iter().rev().find(|&&stage| self.may_give(stage)) else { break };
            self.give(stage, memory, complete)?;
            moved = true;
        }
        Ok(moved)
    }

    /// Counts what is over.
    fn collect(&mut self) -> Result<bool, Blame> {
        if self.under_way.is_empty() {
            return Ok(false);
        }
        self.peers.progress(&mut self.done).map_err(|cause| (self.me, cause))?;
        for token in self.done.drain(..) {
            let at = token.step.wrapping_sub(self.under_way_from) as usize;
            self.under_way[at].1 = true;
        }
        let mut moved = false;
        while let Some((stage, true)) = self.under_way.front().copied() {
            self.under_way.pop_front();
            self.under_way_from = self.under_way_from.wrapping_add(1);
            self.stages[stage].over += 1;
            self.places[self.me]
                .device_ticks(STAGES[stage])
                .store(self.stages[stage].over, Ordering::Release);
            self.published = true;
            moved = true;
        }
        Ok(moved)
    }

    fn others(&self) -> impl Iterator<Item = (usize, &Place)> {
        self.places.iter().enumerate().filter(|(member, _)| *member != self.me)
    }

    fn least(&self, stage: Stage) -> u64 {
        let ticks = |(_, place): (usize, &Place)| place.device_ticks(stage).load(Ordering::Acquire);
        self.others().map(ticks).min().unwrap_or(u64::MAX)
    }

    /// Reads the others' counters. Each is copied out first, then held against what is possible: a member packs only
    /// into slots that this one has taken from, and goes on only when this one has packed.
    fn look(&mut self) -> Result<(), Blame> {
        let packed = self.stages[Stage::Packed as usize].over;
        let taken = self.stages[Stage::Taken as usize].over;
        for stage in STAGES {
            let most = if stage == Stage::Packed { taken + DEVICE_SLOTS as u64 } else { packed };
            let mut least = u64::MAX;
            for (member, place) in self.others() {
                let ticks = place.device_ticks(stage).load(Ordering::Acquire);
                if ticks > most {
                    let cause =
                        Cause::Misbehaved(format!("an impossible counter on its board ({stage:?} {ticks})"));
                    return Err((member, cause));
                }
                least = least.min(ticks);
            }
            self.seen[stage as usize] = least;
        }
        Ok(())
    }

    /// Whether the next order of a stage can be given.
    fn may_give(&self, stage: Stage) -> bool {
        let Progress { given: tick, job, .. } = self.stages[stage as usize];
        let [packed, reduced, taken] = self.stages.map(|stage| stage.given);
        match stage {
            // Own orders follow one another on the stream; the others' must be over.
            Stage::Packed => {
                tick < self.end && tick < self.seen[Stage::Taken as usize].min(taken) + DEVICE_SLOTS as u64
            }
            Stage::Reduced => tick < packed && tick < self.seen[Stage::Packed as usize],
            Stage::Taken => {
                let after = |job: &Job| if job.rounds.reduces { Stage::Reduced } else { Stage::Packed };
                tick < reduced && self.jobs.get(job).is_some_and(|job| tick < self.seen[after(job) as usize])
            }
        }
    }

    fn give(
        &mut self,
        stage: Stage,
        memory: &Memory,
        complete: &mut Vec<(RunId, Mark)>,
    ) -> Result<(), Blame> {
        let mine = |cause| (self.me, cause);
        let progress = &mut self.stages[stage as usize];
        let job = &self.jobs[progress.job];
        let (run, rounds, last) =
            (job.run, Arc::clone(&job.rounds), job.first + job.rounds.ticks.len() as u64);
        let tick = &rounds.ticks[(progress.given - job.first) as usize];
        let over = match &tick[stage as usize] {
            None => true,
            Some(order) => {
                let step = self.under_way_from.wrapping_add(self.under_way.len() as u32);
                self.peers.post(Token { run, window: 0, step }, order, memory).map_err(mine)?
            }
        };
        self.under_way.push_back((stage as usize, over));
        progress.given += 1;
        if progress.given == last {
            progress.job += 1;
            if stage == Stage::Taken {
                complete.push((run, self.peers.mark().map_err(mine)?));
                self.jobs.pop_front();
                self.stages.iter_mut().for_each(|stage| stage.job -= 1);
            }
        }
        Ok(())
    }
}
