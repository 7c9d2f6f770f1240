//! Process sets that live on one host exchange over boards (`transport::board`).
//!
//! Whether a set does is agreed as everything is: a member that sees the boards of all others, and the set's
//! seat on each, submits a barrier of a name of the engine's own. Where that stands in the agreed log, the set
//! takes its seats, and the batches behind it go over them. A member that never sees all boards never calls, and
//! the set uses its links for ever.
#![forbid(unsafe_code)]

use super::Engine;
use super::calls::Call;
use super::plan::{BatchShape, layout};
use crate::coordinator::Agreed;
use crate::device::{Finish, Reduction};
use crate::layout::{Cut, Extent, Layout};
use crate::limits::{BOARD_MEMBERS_MAX, BOARD_SEATS};
use crate::memory::{Piece, PieceRange, RunId};
use crate::schedule::{Space, Span};
use crate::transport::board::{AREA_UNIT, Back, BoardMemory, Exchange, Part, Place, Seat, Share};
use crate::types::{Collective, Rank, ReduceOp, SetId, Signature, Time};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

/// An allreduce of at most this many bytes over all other members goes in one step: each reads everything.
const ONE_STEP_BYTES: u64 = 4 << 10;

/// How far a set is on its way to the boards.
#[derive(Debug)]
pub(super) enum Seating {
    /// It uses links: it spans hosts, has too many members, or there is no seat left.
    None,
    /// It has a seat on this rank's board.
    Claimed(usize),
    /// It was used, so the others' boards are looked for.
    Seeking(usize),
    /// All were found, and this member has called.
    Called(Seat),
    /// The call was agreed while some had joined, who could not call: it is made again when all are back.
    Missed(Seat),
    /// It was agreed.
    Taken(Seat),
}

/// This rank's board, and which sets look for seats or have them.
pub(super) struct Boards {
    own: Option<Arc<BoardMemory>>,
    seats: usize,
    seeking: Vec<SetId>,
    seated: Vec<SetId>,
    complete: Vec<RunId>,
}

impl Boards {
    pub(super) fn new(own: Option<Arc<BoardMemory>>) -> Boards {
        Boards { own, seats: 0, seeking: Vec::new(), seated: Vec::new(), complete: Vec::new() }
    }

    /// This rank is about to sleep: whoever publishes something in a channel wakes it.
    pub(super) fn lie_down(&self) {
        if let Some(own) = &self.own {
            own.asleep().store(1, Ordering::SeqCst);
            // Before the last look at what there is.
            fence(Ordering::SeqCst);
        }
    }

    /// Awake again.
    pub(super) fn rise(&self) {
        if let Some(own) = &self.own {
            own.asleep().store(0, Ordering::Relaxed);
        }
    }

    /// This rank's own board.
    pub(super) fn own(&self) -> Option<&Arc<BoardMemory>> {
        self.own.as_ref()
    }

    /// A new set: gives it a seat, if it can use one. Seats are not given twice in an epoch, so no member ever
    /// meets the leftovers of another set.
    pub(super) fn claim(&mut self, set: SetId, member: bool, hosts: &[u32]) -> Seating {
        let fits = member
            && (2..=BOARD_MEMBERS_MAX).contains(&hosts.len())
            && hosts.iter().all(|host| *host == hosts[0]);
        match &self.own {
            Some(own) if fits && self.seats < BOARD_SEATS => {
                let seat = self.seats;
                self.seats += 1;
                own.holder(seat).store(u64::from(set.0) + 1, Ordering::Release);
                Seating::Claimed(seat)
            }
            _ => Seating::None,
        }
    }
}

impl Engine {
    /// A set is used: from the first time on the boards of its members are looked for.
    pub(super) fn seek_seat(&mut self, id: SetId) {
        let Some(set) = self.sets.get_mut(&id) else { return };
        let Seating::Claimed(seat) = set.seating else { return };
        set.seating = Seating::Seeking(seat);
        self.boards.seeking.push(id);
        let ranks = Arc::clone(&set.ranks);
        for &peer in ranks.iter().filter(|rank| **rank != self.me) {
            self.links.request(peer);
        }
    }

    /// All who had joined are back: a call that they missed is made again.
    pub(super) fn seek_seat_again(&mut self, id: SetId) {
        let missed = self.sets.get(&id).is_some_and(|set| matches!(set.seating, Seating::Missed(_)));
        if missed && !self.boards.seeking.contains(&id) {
            self.boards.seeking.push(id);
        }
    }

    /// Calls for the sets whose boards are all there.
    pub(super) fn take_seats(&mut self, now: Time) {
        for at in (0..self.boards.seeking.len()).rev() {
            let id = self.boards.seeking[at];
            if self.call(id, now) {
                self.boards.seeking.swap_remove(at);
            }
        }
    }

