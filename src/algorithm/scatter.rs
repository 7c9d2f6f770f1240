//! Scatter: the root sends every member its block.
//!
//! Steps: 1. Bytes: the root sends `n (p - 1) / p`, which no algorithm can avoid. Source: E. Chan et al., CCPE 19
//! (2007), section 4.
#![forbid(unsafe_code)]

use super::{Builder, Load, Query, direct};

pub(super) fn scatter(b: &mut Builder, query: &Query) {
    let (p, r, root) = (b.size(), b.me(), query.root);
    if r != root {
        b.recv(root, r..r + 1);
        return;
    }
    for i in 1..p {
        let to = (root + i) % p;
        b.send(to, to..to + 1);
    }
    b.relocate(r..r + 1);
}

pub(super) fn load(query: &Query) -> Load {
    direct::rooted_load(query, query.bytes as f64 / f64::from(query.size()))
}
