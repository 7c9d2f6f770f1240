//! Batches that accelerators of one host move by themselves: each member's kernels read and write the memory of all
//! members where it lies. What a member does, and what members tell each other of their memory.
//!
//! A member is told where the tensors of all others are (a *card*), launches its share of the work, and tells that
//! it has (a *signal*). The host waits for no device in between: streams wait for the others' signals.
//!
//! The share of an allreduce is one part of the vector: it is reduced in member order (the canonical tree, one
//! rounding) and written to every member's output. Each byte of each member's memory is read and written by one
//! member only, so in place or not is the same. What is small one member does alone: where processes share a
//! device, each turn of theirs costs more than the work.
#![forbid(unsafe_code)]

use super::plan::{BatchShape, layout};
use crate::device::accelerator::{Exported, HANDLE_BYTES};
use crate::device::{DeviceOrder, Finish, Reduction};
use crate::layout::{Cut, Extent, Layout, input_region, output_region};
use crate::memory::{Piece, PieceRange};
use crate::schedule::{Space, Span};
use crate::types::Collective;
use std::sync::Arc;

/// An allreduce of at most this many bytes is one member's work.
const ALONE_BYTES: u64 = 32 << 10;
/// Regions of memory on a card.
pub(super) const ENTRIES: usize = 32;
/// Allocations on a card.
const ALLOCATIONS: usize = 16;
/// Bytes of a card: its signal, its counts, allocations and entries.
pub(super) const CARD_BYTES: usize = 8 + ALLOCATIONS * (HANDLE_BYTES + 8) + ENTRIES * 16;

/// The orders of this member, in regions that [`region`] numbers.
pub(super) fn orders(shape: &BatchShape<'_>, sent: &dyn Fn(u32, u32, usize) -> u64) -> Vec<DeviceOrder> {
    let members = shape.hosts.len() as u32;
    let (me, root) = (shape.me, shape.root);
    let reduction = Reduction { dtype: shape.dtype, op: shape.op };
    let finish = Finish { divisor: shape.divisor, post: shape.scale.post };
    let alone = shape.collective == Collective::Allreduce && shape.total_bytes <= ALONE_BYTES;
    let parts = if alone || shape.collective == Collective::Broadcast { 1 } else { members };
    let lists = Lists { layout: &layout(shape, parts), tensors: shape.tensors };
    let all = || 0..members;
    let others = || all().filter(|member| *member != me);
    let reduce = |dst: PieceRange, chunk: u32| DeviceOrder::ReduceMany {
        dst,
        srcs: all().map(|member| lists.of(member, Space::Input, chunk)).collect(),
        reduction,
        pre: shape.scale.pre,
        finish,
    };
    let copy = |dst: PieceRange, src: PieceRange| DeviceOrder::Copy { dst, src };
    let mut orders = match shape.collective {
        Collective::Allreduce if alone && me != 0 => Vec::new(),
        Collective::Allreduce => {
            let chunk = if alone { 0 } else { me };
            let result = || lists.of(me, Space::Output, chunk);
            let theirs = concatenated(others().map(|member| lists.of(member, Space::Output, chunk)));
            vec![reduce(result(), chunk), copy(theirs, concatenated(others().map(|_| result())))]
        }
        Collective::Reduce => vec![reduce(lists.of(root, Space::Output, me), me)],
        Collective::Reducescatter => vec![reduce(lists.of(me, Space::Output, me), me)],
        Collective::Broadcast => {
            vec![copy(lists.of(me, Space::Output, 0), lists.of(root, Space::Input, 0))]
        }
        Collective::Allgather => {
            let blocks = concatenated(all().map(|member| lists.of(me, Space::Output, member)));
            let theirs = all().map(|member| {
                let whole = (0..shape.tensors).map(|t| Extent {
                    region: input_region(t) + region(member, shape.tensors),
                    offset: 0,
                    len: shape.bytes[t * members as usize + member as usize],
                });
                pieces(whole)
            });
            vec![copy(blocks, concatenated(theirs))]
        }
        Collective::Alltoall => {
            let blocks = concatenated(all().map(|member| lists.of(me, Space::Output, member)));
            let theirs = all().map(|member| {
                pieces((0..shape.tensors).map(|t| Extent {
                    region: input_region(t) + region(member, shape.tensors),
                    offset: (0..me).map(|to| sent(member, to, t)).sum(),
                    len: sent(member, me, t),
                }))
            });
            vec![copy(blocks, concatenated(theirs))]
        }
        _ => unreachable!("other collectives are staged"),
    };
    orders.retain(|order| match order {
        DeviceOrder::ReduceMany { dst, .. } | DeviceOrder::Copy { dst, .. } => dst.start < dst.end,
        _ => true,
    });
    orders
}

/// The first of a member's regions.
pub(super) fn region(member: u32, tensors: usize) -> u32 {
    member * 2 * tensors as u32
}

/// Whether this member's outputs are written by others.
pub(super) fn writes_to_others(collective: Collective) -> bool {
    matches!(collective, Collective::Allreduce | Collective::Reduce)
}

/// The chunks of a layout as lists of pieces of a member's regions.
struct Lists<'a> {
    layout: &'a Layout,
    tensors: usize,
}

impl Lists<'_> {
    fn of(&self, member: u32, space: Space, chunk: u32) -> PieceRange {
        let mut extents: Vec<Extent> = Vec::new();
        let cut = Cut { window: 0, windows: 1, slot: 0, scratch_chunks: 0 };
        self.layout.resolve(&Span { space, chunks: chunk..chunk + 1, of: chunk }, cut, &mut extents);
        let first = region(member, self.tensors);
        pieces(extents.into_iter().map(|e| Extent { region: e.region + first, ..e }))
    }
}

