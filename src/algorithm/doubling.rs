//! Recursive halving and doubling. Allreduce halves the vector while the distance of the partners doubles
//! (1, 2, 4...), and mirrors that to gather. Other numbers of members are binary blocks, the largest first: 7 is
//! 4 + 2 + 1. Each block reduces within itself, the smallest hands its parts to the next larger one, and so on.
//! With the distances in this order, every element is summed exactly in the canonical binary tree.
//!
//! | | steps | bytes sent and received by each member |
//! | --- | --- | --- |
//! | allreduce, `p = 2^k` | `2 log2 p` | `2 n (p - 1) / p` |
//! | allreduce, other `p` | about 2 more for each further binary digit | up to `n` more |
//! | reduce-scatter, all-gather, `p = 2^k` | `log2 p` | `n (p - 1) / p` |
//!
//! The collectives by block halve the distance instead, so that messages are runs of neighbouring chunks; that
//! is not the canonical order. Source: R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of collective
//! communication operations in MPICH", IJHPCA 19 (2005), section 4.5; binary blocks: R. Rabenseifner, J. L.
//! Träff, "More efficient reduction algorithms for non-power-of-two number of processors", EuroPVM/MPI 2004.
#![forbid(unsafe_code)]

use super::load::{Shape, log2_ceil};
use super::{Builder, Leg, Load, Query};
use std::ops::Range;

/// As many chunks as the largest block has members.
pub(super) fn chunks(query: &Query) -> u32 {
    1 << query.size().ilog2()
}

pub(super) fn allreduce(b: &mut Builder, _: &Query) {
    b.prepare(b.all());
    core(b);
}

/// Reduces, finishes and distributes the chunks in view among the members in view. The number of chunks must be
/// a multiple of the largest block.
pub(super) fn core(b: &mut Builder) {
    let blocks = blocks(b.size());
    let mine = blocks.iter().rposition(|block| block.first <= b.me()).expect("the first block begins at 0");
    reduce_in_block(b, blocks[mine]);
    // From the smallest block up: take in what the smaller one has, then hand on.
    if let Some(&smaller) = blocks.get(mine + 1) {
        let peer = smaller.member(b.me() - blocks[mine].first);
        b.recv_reduce(peer, blocks[mine].part(b, b.me()));
    }
    let finished = blocks[mine].part(b, b.me());
    if mine == 0 {
        b.finish(finished);
    } else {
        for peer in blocks[mine].peers_in(blocks[mine - 1], b.me()) {
            b.send(peer, blocks[mine - 1].part(b, peer));
        }
        for peer in blocks[mine].peers_in(blocks[mine - 1], b.me()) {
            b.recv(peer, blocks[mine - 1].part(b, peer));
        }
    }
    if let Some(&smaller) = blocks.get(mine + 1) {
        let peer = smaller.member(b.me() - blocks[mine].first);
        b.send(peer, blocks[mine].part(b, b.me()));
    }
    gather_in_block(b, blocks[mine]);
}

/// Members `first..first + (1 << bits)`.
#[derive(Clone, Copy)]
struct Block {
    first: u32,
    bits: u32,
}

/// The binary digits of the size, the largest first.
fn blocks(size: u32) -> Vec<Block> {
    let mut first = 0;
    let mut blocks = vec![];
    for bits in (0..32).rev().filter(|bit| size >> bit & 1 == 1) {
        blocks.push(Block { first, bits });
        first += 1 << bits;
    }
    blocks
}

impl Block {
    /// The member of this block that shares parts with index `i` of another block.
    fn member(self, i: u32) -> u32 {
        self.first + i % (1 << self.bits)
    }
    /// The members of the larger block `other` whose parts lie in the part of `me`.
    fn peers_in(self, other: Block, me: u32) -> impl Iterator<Item = u32> {
        let i = me - self.first;
        (0..1u32 << (other.bits - self.bits)).map(move |k| other.first + i + (k << self.bits))
    }
    /// What `member` holds after all halvings.
    fn part(self, b: &Builder, member: u32) -> Range<u32> {
        part(b.chunks(), member - self.first, self.bits)
    }
}

/// What index `i` holds after the first `steps` halvings: bit `j` of `i` chooses the half at step `j`.
fn part(chunks: u32, i: u32, steps: u32) -> Range<u32> {
    let (mut start, mut count) = (0, chunks);
    for j in 0..steps {
        assert!(count % 2 == 0, "{chunks} chunks cannot be halved {steps} times");
        count /= 2;
        start += (i >> j & 1) * count;
    }
    start..start + count
}

