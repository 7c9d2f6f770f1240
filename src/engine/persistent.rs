//! Persistent collectives: planned once by all members, started many times (MPI 4.0, section 6.12).
//!
//! A plan is agreed on as every operation is, by its name and signature, so that whoever differs is told. What the
//! members tell each other with it is where on their boards they have taken memory for it. Where all have, the plan
//! gets a [`Channel`], and starts go through that without any agreement; where one could not, or the set spans hosts,
//! there is none, and the runtime starts the collective as an ordinary operation each time.
//!
//! A channel is given back when all members have given it up, which is a call of the engine's own in the agreed log:
//! until then somebody may still read what this member has posted.
#![forbid(unsafe_code)]

use super::calls::Call;
use super::channel::{Activity, Channel, Inner};
use super::{Engine, Submission, batch, boards, operation};
use crate::coordinator::{self, Agreed, OpId};
use crate::error::Error;
use crate::limits::{BOARD_MEMBERS_MAX, BOARD_SLOT_BYTES};
use crate::memory::{Memory, RunId};
use crate::transport::board::{AREA_UNIT, Block, BoardMemory, Exchange, Place, Seat};
use crate::types::{Member, Rank, SetId, Signature, Time};
use std::sync::Arc;

/// The plans of this rank.
#[derive(Default)]
pub(super) struct Plannings {
    /// Plans that wait for the boards of the other members.
    waiting: Vec<Planning>,
    channels: Vec<(SetId, u64, Arc<Channel>)>,
    activity: Arc<Activity>,
}

/// A plan on its way to the coordinator.
struct Planning {
    op: OpId,
    set: SetId,
    name: String,
    hold: bool,
    signature: Signature,
    call: Vec<u64>,
    refused: Option<String>,
}

impl Engine {
    /// Takes a plan: an operation whose name begins with [`PLAN_NAMES`](crate::coordinator::PLAN_NAMES).
    pub(super) fn submit_plan(&mut self, submission: &Submission<'_>, now: Time) {
        let planning = Planning {
            op: submission.op,
            set: submission.set,
            name: submission.name.to_owned(),
            hold: submission.hold,
            signature: submission.signature.clone(),
            call: submission.call.to_vec(),
            refused: submission.refused.map(str::to_owned),
        };
        if self.may_have_channel(submission.set, submission.signature) {
            let ranks = self.set_ranks(submission.set).expect("admitted sets exist");
            for &peer in ranks.iter().filter(|rank| **rank != self.me) {
                self.links.request(peer);
            }
        }
        self.plannings.waiting.push(planning);
        self.turn_plannings(now);
    }

    /// Submits the plans whose members' boards are all there, or will never be.
    pub(super) fn turn_plannings(&mut self, now: Time) -> bool {
        let mut moved = false;
        let mut place = 0;
        while place < self.plannings.waiting.len() {
            let planning = &self.plannings.waiting[place];
            let gone = !self.ops.contains_key(&planning.op);
            let block = match gone {
                true => Some(None),
                false => self.find_block(planning),
            };
            let Some(block) = block else {
                place += 1;
                continue;
            };
            moved = true;
            // In the order of submission: plans without names are told apart by it.
            let planning = self.plannings.waiting.remove(place);
            if !gone {
                self.propose(planning, block, now);
            }
        }
        moved
    }

    fn propose(&mut self, planning: Planning, block: Option<Block>, now: Time) {
        let Planning { op, set, name, hold, signature, mut call, refused } = planning;
        // The last two values of a member's call: whether its tensors lie in shared memory, and where its block does.
        let lends = self.ops.get(&op).is_some_and(|operation| self.lie_in_arena(&operation.tensors));
        call.push(u64::from(lends));
        call.push(block.as_ref().map_or(0, |block| block.at() as u64));
        if let Some(operation) = self.ops.get_mut(&op) {
            operation.block = block;
        }
        let Some(coordinator) = self.coordinator_of(set) else { return };
        let submission = coordinator::Submission {
            op,
            name: &name,
            hold_if_busy: hold,
            signature: &signature,
            call: &call,
            refused: refused.as_deref(),
        };
        match coordinator.submit(submission, now) {
            Ok(()) => coordinator.wait_for(op, now),
            Err(error) => {
                let words = format!("'{}' on {}: {error}", coordinator::shown(&name), self.me);
                self.end(op, Err(Error::usage(words)));
            }
        }
    }

    /// Whether members of such a set can have a channel for such a collective: a function of what is agreed.
    fn may_have_channel(&self, set: SetId, signature: &Signature) -> bool {
        let Some(set) = self.sets.get(&set) else { return false };
        let fits = (2..=BOARD_MEMBERS_MAX).contains(&set.ranks.len())
            && set.hosts.iter().all(|host| *host == set.hosts[0]);
        fits && self.boards_serve(signature)
    }

