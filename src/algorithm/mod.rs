//! The table of algorithms. Each is a plain function that writes sequential code against a
//! [`Builder`]; a new one touches its own file and one row here.
#![forbid(unsafe_code)]

pub use crate::schedule::Schedule;
use crate::types::{Collective, DType, ReduceOp};
use std::sync::Arc;

/// Everything that the choice and the building of a schedule may depend on. It is the same on every member,
/// `me` excepted.
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
    /// The member that is the root, where there is one.
    pub root: u32,
    /// Whether a prescale factor other than 1 is given: then the schedule begins with Prepare.
    pub prescaled: bool,
    /// Whether members joined, so that input and output exist on some members only as identities. (Such
    /// members have working memory in their place; schedules need not care.)
    pub strict: bool,
}

impl Query {
    /// Members of the set.
    #[must_use]
    pub fn size(&self) -> u32 {
        self.hosts.len() as u32
    }
}

/// One row of the table.
pub struct Algorithm {
    /// The name that the knob `CAROLE_ALGORITHM` takes: ring, tree, doubling, direct, hierarchical.
    pub name: &'static str,
    /// The collective it serves.
    pub collective: Collective,
    /// Whether it can serve this query; the reason when it cannot.
    pub fits: fn(&Query) -> Result<(), &'static str>,
    /// Chunks to cut each window into.
    pub chunks: fn(&Query) -> u32,
    /// Whether the buffer may be cut into several windows that run the same schedule side by side.
    pub windows: bool,
    /// Writes the steps of `builder.me()`.
    pub build: fn(&mut Schedule, &Query),
}