fn reduce_in_block(b: &mut Builder, block: Block) {
    let i = b.me() - block.first;
    for step in 0..block.bits {
        let partner = i ^ (1 << step);
        b.send(block.first + partner, part(b.chunks(), partner, step + 1));
        b.recv_reduce(block.first + partner, part(b.chunks(), i, step + 1));
    }
}

fn gather_in_block(b: &mut Builder, block: Block) {
    let i = b.me() - block.first;
    for step in (0..block.bits).rev() {
        let partner = i ^ (1 << step);
        b.send(block.first + partner, part(b.chunks(), i, step + 1));
        b.recv(block.first + partner, part(b.chunks(), partner, step + 1));
    }
}

pub(super) fn gathers(query: &Query) -> Result<(), &'static str> {
    if query.size().is_power_of_two() { Ok(()) } else { Err("the size is not a power of two") }
}
pub(super) fn scatters(query: &Query) -> Result<(), &'static str> {
    gathers(query)?;
    super::sums_in_any_order(query)
}

pub(super) fn allgather(b: &mut Builder, _: &Query) {
    let (p, r) = (b.size(), b.me());
    let mut distance = 1;
    // The first exchange may send from the input; later ones send runs that include the own chunk.
    b.relocate(r..r + 1);
    while distance < p {
        let partner = r ^ distance;
        b.send(partner, aligned(r, distance));
        b.recv(partner, aligned(partner, distance));
        distance *= 2;
    }
}

pub(super) fn reducescatter(b: &mut Builder, _: &Query) {
    let (p, r) = (b.size(), b.me());
    b.prepare(b.all());
    let mut distance = p / 2;
    while distance > 0 {
        let partner = r ^ distance;
        b.send(partner, aligned(partner, distance));
        b.recv_reduce(partner, aligned(r, distance));
        distance /= 2;
    }
    b.finish(r..r + 1);
}

/// The aligned run of `count` chunks around `i`.
fn aligned(i: u32, count: u32) -> Range<u32> {
    i / count * count..i / count * count + count
}

pub(super) fn allreduce_load(query: &Query) -> Load {
    let s = Shape::of(query);
    let (steps, bytes) = one_way(s.n, query.size());
    let load = one_way_load(&s, steps, bytes);
    let reduced = Load { path_reduced: bytes, port_reduced: bytes, ..load };
    reduced + load
}
/// Steps and bytes of the busiest member until everything is reduced; as many again to distribute it.
pub(super) fn one_way(n: f64, size: u32) -> (f64, f64) {
    let (bits, blocks) = (size.ilog2(), size.count_ones());
    let largest = f64::from(1u32 << bits);
    // Handing on between blocks costs the smaller one as much as its part is large.
    let extra = if blocks > 1 { n / 2.0 } else { 0.0 };
    (f64::from(bits + blocks - 1), n * (largest - 1.0) / largest + extra)
}
pub(super) fn allgather_load(query: &Query) -> Load {
    let s = Shape::of(query);
    let leg = |steps, bytes| Leg { steps, path_bytes: bytes, port_bytes: bytes };
    let steps = log2_ceil(s.p);
    let near_steps = log2_ceil(s.l).min(steps);
    // What is far away is most of the vector, and every member of a host fetches it through the one port.
    let far_bytes = s.l * s.n * (s.p - s.l) / s.p;
    Load {
        near: leg(near_steps, s.n * (s.l - 1.0) / s.p),
        far: leg(steps - near_steps, far_bytes),
        messages: steps,
        ..Load::default()
    }
}
pub(super) fn reducescatter_load(query: &Query) -> Load {
    let load = allgather_load(query);
    let bytes = query.bytes as f64 * (1.0 - 1.0 / f64::from(query.size()));
    Load { path_reduced: bytes, port_reduced: bytes, ..load }
}

/// Neighbours exchange first and most. Between hosts only the later steps pass, but every member of a host takes
/// part in them through the one port of the host.
fn one_way_load(s: &Shape, steps: f64, bytes: f64) -> Load {
    let leg = |steps, bytes| Leg { steps, path_bytes: bytes, port_bytes: bytes };
    if !s.is_far() {
        return Load { near: leg(steps, bytes), messages: steps, ..Load::default() };
    }
    let near_steps = if s.l > 1.0 { log2_ceil(s.l).min(steps) } else { 0.0 };
    let near_bytes = bytes * (s.l - 1.0) / s.l;
    // After the halvings inside, each of the l members sends 1/l of what is left.
    let far_bytes = (bytes - near_bytes) * s.l;
    let (near, far) = (leg(near_steps, near_bytes), leg(steps - near_steps, far_bytes));
    Load { near, far, messages: steps, ..Load::default() }
}
