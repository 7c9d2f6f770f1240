//! Dissemination barrier over one chunk (a byte, or what the engine likes): in round `k` each member tells
//! `r + 2^k` what it has heard and hears `r - 2^k`.
//!
//! Steps: `log2 p` rounded up. Bytes: one chunk a step. A member's input may count more than once in the result, so
//! the chunk's value means nothing; what counts is that it depends on everybody's. Source: D. Hensgen,
//! R. Finkel, U. Manber, "Two algorithms for barrier synchronization", IJPP 17 (1988).
#![forbid(unsafe_code)]

use super::load::{Shape, log2_ceil};
use super::{Builder, Leg, Load, Query};

pub(super) fn barrier(b: &mut Builder, _: &Query) {
    let (p, r) = (b.size(), b.me());
    let mut distance = 1;
    while distance < p {
        b.send((r + distance) % p, b.all());
        b.recv_merge((r + p - distance) % p, b.all());
        distance *= 2;
    }
    b.relocate(b.all());
}

pub(super) fn load(query: &Query) -> Load {
    let s = Shape::of(query);
    let steps = log2_ceil(s.p);
    let leg = Leg { steps, path_bytes: steps * s.n, port_bytes: steps * s.n };
    let (near, far) = if s.is_far() { (Leg::default(), leg) } else { (leg, Leg::default()) };
    Load { near, far, messages: steps, ..Load::default() }
}
