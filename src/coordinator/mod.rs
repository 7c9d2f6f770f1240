//! Agreement of one process set: which operations are ready on all members, in which order they run.
//! A machine without I/O: facts in, intents out; the time is an argument.
#![forbid(unsafe_code)]

use crate::error::{Cause, Mismatch};
use crate::types::{Member, SharedSignature, TensorKey};
use std::sync::Arc;

/// The engine's number for an operation submitted here; it comes back in intents.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct OpId(pub u32);

/// What all members said with their ready marks: row counts (allgather, gather: one per tensor of the
/// group) or splits (alltoall: one per member and tensor). Empty for other collectives.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CallTable {
    /// Values per member.
    pub width: usize,
    /// `width` values for member 0, then for member 1, and so on; zeros for absent members.
    pub values: Vec<u64>,
}

impl CallTable {
    /// What `member` said.
    #[must_use]
    pub fn of(&self, member: Member) -> &[u64] {
        let start = member.0 as usize * self.width;
        &self.values[start..start + self.width]
    }
}

/// One operation that all members agreed to run now.
#[derive(Clone, Debug)]
pub struct Agreed {
    /// The operation submitted here; `None` when this member has joined and takes part with identities.
    pub op: Option<OpId>,
    /// Its key.
    pub key: TensorKey,
    /// Its name.
    pub name: Arc<str>,
    /// What was agreed. (For an allgather and the like, the first dimensions are in `call`.)
    pub signature: SharedSignature,
    /// Members that did not submit it because they have joined; usually empty.
    pub absent: Arc<[Member]>,
    /// Row counts or splits.
    pub call: Arc<CallTable>,
}

/// What the engine is to do.
#[derive(Clone, Debug)]
pub enum Intent {
    /// Send this message (encoded by `wire`) to a member: the parent or a child in the tree.
    Tell {
        /// Whom.
        to: Member,
        /// What; hand it back with `Coordinator::recycle` so that its memory is used again.
        message: Vec<u8>,
    },
    /// Run these, in this order. One cut of the agreed log: the same list on every member, so that `fuse`
    /// may be applied to it. Hand it back with `Coordinator::recycle_cut`.
    Run(Vec<Agreed>),
    /// This operation failed on every member, with the same words.
    Failed {
        /// The operation.
        op: OpId,
        /// Why.
        mismatch: Arc<Mismatch>,
    },
    /// All members have joined; `last` was the last. Completes the Join operation `op`.
    Joined {
        /// The Join operation submitted here.
        op: OpId,
        /// The last member to join, in agreed order.
        last: Member,
    },
    /// An operation waits for members that have not submitted it. For the log.
    Warn(String),
    /// A limit was passed or a member sent what no correct one sends: the epoch must end.
    Break(Option<Member>, Cause),
}