    /// Memory for a plan on this rank's board: `Some(None)` if it gets no channel, `None` while that is not known.
    fn find_block(&self, planning: &Planning) -> Option<Option<Block>> {
        let own = self.boards.own().filter(|own| own.has_arena());
        let (true, Some(own)) = (self.may_have_channel(planning.set, &planning.signature), own) else {
            return Some(None);
        };
        for &peer in self.sets[&planning.set].ranks.iter().filter(|rank| **rank != self.me) {
            match self.links.board(peer) {
                Some(board) if board.has_arena() => {}
                None if self.links.is_awaited(peer) => return None,
                _ => return Some(None),
            }
        }
        let size = self.sets[&planning.set].size();
        let bytes = Place::block_bytes(slot_bytes(&planning.signature, size));
        // Without memory for it the collective goes the ordinary way.
        Some(Block::take(own, bytes).ok())
    }

    /// A plan stands in the agreed log: its place there is its number, the same on all members of the set.
    pub(super) fn plan_agreed(&mut self, id: SetId, agreed: &Agreed) {
        let Some(set) = self.sets.get_mut(&id) else { return };
        let number = set.plans;
        set.plans += 1;
        let Some(op) = agreed.op else { return };
        let inner = self.make_inner(id, agreed, op);
        let Some(operation) = self.ops.get_mut(&op) else { return };
        operation.outcome.plan = Some(number);
        if let Some((inner, boards)) = inner {
            let ranks = Arc::clone(&self.sets[&id].ranks);
            let activity = Arc::clone(&self.plannings.activity);
            let channel = Arc::new(Channel::new(ranks, boards, inner, activity));
            operation.outcome.channel = Some(Arc::clone(&channel));
            self.plannings.channels.push((id, number, channel));
        }
        self.end(op, Ok(()));
    }

    /// What the channel of an agreed plan works with, and the others' boards; none where a member has no memory for
    /// it.
    fn make_inner(&mut self, id: SetId, agreed: &Agreed, op: OpId) -> Option<(Inner, Vec<Arc<BoardMemory>>)> {
        let mut memory = Memory::default();
        let mut fusion = std::mem::take(&mut self.fusion);
        fusion.fuse_plan(agreed, self.setup.fusion);
        let jobs = fusion
            .batches()
            .filter(|batch| !batch.parts.is_empty())
            .map(|batch| {
                let tensors = batch.parts.iter().map(|part| part.tensor as usize);
                self.plan_batch(id, agreed, op, tensors, &mut memory)
            })
            .collect();
        self.fusion = fusion;
        let operation = self.ops.get_mut(&op).expect("an agreed operation is in flight here");
        let stand_ins = std::mem::take(&mut operation.stand_ins);
        if !stand_ins.is_empty() {
            operation.outcome.tensors.clear();
        }
        let block = operation.block.take()?;
        let set = &self.sets[&id];
        let slot_bytes = slot_bytes(&agreed.signature, set.size());
        let place = |(member, rank): (usize, &Rank)| {
            let board = match *rank == self.me {
                true => Arc::clone(self.boards.own()?),
                false => self.links.board(*rank)?,
            };
            let at = agreed.call.of(Member(member as u32)).last().copied().unwrap_or(0);
            Place::block(board, at, slot_bytes)
        };
        let places: Vec<Place> = set.ranks.iter().enumerate().map(place).collect::<Option<_>>()?;
        let me = set.me() as usize;
        let others = places.iter().enumerate().filter(|(member, _)| *member != me);
        let boards = others.map(|(_, place)| Arc::clone(place.board())).collect();
        Some((Inner::new(Seat::new(me, places), memory, jobs, stand_ins, block), boards))
    }

    /// The exchange of tensors that go together, and their memory.
    fn plan_batch(
        &mut self,
        id: SetId,
        agreed: &Agreed,
        op: OpId,
        tensors: impl ExactSizeIterator<Item = usize> + Clone,
        memory: &mut Memory,
    ) -> (RunId, Arc<Exchange>) {
        let signature = &agreed.signature;
        let set = &self.sets[&id];
        let (me, size, hosts) = (set.me(), set.size(), Arc::clone(&set.hosts));
        let root = set.root_of(signature);
        let (mut bytes, mut regions, mut total_bytes) = (Vec::new(), Vec::new(), 0);
        for t in tensors.clone() {
            total_bytes += batch::push_bytes(agreed, t, me, size, &mut bytes);
            let sizes = operation::sizes(agreed, t, me, size, root);
            self.take_tensor(op, t, &signature.tensors[t], sizes, &mut regions);
        }
        let dtype = signature.tensors[tensors.clone().next().unwrap_or(0)].dtype;
        let shape = batch::shape(agreed, dtype, (me, root), &hosts, (&bytes, total_bytes), tensors.len());
        let lent = |member| agreed.call.of(Member(member)).iter().nth_back(1) == Some(&1);
        let lends = total_bytes >= self.setup.lent_bytes && (0..size).all(lent);
        let exchange = Arc::new(boards::exchange(&shape, slot_bytes(signature, size), lends));
        (memory.register(regions), exchange)
    }