    /// Calls, if all boards are there; whether there is nothing more to seek.
    fn call(&mut self, id: SetId, now: Time) -> bool {
        let Some(set) = self.sets.get(&id) else { return true };
        let seat = match set.seating {
            Seating::Seeking(own) => match self.find_places(id, own) {
                Some(places) => Some(Seat::new(set.me() as usize, places)),
                None => return false,
            },
            Seating::Missed(_) => None,
            _ => return true,
        };
        let set = self.sets.get_mut(&id).expect("it was just there");
        let Some(coordinator) = &mut set.coordinator else { return true };
        // A rank that has joined cannot call, and does so afterwards.
        let called = Call::Boards.make(coordinator, now);
        if called {
            set.seating = match (seat, std::mem::replace(&mut set.seating, Seating::None)) {
                (Some(seat), _) | (None, Seating::Missed(seat)) => Seating::Called(seat),
                (None, other) => other,
            };
        }
        called
    }

    /// The boards of all members, and the set's seat on each.
    fn find_places(&self, id: SetId, own: usize) -> Option<Vec<Place>> {
        let tag = u64::from(id.0) + 1;
        let place = |rank: &Rank| {
            if *rank == self.me {
                return Some(Place::seat(Arc::clone(self.boards.own.as_ref()?), own));
            }
            let board = self.links.board(*rank)?;
            let seat = (0..BOARD_SEATS).find(|&seat| board.holder(seat).load(Ordering::Acquire) == tag)?;
            Some(Place::seat(board, seat))
        };
        self.sets[&id].ranks.iter().map(place).collect()
    }

    /// The call stands in the agreed log: batches behind it go over the boards.
    pub(super) fn sit_down(&mut self, id: SetId, agreed: &Agreed) {
        // Where this rank had joined, the call was the others' alone; it makes its own, and may have already.
        let Some(set) = self.sets.get_mut(&id).filter(|_| agreed.op.is_some()) else { return };
        let all = agreed.absent.is_empty();
        set.seating = match std::mem::replace(&mut set.seating, Seating::None) {
            Seating::Called(seat) if !all => Seating::Missed(seat),
            Seating::Called(seat) => {
                self.boards.seated.push(id);
                Seating::Taken(seat)
            }
            other => other,
        };
    }

    pub(super) fn seat_of(&mut self, id: SetId) -> Option<&mut Seat> {
        match &mut self.sets.get_mut(&id)?.seating {
            Seating::Taken(seat) => Some(seat),
            _ => None,
        }
    }

    /// The set does not exchange any more.
    pub(super) fn leave_seat(&mut self, id: SetId) {
        self.boards.seated.retain(|seated| *seated != id);
        if let Some(set) = self.sets.get_mut(&id) {
            set.seating = Seating::None;
        }
    }

    /// Whether a batch goes over the boards: a function of what is agreed.
    pub(super) fn goes_over_boards(&self, id: SetId, signature: &Signature) -> bool {
        matches!(self.sets[&id].seating, Seating::Taken(_)) && self.boards_serve(signature)
    }

    /// Whether boards can do what is asked for, and no other way is forced.
    pub(super) fn boards_serve(&self, signature: &Signature) -> bool {
        let serves = match signature.collective {
            Collective::Allreduce | Collective::Reduce => signature.op != ReduceOp::Adasum,
            Collective::Reducescatter
            | Collective::Allgather
            | Collective::Broadcast
            | Collective::Alltoall => true,
            _ => false,
        };
        serves && self.plans.forced().is_none_or(|name| name == "direct")
    }

    /// Moves what can be moved over the boards.
    pub(super) fn turn_seats(&mut self) -> bool {
        let mut moved = false;
        for at in 0..self.boards.seated.len() {
            let Some(&id) = self.boards.seated.get(at) else { break };
            let Some(set) = self.sets.get_mut(&id) else { continue };
            let Seating::Taken(seat) = &mut set.seating else { continue };
            if seat.is_idle() {
                continue;
            }
            match seat.progress(&self.memory, &mut self.boards.complete) {
                Ok(any) => moved |= any,
                Err((member, cause)) => {
                    let culprit = set.ranks[member];
                    self.break_epoch_with(Some(culprit), cause);
                    return true;
                }
            }
            if seat.take_published() {
                for &peer in set.ranks.iter().filter(|rank| **rank != self.me) {
                    self.links.nudge(peer);
                }
            }
        }
        if moved {
            self.quiet_until = None;
            let mut complete = std::mem::take(&mut self.boards.complete);
            for run in complete.drain(..) {
                self.finish_batch(run);
            }
            self.boards.complete = complete;
        }
        moved
    }

    /// Completes the batches that all members have done their part of.
    pub(super) fn finish_seats(&mut self) {
        let mut complete = std::mem::take(&mut self.boards.complete);
        for id in &self.boards.seated {
            if let Some(Seating::Taken(seat)) = self.sets.get_mut(id).map(|set| &mut set.seating) {
                seat.finish(&self.memory, &mut complete);
            }
        }
        for run in complete.drain(..) {
            self.finish_batch(run);
        }
        self.boards.complete = complete;
    }

    /// Whether a batch is under way over boards that all members have entered.
    pub(super) fn is_exchanging(&self) -> bool {
        self.boards.seated.iter().any(|id| match self.sets.get(id).map(|set| &set.seating) {
            Some(Seating::Taken(seat)) => seat.is_entered(),
            _ => false,
        })
    }

