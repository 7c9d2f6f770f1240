//! What a member does for a batch whose tensors its device takes straight from the others' devices
//! (`transport::board::device`): the orders of each tick.
#![forbid(unsafe_code)]

use super::plan::{BatchShape, layout};
use crate::device::{DeviceOrder, Finish, Reduction};
use crate::layout::{Cut, Extent, Layout, UNIT};
use crate::memory::{Piece, PieceRange};
use crate::schedule::{Space, Span};
use crate::transport::board::device::{Rounds, slot_region};
use crate::types::{Collective, ReduceOp, Signature};

/// Areas of a slot begin at multiples of it, as allocations do.
const AREA_UNIT: u64 = 256;
const _: () = assert!(AREA_UNIT.is_multiple_of(UNIT));

/// Whether devices carry out such a collective among themselves.
pub(crate) fn serves(signature: &Signature) -> bool {
    match signature.collective {
        Collective::Allreduce | Collective::Reducescatter => signature.op != ReduceOp::Adasum,
        Collective::Allgather | Collective::Broadcast | Collective::Alltoall => true,
        _ => false,
    }
}

/// The ticks of a batch of this shape. A member that has joined has no tensors: it gives the identity of the operation,
/// or nothing, and takes nothing.
pub(super) fn rounds(shape: &BatchShape<'_>, absent: bool, slot_bytes: u64) -> Rounds {
    let members = shape.hosts.len();
    // All members read the one area of a slot, or each has its own.
    let whole = matches!(shape.collective, Collective::Broadcast | Collective::Allgather);
    let areas = if whole { 1 } else { members as u64 };
    let area_bytes = slot_bytes / areas / AREA_UNIT * AREA_UNIT;
    let one = shape.collective == Collective::Broadcast;
    let layout = layout(shape, if one { 1 } else { members as u32 });
    let longest = if shape.collective == Collective::Alltoall { shape.longest } else { layout.longest() };
    let ticks = longest.div_ceil(area_bytes) as usize;
    let maker = |tick| Maker { shape, layout: &layout, absent, area_bytes, ticks, tick };
    Rounds {
        ticks: (0..ticks).map(|tick| maker(tick).orders()).collect(),
        reduces: shape.collective == Collective::Allreduce,
    }
}

/// The orders of one tick.
struct Maker<'a> {
    shape: &'a BatchShape<'a>,
    layout: &'a Layout,
    absent: bool,
    area_bytes: u64,
    ticks: usize,
    tick: usize,
}

