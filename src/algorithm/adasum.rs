//! Adasum along a binomial tree to member 0, in the canonical order, then a broadcast. Each level combines whole
//! tensors, because the weights are dot products over a whole tensor: one chunk, one window.
//!
//! Steps: `2 log2 p`. Bytes: an inner member receives up to `n log2 p` and sends `n` on the way up. Any number of
//! members: a member without a partner waits for the next level. Source: S. Maleki et al., "Scaling distributed
//! training with adaptive summation", MLSys 2021, section 3.
#![forbid(unsafe_code)]

use super::load::{Shape, log2_ceil};
use super::{Builder, Leg, Load, Query, direct, tree};
use crate::types::ReduceOp;

pub(super) fn fits(query: &Query) -> Result<(), &'static str> {
    match query.op {
        ReduceOp::Adasum => Ok(()),
        _ => Err("it serves the operation Adasum alone"),
    }
}

pub(super) fn allreduce(b: &mut Builder, _: &Query) {
    combine_to_first(b);
    tree::broadcast_from(b, 0);
}

pub(super) fn reduce(b: &mut Builder, query: &Query) {
    combine_to_first(b);
    tree::hand_over(b, query.root);
}

fn combine_to_first(b: &mut Builder) {
    let (p, r) = (b.size(), b.me());
    b.prepare(b.all());
    let mut distance = 1;
    while distance < p {
        if r & distance != 0 {
            b.send(r - distance, b.all());
            return;
        }
        if r + distance < p {
            let theirs = b.recv_aside(r + distance, b.all());
            b.combine(b.all(), theirs.clone());
            b.discard_aside(&theirs);
        }
        distance *= 2;
    }
    b.finish(b.all());
}

pub(super) fn allreduce_load(query: &Query) -> Load {
    up_load(query) + tree::broadcast_load(query)
}
pub(super) fn reduce_load(query: &Query) -> Load {
    let one_more = query.bytes as f64 / f64::from(query.size().max(2) - 1);
    let handed = if query.root == 0 { Load::default() } else { direct::rooted_load(query, one_more) };
    up_load(query) + handed
}
fn up_load(query: &Query) -> Load {
    let s = Shape::of(query);
    let levels = log2_ceil(s.p);
    let far_levels = log2_ceil(s.h).min(levels);
    // Neighbours, who share a host, combine first.
    let leg = |steps: f64| Leg { steps, path_bytes: steps * s.n, port_bytes: steps * s.n };
    Load {
        near: leg(levels - far_levels),
        far: leg(far_levels),
        messages: levels,
        // Two passes: the dot products, then the combination.
        path_reduced: 2.0 * levels * s.n,
        port_reduced: 2.0 * levels * s.n,
    }
}
