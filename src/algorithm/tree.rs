//! Binary tree. The vector flows up to the root, is finished there and flows down again. Windows pipeline it:
//! while one window goes up a level, the next one follows.
//!
//! | | steps | bytes sent and received by an inner member |
//! | --- | --- | --- |
//! | broadcast | `log2 p` | sends `2 n`, receives `n` |
//! | reduce | `log2 p` | sends `n`, receives `2 n` |
//! | allreduce | `2 log2 p` | `3 n` each |
//!
//! Deterministic mode reduces along a binomial tree towards member 0 instead, which is the canonical tree: each
//! member `r` takes in `r + 1`, `r + 2`, `r + 4`... as long as these are its children. Source: P. Sanders,
//! J. Speck, J. L. Träff, "Two-tree algorithms for full bandwidth broadcast, reduction and scan", Parallel
//! Computing 35 (2009), section 2; binomial: R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of collective
//! communication operations in MPICH", IJHPCA 19 (2005), section 4.
#![forbid(unsafe_code)]

use super::load::{Shape, log2_ceil};
use super::{Builder, Leg, Load, Query};

pub(super) fn allreduce(b: &mut Builder, query: &Query) {
    b.prepare(b.all());
    if query.strict {
        reduce_in_order(b);
    } else {
        reduce_to(b, 0);
    }
    if b.me() == 0 {
        b.finish(b.all());
    }
    broadcast_from(b, 0);
}

pub(super) fn reduce(b: &mut Builder, query: &Query) {
    b.prepare(b.all());
    if query.strict {
        reduce_in_order(b);
        if b.me() == 0 {
            b.finish(b.all());
        }
        hand_over(b, query.root);
    } else {
        reduce_to(b, query.root);
        if b.me() == query.root {
            b.finish(b.all());
        }
    }
}

pub(super) fn broadcast(b: &mut Builder, query: &Query) {
    broadcast_from(b, query.root);
    b.relocate(b.all());
}

/// What member 0 has goes to `root`.
pub(super) fn hand_over(b: &mut Builder, root: u32) {
    if root == 0 {
        return;
    }
    if b.me() == 0 {
        b.send(root, b.all());
    } else if b.me() == root {
        b.recv(0, b.all());
    }
}

/// Reduces the chunks in view to member `root` of the view, in any order.
pub(super) fn reduce_to(b: &mut Builder, root: u32) {
    let (parent, children) = neighbours(b, root);
    for child in children {
        b.recv_reduce(child, b.all());
    }
    if let Some(parent) = parent {
        b.send(parent, b.all());
    }
}

/// Distributes the chunks in view from member `root` of the view.
pub(super) fn broadcast_from(b: &mut Builder, root: u32) {
    let (parent, children) = neighbours(b, root);
    if let Some(parent) = parent {
        b.recv(parent, b.all());
    }
    for child in children {
        b.send(child, b.all());
    }
}

/// Parent and children in a binary tree whose root is renamed to 0.
fn neighbours(b: &Builder, root: u32) -> (Option<u32>, Vec<u32>) {
    let p = u64::from(b.size());
    let v = (u64::from(b.me()) + p - u64::from(root)) % p;
    let name = |v: u64| ((v + u64::from(root)) % p) as u32;
    let parent = (v > 0).then(|| name((v - 1) / 2));
    (parent, (2 * v + 1..=2 * v + 2).filter(|&c| c < p).map(name).collect())
}

/// Reduces to member 0 in the canonical tree.
fn reduce_in_order(b: &mut Builder) {
    let (p, r) = (b.size(), b.me());
    let mut distance = 1;
    while distance < p {
        if r & distance != 0 {
            b.send(r - distance, b.all());
            return;
        }
        if r + distance < p {
            b.recv_reduce(r + distance, b.all());
        }
        distance *= 2;
    }
}

pub(super) fn allreduce_load(query: &Query) -> Load {
    reduce_load(query) + broadcast_load(query)
}
pub(super) fn reduce_load(query: &Query) -> Load {
    let s = Shape::of(query);
    let reduced = (s.p - 1.0).min(2.0) * s.n;
    Load { path_reduced: reduced * log2_ceil(s.p), port_reduced: reduced, ..broadcast_load(query) }
}
pub(super) fn broadcast_load(query: &Query) -> Load {
    load_from(query, query.root)
}

/// Walks the tree once: which edges pass between hosts depends on where the members are.
fn load_from(query: &Query, root: u32) -> Load {
    let (p, n) = (query.hosts.len(), query.bytes as f64);
    let host = |v: usize| query.hosts[(v + root as usize) % p] as usize;
    let hosts = query.hosts.iter().max().map_or(1, |h| *h as usize + 1);
    let (mut out, mut into) = (vec![0.0; hosts], vec![0.0; hosts]);
    // For each member, what lies between it and the root: (near steps, near bytes, far steps, far bytes).
    let mut ways = vec![[0.0; 4]; p];
    for v in 1..p {
        let parent = (v - 1) / 2;
        let is_far = |child: usize| host(child) != host(parent);
        // The second child is served after the first, if both are on the same kind of wire.
        let turn = if v % 2 == 0 && is_far(v - 1) == is_far(v) { 2.0 } else { 1.0 };
        ways[v] = ways[parent];
        let at = if is_far(v) { 2 } else { 0 };
        ways[v][at] += 1.0;
        ways[v][at + 1] += turn * n;
        if is_far(v) {
            out[host(parent)] += n;
            into[host(v)] += n;
        }
    }
    let far_port = out.iter().chain(&into).fold(0.0, |a: f64, b| a.max(*b));
    let longest =
        ways.iter().max_by(|a, b| (a[2], a[3], a[1]).partial_cmp(&(b[2], b[3], b[1])).expect("finite"));
    let [near_steps, near_bytes, far_steps, far_bytes] = *longest.expect("there is a member");
    let near_port = near_bytes.min(2.0 * n);
    Load {
        near: Leg { steps: near_steps, path_bytes: near_bytes, port_bytes: near_port },
        far: Leg { steps: far_steps, path_bytes: far_bytes.max(far_port), port_bytes: far_port },
        messages: (p as f64 - 1.0).min(3.0),
        ..Load::default()
    }
}

/// The load of one direction over `p` members, of which `l` share a port when they are far.
pub(super) fn load_of(n: f64, p: f64, far: bool, l: f64) -> Load {
    if p <= 1.0 {
        return Load::default();
    }
    let depth = ((p + 1.0) as u64).ilog2() as f64;
    let busy = if p > 2.0 { 2.0 * n } else { n };
    let leg = Leg { steps: depth, path_bytes: depth * busy, port_bytes: busy };
    let leg_far = Leg { port_bytes: (busy + (l - 1.0) * n).max(busy), ..leg };
    let (near, far) = if far { (Leg::default(), leg_far) } else { (leg, Leg::default()) };
    Load { near, far, messages: (p - 1.0).min(3.0), ..Load::default() }
}
