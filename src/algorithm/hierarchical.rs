//! Hierarchical: what can stay inside a host stays there. With equally many members on each host every member
//! drives the network at once, on its own rail (the members with the same place on their hosts); otherwise each
//! host has a leader.
//!
//! With `h` hosts of `l` members:
//!
//! | | steps inside | steps between | bytes out of and into a host |
//! | --- | --- | --- | --- |
//! | allreduce, even | 2 | `2 log2 h` or `2 (h - 1)` | `2 n (h - 1) / h` |
//! | allreduce, leaders | `2 log2 l` | the same | `2 n (h - 1) / h` |
//! | reduce-scatter, all-gather, even | 1 | `h - 1` | `n (h - 1) / h` |
//! | broadcast, reduce | `log2 l` | `log2 h` | `2 n` at most |
//!
//! Source: A. Sergeev, M. Del Balso, "Horovod", 2018 (its hierarchical allreduce); rails: NVIDIA NCCL's PXN and
//! M. Cho et al., "BlueConnect", SysML 2019.
#![forbid(unsafe_code)]

use super::load::{Shape, log2_ceil};
use super::{Builder, Leg, Load, Query, doubling, ring, tree};

pub(super) fn fits(query: &Query) -> Result<(), &'static str> {
    let hosts = query.members_by_host();
    if hosts.len() < 2 {
        return Err("all members are on one host");
    }
    if hosts.iter().all(|host| host.len() == 1) {
        return Err("every member is alone on its host");
    }
    Ok(())
}
pub(super) fn sums(query: &Query) -> Result<(), &'static str> {
    fits(query)?;
    super::sums_in_any_order(query)
}
pub(super) fn gathers(query: &Query) -> Result<(), &'static str> {
    fits(query)?;
    if is_even(&query.members_by_host()) { Ok(()) } else { Err("hosts have unequal numbers of members") }
}
pub(super) fn scatters(query: &Query) -> Result<(), &'static str> {
    gathers(query)?;
    super::sums_in_any_order(query)
}

/// Up to this size an allreduce across hosts is a matter of latency: doubling even where their number is not a
/// power of two, although it then moves more bytes than a ring.
const LATENCY_BYTES: u64 = 256 << 10;

fn doubles(query: &Query, hosts: usize) -> bool {
    hosts.is_power_of_two() || query.bytes <= LATENCY_BYTES
}

fn is_even(hosts: &[Vec<u32>]) -> bool {
    hosts.iter().all(|host| host.len() == hosts[0].len())
}

/// Allreduce: a part for each rail, cut again for the allreduce across hosts.
pub(super) fn chunks(query: &Query) -> u32 {
    let hosts = query.members_by_host();
    let parts = if doubles(query, hosts.len()) { 1 << hosts.len().ilog2() } else { hosts.len() as u32 };
    if is_even(&hosts) { parts * hosts[0].len() as u32 } else { parts }
}

pub(super) fn allreduce(b: &mut Builder, query: &Query) {
    let hosts = query.members_by_host();
    b.prepare(b.all());
    let across = if doubles(query, hosts.len()) { doubling::core } else { ring::core };
    if is_even(&hosts) {
        allreduce_on_rails(b, &hosts, across);
    } else {
        allreduce_by_leaders(b, &hosts, across);
    }
}

fn allreduce_on_rails(b: &mut Builder, hosts: &[Vec<u32>], across: fn(&mut Builder)) {
    let (host, place) = position(b, hosts);
    let local = hosts[0].len() as u32;
    b.within(&hosts[host], b.all(), |b| {
        for i in 1..local {
            b.send((place + i) % local, b.part(place + i, local));
        }
        for i in 1..local {
            b.recv_reduce((place + local - i) % local, b.part(place, local));
        }
    });
    b.within(&rail(hosts, place), b.part(place, local), across);
    b.within(&hosts[host], b.all(), |b| {
        for i in 1..local {
            b.send((place + i) % local, b.part(place, local));
        }
        for i in 1..local {
            b.recv((place + local - i) % local, b.part(place + local - i, local));
        }
    });
}

fn allreduce_by_leaders(b: &mut Builder, hosts: &[Vec<u32>], across: fn(&mut Builder)) {
    let (host, _) = position(b, hosts);
    let leaders: Vec<u32> = hosts.iter().map(|host| host[0]).collect();
    b.within(&hosts[host], b.all(), |b| tree::reduce_to(b, 0));
    b.within(&leaders, b.all(), across);
    b.within(&hosts[host], b.all(), |b| tree::broadcast_from(b, 0));
}

pub(super) fn reduce(b: &mut Builder, query: &Query) {
    let hosts = query.members_by_host();
    let (host, _) = position(b, &hosts);
    let (leaders, leader, root) = leaders(&hosts, host, query.root);
    b.prepare(b.all());
    b.within(&hosts[host], b.all(), |b| tree::reduce_to(b, leader));
    b.within(&leaders, b.all(), |b| tree::reduce_to(b, root));
    if b.me() == query.root {
        b.finish(b.all());
    }
}

pub(super) fn broadcast(b: &mut Builder, query: &Query) {
    let hosts = query.members_by_host();
    let (host, _) = position(b, &hosts);
    let (leaders, leader, root) = leaders(&hosts, host, query.root);
    b.within(&leaders, b.all(), |b| tree::broadcast_from(b, root));
    b.within(&hosts[host], b.all(), |b| tree::broadcast_from(b, leader));
    b.relocate(b.all());
}

