//! Ring. Members stand in a circle (those of one host side by side) and parts of the vector travel around it.
//!
//! | | steps | bytes sent and received by each member |
//! | --- | --- | --- |
//! | reduce-scatter, all-gather | `p - 1` | `n (p - 1) / p` |
//! | allreduce | `2 (p - 1)` | `2 n (p - 1) / p`, the least possible |
//!
//! Only `2 h` of the `2 p` links of an allreduce pass between `h` hosts. Source: P. Patarasuk, X. Yuan, "Bandwidth
//! optimal all-reduce algorithms for clusters of workstations", JPDC 69 (2009), section 3.
#![forbid(unsafe_code)]

use super::load::Shape;
use super::{Builder, Leg, Load, Query};
use std::ops::Range;

pub(super) fn allreduce(b: &mut Builder, query: &Query) {
    b.prepare(b.all());
    let order = query.members_by_host().concat();
    b.within(&order, b.all(), core);
}

/// Reduces, finishes and distributes the chunks in view among the members in view.
pub(super) fn core(b: &mut Builder) {
    let (p, r, count) = (b.size(), b.me(), b.chunks());
    let part = move |i: u32| part_of(count, i, p);
    reduce_scatter(b, &part);
    b.finish(part(r));
    all_gather(b, &part);
}

pub(super) fn reducescatter(b: &mut Builder, query: &Query) {
    b.all().for_each(|c| b.prepare(c..c + 1));
    let me = b.me();
    let order = query.members_by_host().concat();
    b.within(&order, b.all(), |b| reduce_scatter(b, &|i| chunk_of(&order, i)));
    b.finish(me..me + 1);
}

pub(super) fn allgather(b: &mut Builder, query: &Query) {
    let me = b.me();
    let order = query.members_by_host().concat();
    b.within(&order, b.all(), |b| all_gather(b, &|i| chunk_of(&order, i)));
    b.relocate(me..me + 1);
}

/// The chunk of the member at position `i` of a circle.
pub(super) fn chunk_of(order: &[u32], i: u32) -> Range<u32> {
    let member = order[i as usize % order.len()];
    member..member + 1
}

fn part_of(count: u32, i: u32, p: u32) -> Range<u32> {
    let at = |i: u32| (u64::from(i) * u64::from(count) / u64::from(p)) as u32;
    at(i % p)..at(i % p + 1)
}

/// The part of position `i` ends, reduced, on the member at position `i`.
pub(super) fn reduce_scatter(b: &mut Builder, part: &dyn Fn(u32) -> Range<u32>) {
    let (p, r) = (b.size(), b.me());
    for s in 0..p - 1 {
        let passing = part(r + 2 * p - s - 1);
        b.send((r + 1) % p, passing.clone());
        b.discard(passing);
        b.recv_reduce((r + p - 1) % p, part(r + 2 * p - s - 2));
    }
}

/// The part of position `i` begins on the member at position `i` and ends on all.
pub(super) fn all_gather(b: &mut Builder, part: &dyn Fn(u32) -> Range<u32>) {
    let (p, r) = (b.size(), b.me());
    for s in 0..p - 1 {
        b.send((r + 1) % p, part(r + p - s));
        b.recv((r + p - 1) % p, part(r + 2 * p - s - 1));
    }
}

pub(super) fn allreduce_load(query: &Query) -> Load {
    reducescatter_load(query) + allgather_load(query)
}
pub(super) fn reducescatter_load(query: &Query) -> Load {
    let reduced = allgather_load(query).near.port_bytes.max(allgather_load(query).far.port_bytes);
    Load { path_reduced: reduced, port_reduced: reduced, ..allgather_load(query) }
}
pub(super) fn allgather_load(query: &Query) -> Load {
    let s = Shape::of(query);
    let bytes = s.n * (s.p - 1.0) / s.p;
    let hops = if s.is_far() { s.h } else { 0.0 };
    let leg = |used: bool, steps: f64| match used {
        true => Leg { steps, path_bytes: bytes, port_bytes: bytes },
        false => Leg::default(),
    };
    // A part passes each link once; the slowest link sets the pace.
    Load {
        near: Leg { steps: s.p - 1.0 - hops.min(s.p - 1.0), ..leg(!s.is_far(), 0.0) },
        far: leg(s.is_far(), hops.min(s.p - 1.0)),
        messages: s.p - 1.0,
        ..Load::default()
    }
}
