//! The table of algorithms. Each is a plain function that writes sequential code against a
//! [`Builder`]; a new one touches its own file and one row here.
#![forbid(unsafe_code)]

mod adasum;
mod barrier;
mod direct;
mod doubling;
mod exchange;
mod gather;
mod hierarchical;
mod load;
mod ring;
mod scatter;
#[cfg(test)]
mod tests;
mod tree;

pub use crate::schedule::{Builder, Goal, Schedule};
pub use load::{Leg, Load};

use crate::types::{Collective, DType, ReduceOp};
use std::sync::Arc;

/// Everything that the choice and the building of a schedule may depend on. It is the same on every member.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Query {
    /// What is to be done.
    pub collective: Collective,
    /// How values are combined.
    pub op: ReduceOp,
    /// Element type.
    pub dtype: DType,
    /// Bytes of the whole tensor or batch (for block collectives: of all members' blocks).
    pub bytes: u64,
    /// For each member, the number of its host (in order of first appearance).
    pub hosts: Arc<[u32]>,
    /// The member that is the root, where there is one; else 0.
    pub root: u32,
    /// Whether a prescale factor other than 1 is given: then the schedule begins with Prepare.
    pub prescaled: bool,
    /// Whether every element must be reduced in the canonical tree (`CAROLE_DETERMINISTIC`).
    pub strict: bool,
}

impl Query {
    /// Members of the set.
    #[must_use]
    pub fn size(&self) -> u32 {
        self.hosts.len() as u32
    }
    /// What schedules for this query must achieve.
    #[must_use]
    pub fn goal(&self, in_place: bool) -> Goal {
        let strict = self.strict && self.collective.reduces();
        let adasum = self.op == ReduceOp::Adasum && self.collective.reduces();
        Goal {
            collective: self.collective,
            root: self.root,
            prescaled: self.prescaled && self.collective.reduces(),
            adasum,
            strict,
            rounded_once: strict && !adasum && self.dtype.is_half(),
            in_place,
        }
    }
    /// Whether there is one chunk per member, in member order, whose lengths differ as the members' rows do.
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        matches!(
            self.collective,
            Collective::Allgather
                | Collective::Reducescatter
                | Collective::Alltoall
                | Collective::Gather
                | Collective::Scatter
        )
    }
    /// For each host, its members.
    #[must_use]
    pub fn members_by_host(&self) -> Vec<Vec<u32>> {
        let mut hosts: Vec<Vec<u32>> = vec![];
        let mut seen = std::collections::HashMap::new();
        for (member, host) in self.hosts.iter().enumerate() {
            let at = *seen.entry(host).or_insert(hosts.len());
            if at == hosts.len() {
                hosts.push(vec![]);
            }
            hosts[at].push(member as u32);
        }
        hosts
    }
}

/// One row of the table.
pub struct Algorithm {
    /// The name that the knob `CAROLE_ALGORITHM` takes: ring, tree, doubling, direct, hierarchical. (Collectives
    /// with only one way to go have names of their own.)
    pub name: &'static str,
    /// The collective it serves.
    pub collective: Collective,
    /// Whether it can serve this query; the reason when it cannot.
    pub fits: fn(&Query) -> Result<(), &'static str>,
    /// Chunks to cut each window into.
    pub chunks: fn(&Query) -> u32,
    /// Whether the buffer may be cut into several windows that run the same schedule side by side.
    pub windows: bool,
    /// Steps and bytes, from which a price is made where building all schedules would take too long.
    pub load: fn(&Query) -> Load,
    /// Writes the steps of `builder.me()`.
    pub build: fn(&mut Builder, &Query),
}

impl std::fmt::Debug for Algorithm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.name, self.collective)
    }
}

impl Algorithm {
    /// The steps of member `me`. They depend on the row, the chunks, and the query's hosts, root, `prescaled` and
    /// `strict`; beyond the chunks not on bytes, dtype or op. So they may be cached by these.
    #[must_use]
    pub fn schedule(&self, me: u32, query: &Query) -> Schedule {
        let chunks = (self.chunks)(query);
        let prescaled = query.prescaled && query.collective.reduces();
        let mut builder = Builder::new(me, query.size(), chunks, query.collective, query.root, prescaled);
        (self.build)(&mut builder, query);
        builder.build()
    }
}

/// Whether there is any algorithm for this operation, whatever the size; the reason when there is none.
pub fn supports(collective: Collective, op: ReduceOp) -> Result<(), &'static str> {
    match collective {
        Collective::Join | Collective::AddSet | Collective::RemoveSet => Err("it moves no data"),
        Collective::Reducescatter if op == ReduceOp::Adasum => {
            Err("Adasum weighs whole tensors; use it with allreduce or reduce")
        }
        _ => Ok(()),
    }
}