pub(super) fn reducescatter(b: &mut Builder, query: &Query) {
    let hosts = query.members_by_host();
    let (host, place) = position(b, &hosts);
    let me = b.me();
    b.all().for_each(|c| b.prepare(c..c + 1));
    // What belongs to a rail goes to the member of that rail on this host.
    b.within(&hosts[host], b.all(), |b| {
        let local = b.size();
        for to in (1..local).map(|i| (place + i) % local) {
            for chunk in rail(&hosts, to) {
                b.send(to, chunk..chunk + 1);
                b.discard(chunk..chunk + 1);
            }
        }
        for from in (1..local).map(|i| (place + local - i) % local) {
            for chunk in rail(&hosts, place) {
                b.recv_reduce(from, chunk..chunk + 1);
            }
        }
    });
    let rail = rail(&hosts, place);
    b.within(&rail, b.all(), |b| ring::reduce_scatter(b, &|i| ring::chunk_of(&rail, i)));
    b.finish(me..me + 1);
}

pub(super) fn allgather(b: &mut Builder, query: &Query) {
    let hosts = query.members_by_host();
    let (host, place) = position(b, &hosts);
    let me = b.me();
    let mine = rail(&hosts, place);
    b.within(&mine, b.all(), |b| ring::all_gather(b, &|i| ring::chunk_of(&mine, i)));
    b.within(&hosts[host], b.all(), |b| {
        let local = b.size();
        for to in (1..local).map(|i| (place + i) % local) {
            mine.iter().for_each(|&chunk| b.send(to, chunk..chunk + 1));
        }
        for from in (1..local).map(|i| (place + local - i) % local) {
            rail(&hosts, from).into_iter().for_each(|chunk| b.recv(from, chunk..chunk + 1));
        }
    });
    b.relocate(me..me + 1);
}

/// The host of this member, and its place there.
fn position(b: &Builder, hosts: &[Vec<u32>]) -> (usize, u32) {
    let place = |host: &Vec<u32>| host.binary_search(&b.me()).ok();
    let found = hosts.iter().enumerate().find_map(|(h, host)| Some((h, place(host)? as u32)));
    found.expect("every member has a host")
}

/// The members with this place on their hosts.
fn rail(hosts: &[Vec<u32>], place: u32) -> Vec<u32> {
    hosts.iter().map(|host| host[place as usize]).collect()
}

/// One leader for each host, the root being its own host's; the leader's place on `host`; the root's host.
fn leaders(hosts: &[Vec<u32>], host: usize, root: u32) -> (Vec<u32>, u32, u32) {
    let place = |host: &Vec<u32>| host.binary_search(&root).unwrap_or(0);
    let list = hosts.iter().map(|host| host[place(host)]).collect();
    let of_root = hosts.iter().position(|host| host.contains(&root)).expect("every member has a host");
    (list, place(&hosts[host]) as u32, of_root as u32)
}

pub(super) fn allreduce_load(query: &Query) -> Load {
    let s = Shape::of(query);
    let even = is_even(&query.members_by_host());
    let (steps, bytes) = if doubles(query, s.h as usize) {
        doubling::one_way(s.n, s.h as u32)
    } else {
        (s.h - 1.0, s.n * (s.h - 1.0) / s.h)
    };
    let far = Leg { steps: 2.0 * steps, path_bytes: 2.0 * bytes, port_bytes: 2.0 * bytes };
    if !even {
        let down = tree::load_of(s.n, s.l, false, 1.0);
        let reduced = 2.0 * s.n * log2_ceil(s.l) + bytes;
        let across = Load {
            far,
            messages: 2.0 * steps,
            path_reduced: reduced,
            port_reduced: 2.0 * s.n + bytes,
            ..Load::default()
        };
        return down + across + down;
    }
    let inside = s.n * (s.l - 1.0) / s.l;
    let reduced = inside + bytes / s.l;
    Load {
        near: Leg { steps: 2.0, path_bytes: 2.0 * inside, port_bytes: 2.0 * inside },
        far,
        messages: 2.0 * (s.l - 1.0) + 2.0 * steps,
        path_reduced: reduced,
        port_reduced: reduced,
    }
}
pub(super) fn broadcast_load(query: &Query) -> Load {
    let s = Shape::of(query);
    tree::load_of(s.n, s.h, true, 1.0) + tree::load_of(s.n, s.l, false, 1.0)
}
pub(super) fn reduce_load(query: &Query) -> Load {
    let s = Shape::of(query);
    let levels = log2_ceil(s.h) + log2_ceil(s.l);
    let (path_reduced, port_reduced) = (2.0 * s.n * levels, 4.0 * s.n);
    Load { path_reduced, port_reduced, ..broadcast_load(query) }
}
pub(super) fn allgather_load(query: &Query) -> Load {
    let s = Shape::of(query);
    let inside = s.n * (s.l - 1.0) / s.l;
    let between = s.n * (s.h - 1.0) / s.h;
    Load {
        near: Leg { steps: 1.0, path_bytes: inside, port_bytes: inside },
        far: Leg { steps: s.h - 1.0, path_bytes: between, port_bytes: between },
        messages: s.h - 1.0 + (s.l - 1.0) * s.h,
        ..Load::default()
    }
}
pub(super) fn reducescatter_load(query: &Query) -> Load {
    let s = Shape::of(query);
    let reduced = s.n * (s.l - 1.0) / s.l + s.n * (s.h - 1.0) / s.h / s.l;
    Load { path_reduced: reduced, port_reduced: reduced, ..allgather_load(query) }
}
