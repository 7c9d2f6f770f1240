//! Direct exchange. Each member receives everybody's part `me` of the vector, reduces all of them at once in
//! member order (one rounding, the canonical tree), and sends the result to all. For tiny vectors there is a shape of
//! one step: everybody sends everything to everybody, and each reduces all.
//!
//! | | steps | messages | bytes sent and received by each member |
//! | --- | --- | --- | --- |
//! | allreduce | 2 | `2 (p - 1)` | `2 n (p - 1) / p` |
//! | allreduce, tiny | 1 | `p - 1` | `n (p - 1)` |
//! | reduce-scatter, all-gather | 1 | `p - 1` | `n (p - 1) / p` |
//! | broadcast | 1 | `p - 1` at the root | `n (p - 1)` at the root |
//!
//! Source: E. Chan, M. Heimlich, A. Purkayastha, R. van de Geijn, "Collective communication: theory, practice, and
//! experience", CCPE 19 (2007), section 4; as one kernel: NVIDIA TensorRT-LLM's one-shot and two-shot allreduce.
#![forbid(unsafe_code)]

use super::load::Shape;
use super::{Builder, Leg, Load, Query};
use crate::schedule::Span;
use std::ops::Range;

/// Bytes that every member may send in all for the shape of one step: about what a second step costs.
const ONE_STEP_BYTES: u64 = 32 << 10;

/// One chunk means the shape of one step.
pub(super) fn chunks(query: &Query) -> u32 {
    let others = u64::from(query.size() - 1);
    if query.bytes.saturating_mul(others) <= ONE_STEP_BYTES { 1 } else { query.size() }
}

pub(super) fn allreduce(b: &mut Builder, query: &Query) {
    if b.chunks() == 1 {
        for to in others(b) {
            b.send(to, b.all());
        }
        reduce_all(b, b.all());
        return;
    }
    reduce_own_part(b, query);
    for to in others(b) {
        b.send(to, own(b));
    }
    for from in senders(b) {
        b.recv(from, from..from + 1);
    }
}

pub(super) fn reducescatter(b: &mut Builder, query: &Query) {
    reduce_own_part(b, query);
}

pub(super) fn reduce(b: &mut Builder, query: &Query) {
    let root = query.root;
    if b.chunks() == 1 {
        if b.me() == root {
            reduce_all(b, b.all());
        } else {
            b.send(root, b.all());
        }
        return;
    }
    reduce_own_part(b, query);
    if b.me() == root {
        for from in senders(b) {
            b.recv(from, from..from + 1);
        }
    } else {
        b.send(root, own(b));
    }
}

pub(super) fn allgather(b: &mut Builder, _: &Query) {
    for to in others(b) {
        b.send(to, own(b));
    }
    for from in senders(b) {
        b.recv(from, from..from + 1);
    }
    b.relocate(own(b));
}

pub(super) fn broadcast(b: &mut Builder, query: &Query) {
    if b.me() == query.root {
        for to in others(b) {
            b.send(to, b.all());
        }
        b.relocate(b.all());
    } else {
        b.recv(query.root, b.all());
    }
}

/// Part `i` of everybody's vector goes to member `i`, which reduces it.
fn reduce_own_part(b: &mut Builder, query: &Query) {
    for to in others(b) {
        b.send(to, to..to + 1);
    }
    if query.size() == 2 && !query.prescaled && !query.dtype.is_half() {
        // One other operand is reduced as it arrives. (Of a prescaled value or a 16-bit one, whose final scale
        // belongs into the accumulator, that would be another rounding.)
        b.recv_reduce(1 - b.me(), own(b));
        b.finish(own(b));
        return;
    }
    reduce_all(b, own(b));
}

/// Receives everybody's value of these chunks and reduces them in member order.
fn reduce_all(b: &mut Builder, chunks: Range<u32>) {
    let mut srcs: Vec<(u32, Span)> =
        senders(b).map(|from| (from, b.recv_aside(from, chunks.clone()))).collect();
    srcs.push((b.me(), b.value(chunks.clone())));
    srcs.sort_by_key(|(member, _)| *member);
    b.reduce_many(chunks, srcs.into_iter().map(|(_, span)| span).collect());
}

/// The others, each member beginning with its right neighbour, so that not all begin with the same one.
fn others(b: &Builder) -> impl Iterator<Item = u32> + use<> {
    let (p, r) = (b.size(), b.me());
    (1..p).map(move |i| (r + i) % p)
}
/// The others, in the order in which they send to this one: with few landing buffers, receives in another order
/// wait in a circle.
fn senders(b: &Builder) -> impl Iterator<Item = u32> + use<> {
    let (p, r) = (b.size(), b.me());
    (1..p).map(move |i| (r + p - i) % p)
}
fn own(b: &Builder) -> Range<u32> {
    b.me()..b.me() + 1
}

pub(super) fn allreduce_load(query: &Query) -> Load {
    let s = Shape::of(query);
    if chunks(query) == 1 {
        let reduced = s.n * (s.p - 1.0);
        return Load { path_reduced: reduced, port_reduced: reduced, ..s.spread(s.n) };
    }
    reducescatter_load(query) + allgather_load(query)
}
pub(super) fn reducescatter_load(query: &Query) -> Load {
    let s = Shape::of(query);
    let reduced = s.n * (s.p - 1.0) / s.p;
    Load { path_reduced: reduced, port_reduced: reduced, ..s.spread(s.n / s.p) }
}
pub(super) fn allgather_load(query: &Query) -> Load {
    let s = Shape::of(query);
    s.spread(s.n / s.p)
}
pub(super) fn reduce_load(query: &Query) -> Load {
    let s = Shape::of(query);
    if chunks(query) == 1 {
        let reduced = s.n * (s.p - 1.0);
        return Load { path_reduced: reduced, port_reduced: reduced, ..broadcast_load(query) };
    }
    reducescatter_load(query) + rooted_load(query, s.n / s.p)
}
pub(super) fn broadcast_load(query: &Query) -> Load {
    rooted_load(query, query.bytes as f64)
}
/// The root sends `part` bytes to each other member, or receives so much from each.
pub(super) fn rooted_load(query: &Query, part: f64) -> Load {
    let s = Shape::of(query);
    let leg = |used: bool, peers: f64| match used {
        true => Leg { steps: 1.0, path_bytes: peers * part, port_bytes: peers * part },
        false => Leg::default(),
    };
    let near = leg(!s.is_far() && s.p > 1.0, s.p - 1.0);
    Load { near, far: leg(s.is_far(), s.p - s.l), messages: s.p - 1.0, ..Load::default() }
}