/// The algorithm with this name for this collective. Where a name has several rows, the first.
#[must_use]
pub fn find(name: &str, collective: Collective) -> Option<&'static Algorithm> {
    TABLE.iter().find(|row| row.name == name && row.collective == collective)
}

const fn row(
    name: &'static str,
    collective: Collective,
    windows: bool,
    fits: fn(&Query) -> Result<(), &'static str>,
    chunks: fn(&Query) -> u32,
    load: fn(&Query) -> Load,
    build: fn(&mut Builder, &Query),
) -> Algorithm {
    Algorithm { name, collective, fits, chunks, windows, load, build }
}

/// Every algorithm. Among equal prices the first row is chosen.
#[rustfmt::skip]
pub static TABLE: &[Algorithm] = &[
    // name, collective, windows, fits, chunks, load, build
    row("direct", Collective::Allreduce, true, sums, direct::chunks, direct::allreduce_load, direct::allreduce),
    row("doubling", Collective::Allreduce, true, sums_in_order, doubling::chunks, doubling::allreduce_load, doubling::allreduce),
    row("tree", Collective::Allreduce, true, sums_in_order, one, tree::allreduce_load, tree::allreduce),
    row("ring", Collective::Allreduce, true, sums_in_any_order, per_member, ring::allreduce_load, ring::allreduce),
    row("hierarchical", Collective::Allreduce, true, hierarchical::sums, hierarchical::chunks, hierarchical::allreduce_load, hierarchical::allreduce),
    row("adasum", Collective::Allreduce, false, adasum::fits, one, adasum::allreduce_load, adasum::allreduce),
    row("direct", Collective::Reducescatter, false, sums, per_member, direct::reducescatter_load, direct::reducescatter),
    row("doubling", Collective::Reducescatter, false, doubling::scatters, per_member, doubling::reducescatter_load, doubling::reducescatter),
    row("ring", Collective::Reducescatter, false, sums_in_any_order, per_member, ring::reducescatter_load, ring::reducescatter),
    row("hierarchical", Collective::Reducescatter, false, hierarchical::scatters, per_member, hierarchical::reducescatter_load, hierarchical::reducescatter),
    row("direct", Collective::Reduce, true, sums, direct::chunks, direct::reduce_load, direct::reduce),
    row("tree", Collective::Reduce, true, sums_in_order, one, tree::reduce_load, tree::reduce),
    row("hierarchical", Collective::Reduce, true, hierarchical::sums, one, hierarchical::reduce_load, hierarchical::reduce),
    row("adasum", Collective::Reduce, false, adasum::fits, one, adasum::reduce_load, adasum::reduce),
    row("direct", Collective::Allgather, false, always, per_member, direct::allgather_load, direct::allgather),
    row("doubling", Collective::Allgather, false, doubling::gathers, per_member, doubling::allgather_load, doubling::allgather),
    row("ring", Collective::Allgather, false, always, per_member, ring::allgather_load, ring::allgather),
    row("hierarchical", Collective::Allgather, false, hierarchical::gathers, per_member, hierarchical::allgather_load, hierarchical::allgather),
    row("direct", Collective::Broadcast, true, always, one, direct::broadcast_load, direct::broadcast),
    row("tree", Collective::Broadcast, true, always, one, tree::broadcast_load, tree::broadcast),
    row("hierarchical", Collective::Broadcast, true, hierarchical::fits, one, hierarchical::broadcast_load, hierarchical::broadcast),
    row("exchange", Collective::Alltoall, false, always, per_member, exchange::load, exchange::alltoall),
    row("direct", Collective::Gather, false, always, per_member, gather::load, gather::gather),
    row("direct", Collective::Scatter, false, always, per_member, scatter::load, scatter::scatter),
    row("dissemination", Collective::Barrier, false, always, one, barrier::load, barrier::barrier),
];

fn one(_: &Query) -> u32 {
    1
}
fn per_member(query: &Query) -> u32 {
    query.size()
}
fn always(_: &Query) -> Result<(), &'static str> {
    Ok(())
}
/// Sums by ReduceMany: in the canonical tree with one rounding.
fn sums(query: &Query) -> Result<(), &'static str> {
    match query.op {
        ReduceOp::Adasum => Err("Adasum is not a sum of parts"),
        _ => Ok(()),
    }
}
/// Sums two at a time in the canonical tree when asked to.
fn sums_in_order(query: &Query) -> Result<(), &'static str> {
    if query.strict && query.dtype.is_half() {
        return Err("deterministic mode rounds 16-bit types once; this rounds at every step");
    }
    sums(query)
}
/// Sums two at a time in an order of its own.
fn sums_in_any_order(query: &Query) -> Result<(), &'static str> {
    if query.strict {
        return Err("deterministic mode wants the canonical tree; this sums in another order");
    }
    sums(query)
}
