//! Gather: every member sends its block to the root.
//!
//! Steps: 1. Bytes: the root receives `n (p - 1) / p`, which no algorithm can avoid; forwarding along a tree would
//! save messages at the root and cost bytes elsewhere. Source: E. Chan et al., CCPE 19 (2007), section 4.
#![forbid(unsafe_code)]

use super::{Builder, Load, Query, direct};

pub(super) fn gather(b: &mut Builder, query: &Query) {
    let (p, r, root) = (b.size(), b.me(), query.root);
    if r != root {
        b.send(root, r..r + 1);
        return;
    }
    for i in 1..p {
        let from = (root + i) % p;
        b.recv(from, from..from + 1);
    }
    b.relocate(r..r + 1);
}

pub(super) fn load(query: &Query) -> Load {
    direct::rooted_load(query, query.bytes as f64 / f64::from(query.size()))
}