impl Maker<'_> {
    fn orders(&self) -> [Option<DeviceOrder>; 3] {
        let (me, root) = (self.shape.me as usize, self.shape.root as usize);
        let members = 0..self.shape.hosts.len();
        let others = || members.clone().filter(|&member| member != me);
        match self.shape.collective {
            Collective::Broadcast if me == root => {
                let pack = self.copy([(self.slot(me, 0, self.input(0)), self.input(0))]);
                [pack, None, self.copy([(self.output(0), self.input(0))])]
            }
            Collective::Broadcast => {
                [None, None, self.copy([(self.output(0), self.slot(root, 0, self.output(0)))])]
            }
            Collective::Allgather => {
                let pack = self.copy([(self.slot(me, 0, self.input(me)), self.input(me))]);
                [pack, None, self.gather(|from| self.slot(from, 0, self.output(from)))]
            }
            Collective::Alltoall => {
                let pack = self.copy(others().map(|to| (self.slot(me, to, self.input(to)), self.input(to))));
                [pack, None, self.gather(|from| self.slot(from, me, self.output(from)))]
            }
            Collective::Reducescatter => {
                let output = self.output(me);
                [self.pack_parts(), None, self.reduce(self.input(me), output)]
            }
            _ => {
                // A part is as long on all members, also where this one has no tensor.
                let result = self.slot(me, me, self.input(me));
                let gather = self
                    .copy(members.clone().map(|by| (self.output(by), self.slot(by, by, self.output(by)))));
                let gather = gather.filter(|_| !self.absent);
                [self.pack_parts(), self.reduce(self.input(me), result), gather]
            }
        }
    }

    /// What the others reduce.
    fn pack_parts(&self) -> Option<DeviceOrder> {
        let members = 0..self.shape.hosts.len();
        let me = self.shape.me as usize;
        if !self.absent {
            let others = members.filter(|&to| to != me);
            return self.copy(others.map(|to| (self.slot(me, to, self.input(to)), self.input(to))));
        }
        let dst = concat(members.map(|to| self.slot(me, to, self.input(to))));
        let reduction = Reduction { dtype: self.shape.dtype, op: self.shape.op };
        (!dst.is_empty()).then(|| DeviceOrder::Identity { dst: range(dst), reduction })
    }

    /// Reduces this member's part.
    fn reduce(&self, own: Vec<Piece>, dst: Vec<Piece>) -> Option<DeviceOrder> {
        let me = self.shape.me as usize;
        // A joined member has filled all of its slot, and its part of a reducescatter goes nowhere.
        let part = |from: usize| match from == me && !self.absent {
            true => own.clone(),
            false => self.slot(from, me, own.clone()),
        };
        let nowhere = dst.is_empty() || (self.absent && self.shape.collective == Collective::Reducescatter);
        (!nowhere).then(|| DeviceOrder::ReduceMany {
            dst: range(dst),
            srcs: (0..self.shape.hosts.len()).map(|from| range(part(from))).collect(),
            reduction: Reduction { dtype: self.shape.dtype, op: self.shape.op },
            pre: self.shape.scale.pre,
            finish: Finish { divisor: self.shape.divisor, post: self.shape.scale.post },
        })
    }

    /// The own block, and those of the others.
    fn gather(&self, theirs: impl Fn(usize) -> Vec<Piece>) -> Option<DeviceOrder> {
        let me = self.shape.me as usize;
        let copies = (0..self.shape.hosts.len()).map(|from| {
            let source = if from == me { self.input(me) } else { theirs(from) };
            (self.output(from), source)
        });
        self.copy(copies)
    }

    /// A copy of all these lists: to, from.
    fn copy(&self, copies: impl IntoIterator<Item = (Vec<Piece>, Vec<Piece>)>) -> Option<DeviceOrder> {
        let (dst, src): (Vec<_>, Vec<_>) = copies.into_iter().unzip();
        let (dst, src) = (concat(dst), concat(src));
        // Who has joined has no tensor to read or write.
        (!dst.is_empty() && !self.absent).then(|| DeviceOrder::Copy { dst: range(dst), src: range(src) })
    }

    fn input(&self, chunk: usize) -> Vec<Piece> {
        self.resolve(Space::Input, chunk)
    }

    fn output(&self, chunk: usize) -> Vec<Piece> {
        self.resolve(Space::Output, chunk)
    }

    /// An area of a member's slot, as long as the list.
    fn slot(&self, member: usize, area: usize, like: Vec<Piece>) -> Vec<Piece> {
        let len: u64 = like.iter().map(|piece| piece.len).sum();
        assert!(len <= self.area_bytes, "a window fits its area");
        let region = slot_region(self.shape.tensors, member, self.tick);
        let piece = Piece { region, offset: area as u64 * self.area_bytes, len };
        if len == 0 { Vec::new() } else { vec![piece] }
    }

    fn resolve(&self, space: Space, chunk: usize) -> Vec<Piece> {
        let chunk = chunk as u32;
        let cut = Cut { window: self.tick as u32, windows: self.ticks as u32, slot: 0, scratch_chunks: 0 };
        let mut extents: Vec<Extent> = Vec::new();
        self.layout.resolve(&Span { space, chunks: chunk..chunk + 1, of: chunk }, cut, &mut extents);
        extents.iter().map(|e| Piece { region: e.region, offset: e.offset, len: e.len }).collect()
    }
}

fn concat(lists: impl IntoIterator<Item = Vec<Piece>>) -> Vec<Piece> {
    lists.into_iter().flatten().collect()
}

fn range(pieces: Vec<Piece>) -> PieceRange {
    PieceRange { start: 0, end: pieces.len() as u32, list: pieces.into() }
}