fn pieces(extents: impl Iterator<Item = Extent>) -> PieceRange {
    let list: Arc<[Piece]> = extents
        .filter(|e| e.len > 0)
        .map(|e| Piece { region: e.region, offset: e.offset, len: e.len })
        .collect();
    PieceRange { start: 0, end: list.len() as u32, list }
}

fn concatenated(ranges: impl Iterator<Item = PieceRange>) -> PieceRange {
    let list: Arc<[Piece]> = ranges.flat_map(|range| range.pieces().to_vec()).collect();
    PieceRange { start: 0, end: list.len() as u32, list }
}

/// Where a member's tensors are, as the others find them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Card {
    /// What its producers' work ends with.
    pub signal: u32,
    /// One for each region that others touch.
    pub entries: Vec<Exported>,
}

impl Card {
    /// Whether so many regions in so many allocations fit.
    pub(super) fn fits(entries: &[Exported]) -> bool {
        let mut seen: Vec<u64> = Vec::new();
        for entry in entries {
            if !seen.contains(&entry.allocation) {
                seen.push(entry.allocation);
            }
        }
        entries.len() <= ENTRIES && seen.len() <= ALLOCATIONS
    }

    /// Writes the card; always as long.
    pub(super) fn write(&self, into: &mut Vec<u8>) {
        assert!(Card::fits(&self.entries), "a card's entries were counted");
        let mut allocations: Vec<&Exported> = Vec::new();
        let mut entries = Vec::with_capacity(self.entries.len());
        for entry in &self.entries {
            let known = allocations.iter().position(|known| known.allocation == entry.allocation);
            let at = known.unwrap_or(allocations.len());
            if known.is_none() {
                allocations.push(entry);
            }
            entries.push((at as u64, entry.offset));
        }
        let start = into.len();
        into.extend((self.signal as u16).to_le_bytes());
        into.extend((allocations.len() as u16).to_le_bytes());
        into.extend((entries.len() as u32).to_le_bytes());
        for allocation in allocations {
            into.extend(allocation.handle);
            into.extend(allocation.allocation.to_le_bytes());
        }
        for (at, offset) in entries {
            into.extend(at.to_le_bytes());
            into.extend(offset.to_le_bytes());
        }
        into.resize(start + CARD_BYTES, 0);
    }

    /// Reads a card; `None` where it cannot be one.
    pub(super) fn read(bytes: &[u8]) -> Option<Card> {
        let (head, mut rest) = bytes.split_first_chunk::<8>()?;
        let signal = u32::from(u16::from_le_bytes([head[0], head[1]]));
        let allocations = usize::from(u16::from_le_bytes([head[2], head[3]]));
        let count = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
        if allocations > ALLOCATIONS || count > ENTRIES {
            return None;
        }
        let mut known = Vec::with_capacity(allocations);
        for _ in 0..allocations {
            let (handle, after) = rest.split_first_chunk::<HANDLE_BYTES>()?;
            let (allocation, after) = after.split_first_chunk::<8>()?;
            known.push((*handle, u64::from_le_bytes(*allocation)));
            rest = after;
        }
        let mut entries = Vec::with_capacity(count);
        for _ in 0..count {
            let (at, after) = rest.split_first_chunk::<8>()?;
            let (offset, after) = after.split_first_chunk::<8>()?;
            let &(handle, allocation) = known.get(u64::from_le_bytes(*at) as usize)?;
            entries.push(Exported { handle, allocation, offset: u64::from_le_bytes(*offset) });
            rest = after;
        }
        Some(Card { signal, entries })
    }
}

/// Tensors packed one behind another: where each begins, and the end.
pub(super) fn packed(lengths: impl Iterator<Item = u64>) -> (Vec<u64>, u64) {
    let mut end = 0;
    let offsets = lengths.map(|len| {
        let start = end;
        end += len.next_multiple_of(256);
        start
    });
    let offsets = offsets.collect();
    (offsets, end)
}

/// The output's region of a tensor of a member.
pub(super) fn output_of(member: u32, tensors: usize, t: usize) -> usize {
    (region(member, tensors) + output_region(t)) as usize
}

/// The input's region of a tensor of a member.
pub(super) fn input_of(member: u32, tensors: usize, t: usize) -> usize {
    (region(member, tensors) + input_region(t)) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exported(allocation: u64, offset: u64) -> Exported {
        Exported { handle: [allocation as u8; HANDLE_BYTES], allocation, offset }
    }

    #[test]
    fn cards_travel_as_bytes() {
        let entries = vec![exported(7, 0), exported(9, 512), exported(7, 4096)];
        let card = Card { signal: 63, entries };
        let mut bytes = Vec::new();
        card.write(&mut bytes);
        assert_eq!(bytes.len(), CARD_BYTES);
        assert_eq!(Card::read(&bytes), Some(card));
    }

    #[test]
    fn a_full_card_is_still_one() {
        let entries: Vec<Exported> = (0..ENTRIES as u64).map(|i| exported(i % 16, i)).collect();
        assert!(Card::fits(&entries));
        let card = Card { signal: 0, entries };
        let mut bytes = Vec::new();
        card.write(&mut bytes);
        assert_eq!(Card::read(&bytes), Some(card));
        assert!(!Card::fits(&(0..17).map(|i| exported(i, 0)).collect::<Vec<_>>()), "too many allocations");
    }

    #[test]
    fn what_is_no_card_is_refused() {
        let mut bytes = vec![0; CARD_BYTES];
        bytes[2] = ALLOCATIONS as u8 + 1;
        assert_eq!(Card::read(&bytes), None);
        bytes[2] = 0;
        bytes[4] = 1;
        assert_eq!(Card::read(&bytes), None, "an entry of an allocation that is not there");
        assert_eq!(Card::read(&[0; 7]), None);
    }
}
