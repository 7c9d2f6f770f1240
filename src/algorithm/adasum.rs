//! Adasum along a binomial tree to member 0, in the canonical order, then a broadcast. Each level combines whole
//! tensors, because the weights are dot products over a whole tensor: one chunk, one window.
//!
//! Steps: `2 log2 p`. Bytes: an inner member receives up to `n log2 p` and sends `n` on the way up. Any number of
//! members: a member without a partner waits for the next level. Source: S. Maleki et al., "Scaling distributed
//! training with adaptive summation", MLSys 2021, section 3.
#![forbid(unsafe_code)]

use super::load::{Shape, log2_ceil};
use super::{Builder, Leg, Load, Query, tree};
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

pub(super) fn load(query: &Query) -> Load {
    let s = Shape::of(query);
    let levels = log2_ceil(s.p);
    let leg = Leg { steps: levels, path_bytes: levels * s.n, port_bytes: levels * s.n };
    let (near, far) = if s.is_far() { (Leg::default(), leg) } else { (leg, Leg::default()) };
    let up = Load {
        near,
        far,
        messages: levels,
        // Two passes: the dot products, then the combination.
        path_reduced: 2.0 * levels * s.n,
        port_reduced: 2.0 * levels * s.n,
    };
    up + tree::broadcast_load(query)
}
