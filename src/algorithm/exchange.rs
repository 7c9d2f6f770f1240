//! Pairwise exchange for alltoall: in step `i` each member sends to `r + i` and receives from `r - i`.
//!
//! Steps: `p - 1`, all of them independent. Bytes: each member's splits, less its own; nothing is forwarded.
//! In place is not possible; the engine copies the input where the caller asks for it. Source: R. Thakur,
//! R. Rabenseifner, W. Gropp, IJHPCA 19 (2005), section 3.5 (long messages).
#![forbid(unsafe_code)]

use super::load::Shape;
use super::{Builder, Load, Query};

pub(super) fn alltoall(b: &mut Builder, _: &Query) {
    let (p, r) = (b.size(), b.me());
    for i in 1..p {
        let (to, from) = ((r + i) % p, (r + p - i) % p);
        b.send_input(to, to);
        b.recv_output(from, from);
    }
    b.copy_across(r);
}

pub(super) fn load(query: &Query) -> Load {
    let s = Shape::of(query);
    s.spread(s.n / s.p / s.p)
}
