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
    let leg = |used: bool, messages: f64| match used {
        true => Leg { steps, path_bytes: messages * s.n, port_bytes: messages * s.n },
        false => Leg::default(),
    };
    // At distance d, d members of a host (all, when it has fewer) tell members of other hosts.
    let leaving = (0..steps as u32).map(|k| f64::from(1u32 << k).min(s.l)).sum();
    Load { near: leg(!s.is_far(), steps), far: leg(s.is_far(), leaving), messages: steps, ..Load::default() }
}