    /// This member has given up a plan; when all have, its memory is free.
    pub fn free_plan(&mut self, id: SetId, number: u64, now: Time) {
        self.quiet_until = None;
        if let Some(coordinator) = self.coordinator_of(id) {
            // Who has joined has given up all plans before.
            Call::Free(number).make(coordinator, now);
        }
    }

    /// All members have given up a plan.
    pub(super) fn plan_freed(&mut self, id: SetId, number: u64) {
        self.plannings.channels.retain(|(of, known, channel)| {
            let is_it = *of == id && *known == number;
            if is_it {
                channel.release();
            }
            !is_it
        });
    }

    /// Moves what can be moved in channels that are under way, and wakes members that sleep.
    pub(super) fn turn_channels(&mut self) -> bool {
        if !self.plannings.activity.take_call() && !self.has_active_channels() {
            return false;
        }
        let mut moved = false;
        for at in 0..self.plannings.channels.len() {
            let channel = Arc::clone(&self.plannings.channels[at].2);
            moved |= channel.turn().moved;
            if channel.take_published() {
                for &peer in channel.ranks.iter().filter(|rank| **rank != self.me) {
                    self.links.nudge(peer);
                }
            }
            if let Some((member, cause)) = channel.take_fault() {
                self.break_epoch_with(Some(channel.ranks[member]), cause);
                return true;
            }
        }
        moved
    }

    /// Whether a channel is under way.
    pub(super) fn has_active_channels(&self) -> bool {
        self.plannings.activity.is_any_under_way()
    }

    /// What this rank's channels and whoever drives tell each other.
    #[must_use]
    pub fn activity(&self) -> Arc<Activity> {
        Arc::clone(&self.plannings.activity)
    }

    /// Whether a member of a channel under way has counted since it was last looked at.
    pub(super) fn channels_have_news(&self) -> bool {
        self.plannings.activity.calls()
            || self.has_active_channels()
                && self.plannings.channels.iter().any(|(_, _, channel)| channel.has_news())
    }

    /// A member of a set has left in good order.
    pub(super) fn leave_channels(&mut self, set: SetId, who: Rank) {
        self.take_back_lent(Some(set));
        for (_, _, channel) in self.plannings.channels.iter().filter(|(of, ..)| *of == set) {
            channel.depart(who, &Error::Shutdown(Some(who)));
        }
    }

    /// The sets of channels that are under way and lend tensors.
    pub(super) fn sets_that_lend_in_channels(&self) -> impl Iterator<Item = SetId> {
        let lends = |channel: &Channel| channel.lends && channel.is_under_way();
        self.plannings.channels.iter().filter(move |(_, _, channel)| lends(channel)).map(|(set, ..)| *set)
    }

    /// Nothing moves in channels any more until they fail.
    pub(super) fn close_channels(&mut self) {
        self.plannings.channels.iter().for_each(|(_, _, channel)| channel.close());
    }

    /// Channels of a set, or of all, end with an error.
    pub(super) fn fail_channels(&mut self, set: Option<SetId>, error: &Error) {
        for (of, _, channel) in &self.plannings.channels {
            if set.is_none_or(|set| set == *of) {
                channel.fail(error);
            }
        }
    }
}

/// Bytes of a slot for such a plan: the same on all members before anything is agreed, and after.
fn slot_bytes(signature: &Signature, size: u32) -> usize {
    if signature.collective.has_free_rows() {
        return BOARD_SLOT_BYTES;
    }
    let bytes = signature.tensors.iter().map(|t| t.elements().saturating_mul(t.dtype.size() as u64));
    let bytes = bytes.fold(0u64, u64::saturating_add).min(BOARD_SLOT_BYTES as u64) as usize;
    // Each area may be longer than its part of the whole by what parts are rounded to.
    (bytes.next_multiple_of(AREA_UNIT) + size as usize * AREA_UNIT).min(BOARD_SLOT_BYTES)
}