    /// Whether a peer has published something that was not looked at.
    pub(super) fn seats_have_news(&self) -> bool {
        self.boards.seated.iter().any(|id| match self.sets.get(id).map(|set| &set.seating) {
            Some(Seating::Taken(seat)) => seat.has_news(),
            _ => false,
        })
    }
}

/// What this member does for a batch of this shape, through slots of so many bytes. With `lends` the members tell each
/// other first where their tensors lie, if it is an allreduce of more than one step.
pub(super) fn exchange(shape: &BatchShape<'_>, slot_bytes: usize, lends: bool) -> Exchange {
    let members = shape.hosts.len();
    let (me, root) = (shape.me as usize, shape.root as usize);
    let reduces = matches!(shape.collective, Collective::Allreduce | Collective::Reduce);
    let tiny = shape.collective == Collective::Allreduce
        && shape.total_bytes.saturating_mul(members as u64 - 1) <= ONE_STEP_BYTES;
    let whole = tiny || shape.collective == Collective::Broadcast;
    let layout = layout(shape, if whole { 1 } else { members as u32 });
    let lists = Lists { layout: &layout, members };
    let mut plan = Exchange {
        share: Share::All(lists.empty()),
        part: None,
        takes: Vec::new(),
        results: Vec::new(),
        returns: false,
        keep: None,
        area_bytes: 0,
        ticks: 0,
        lends: lends && shape.collective == Collective::Allreduce && !tiny,
    };
    let part = |chunk: usize, back: Back| Part {
        reduction: Reduction { dtype: shape.dtype, op: shape.op },
        pre: shape.scale.pre,
        finish: Finish { divisor: shape.divisor, post: shape.scale.post },
        own: lists.input(chunk),
        dst: lists.output(chunk),
        back,
    };
    match shape.collective {
        _ if tiny => {
            plan.share = Share::All(lists.input(0));
            plan.part = Some(part(0, Back::Nowhere));
        }
        Collective::Broadcast if me == root => {
            plan.share = Share::All(lists.input(0));
            plan.keep = Some((lists.input(0), lists.output(0)));
        }
        Collective::Broadcast => {
            plan.takes =
                (0..members).map(|from| if from == root { lists.output(0) } else { lists.empty() }).collect();
        }
        Collective::Allgather => {
            plan.share = Share::All(lists.input(me));
            plan.takes = lists.but(me, |from| lists.output(from));
            plan.keep = Some((lists.input(me), lists.output(me)));
        }
        Collective::Alltoall => {
            plan.share = Share::Each(lists.but(me, |to| lists.input(to)));
            plan.takes = lists.but(me, |from| lists.output(from));
            plan.keep = Some((lists.input(me), lists.output(me)));
        }
        _ => {
            let back = match shape.collective {
                Collective::Allreduce => Back::All,
                Collective::Reduce => Back::To(shape.root),
                _ => Back::Nowhere,
            };
            plan.share = Share::Each(lists.but(me, |to| lists.input(to)));
            plan.part = Some(part(me, back));
            plan.returns = back != Back::Nowhere;
            if reduces && (back == Back::All || me == root) {
                plan.results = lists.but(me, |by| lists.output(by));
            }
        }
    }
    let longest = if shape.collective == Collective::Alltoall { shape.longest } else { layout.longest() };
    let fitting = longest.next_multiple_of(AREA_UNIT as u64).max(AREA_UNIT as u64);
    let most = slot_bytes / plan.areas(members) / AREA_UNIT * AREA_UNIT;
    plan.area_bytes = most.min(usize::try_from(fitting).unwrap_or(most));
    plan.ticks = longest.div_ceil(plan.area_bytes as u64) + u64::from(plan.lends);
    plan
}

/// The chunks of a layout as lists of pieces.
struct Lists<'a> {
    layout: &'a Layout,
    members: usize,
}

impl Lists<'_> {
    fn empty(&self) -> PieceRange {
        PieceRange { list: Arc::new([]), start: 0, end: 0 }
    }
    fn input(&self, chunk: usize) -> PieceRange {
        self.resolve(Space::Input, chunk)
    }
    fn output(&self, chunk: usize) -> PieceRange {
        self.resolve(Space::Output, chunk)
    }
    /// One for each member, and nothing for this one.
    fn but(&self, me: usize, list: impl Fn(usize) -> PieceRange) -> Vec<PieceRange> {
        (0..self.members).map(|m| if m == me { self.empty() } else { list(m) }).collect()
    }
    fn resolve(&self, space: Space, chunk: usize) -> PieceRange {
        let chunk = chunk as u32;
        let mut extents: Vec<Extent> = Vec::new();
        let cut = Cut { window: 0, windows: 1, slot: 0, scratch_chunks: 0 };
        self.layout.resolve(&Span { space, chunks: chunk..chunk + 1, of: chunk }, cut, &mut extents);
        let list: Arc<[Piece]> =
            extents.iter().map(|e| Piece { region: e.region, offset: e.offset, len: e.len }).collect();
        PieceRange { start: 0, end: list.len() as u32, list }
    }
}
