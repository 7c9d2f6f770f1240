//! Agreement of one process set: which operations are ready on all members, in which order they run.
//! A machine without I/O: facts in, intents out; the time is an argument.
//!
//! The members form a [`tree`]. Each sends *marks* up: a name is marked when it was submitted by every member
//! of a subtree (or they have joined). First sight of a name travels with its signature, later marks as a key,
//! and consecutive keys as a range, so a step of a thousand cached tensors is a few bytes. The root orders
//! what is complete into a log and sends *cuts* of it down. Keys, the response cache and its evictions are
//! functions of the log, so they are the same on all members.
//!
//! Marks are exactly-once: a source marks a name once between two cuts of it. A child may send a key that its
//! parent has evicted; the parent answers `Nack` and the child announces by name.
//!
//! There is no cycle time. Own marks are held back until somebody waits, until they amount to a fusion buffer,
//! or for the batching window; what a child's message completes goes on at once, for the child has already
//! spent the window.
//!
//! Small operations that repeat do not come here at all ([`crate::engine::standing`]). Where plans of whole steps would go: a
//! plan is a sequence of cuts that repeats, an entry of the log (`CutItem`), applied by `log::apply`, after which
//! `submit` matches against the plan instead of marking and emits [`Intent::Run`] without a message; a deviation becomes
//! an `UpItem` and its cut again a log entry. Nothing outside this folder changes, since a planned cut is a `Run` like any
//! other.
#![forbid(unsafe_code)]

mod log;
mod marks;
mod mismatch;
mod stall;
mod table;
pub mod tree;

#[cfg(test)]
mod cluster;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_faults;

pub use mismatch::rank_list;
pub use stall::stalled;

use crate::error::{Cause, Mismatch};
use crate::limits::{CONTROL_BYTES_MAX, IN_FLIGHT_MAX, NAME_BYTES_MAX};
use crate::types::{Collective, Member, Rank, SetId, SharedSignature, Signature, TensorKey, Time};
use crate::wire::agreement::{self as wire, Kind, MORE};
use crate::wire::{ENVELOPE_BYTES, begin_coordination};
use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use table::{Held, NumberMap, Table};
use tree::Tree;

/// The engine's number for an operation submitted here; it comes back in intents.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct OpId(pub u32);

/// Names that begin so are the engine's own; no user's does.
pub const ENGINE_NAMES: char = '\0';
/// What names of plans begin with: agreed on as operations are, and run by nobody.
pub const PLAN_NAMES: char = '\u{1}';

/// A name as messages show it.
#[must_use]
pub fn shown(name: &str) -> &str {
    name.strip_prefix(PLAN_NAMES).unwrap_or(name)
}

/// What all members said with their ready marks: row counts (allgather, gather: one per tensor of the
/// group), splits (alltoall: one per member and tensor), or the values of an allreduce that is small enough.
/// Empty for everything else.
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

impl Agreed {
    /// Whether all members' values came with their marks, so that nothing is left to be moved.
    #[must_use]
    pub fn is_inline(&self) -> bool {
        self.signature.collective == Collective::Allreduce && self.call.width > 0 && !self.is_plan()
    }

    /// Whether it is a plan, of which nothing moves now.
    #[must_use]
    pub fn is_plan(&self) -> bool {
        self.name.starts_with(PLAN_NAMES)
    }
}

/// What the engine is to do.
#[derive(Clone, Debug)]
pub enum Intent {
    /// Send this message to a member: the parent or a child in the tree. It is a whole
    /// `wire::Message::Coordination`, ready for `Link::tell`.
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

/// What every member of a set must know alike, and who this one is.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The set, for the envelope of messages.
    pub set: SetId,
    /// This member.
    pub me: Member,
    /// The global rank of each member, ascending.
    pub ranks: Arc<[Rank]>,
    /// A number of the host of each member.
    pub hosts: Arc<[u32]>,
    /// Agreed knobs.
    pub rules: Rules,
}

/// The knobs of agreement. The same on all members: they are agreed when the epoch starts.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Marks held back go when their tensors amount to this many bytes.
    pub fusion_bytes: u64,
    /// Marks are held back at most this long.
    pub window_ns: u64,
    /// Keys in the response cache, at most `CACHE_KEYS_MAX`; 0 turns it off.
    pub cache_keys: usize,
    /// An operation that some members have not submitted for this long is warned of; 0 never.
    pub stall_warn_ns: u64,
    /// After this long it ends the epoch; 0 never.
    pub stall_fail_ns: u64,
    /// Only allreduce may run when members have joined, as in Horovod.
    pub strict_join: bool,
}

impl Default for Rules {
    fn default() -> Rules {
        Rules {
            fusion_bytes: 64 << 20,
            window_ns: 200_000,
            cache_keys: 8192,
            stall_warn_ns: 60_000_000_000,
            stall_fail_ns: 0,
            strict_join: false,
        }
    }
}

/// An operation to submit.
#[derive(Clone, Copy, Debug)]
pub struct Submission<'a> {
    /// The engine's number; not in flight already.
    pub op: OpId,
    /// Its name.
    pub name: &'a str,
    /// Unnamed operations reuse a ring of names: hold this one back while the former of its name is in
    /// flight, instead of refusing it.
    pub hold_if_busy: bool,
    /// What it is. It passes `wire::signature::fits` (announce what does not as refused, without tensors).
    pub signature: &'a Signature,
    /// Row counts or splits.
    pub call: &'a [u64],
    /// The call was refused on this rank, and why; it fails on all.
    pub refused: Option<&'a str>,
}

/// Why an operation was not accepted. Nothing was sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SubmitError {
    /// An operation of this name is in flight here.
    DuplicateName,
    /// `IN_FLIGHT_MAX` operations are in flight here.
    TooMany,
    /// This rank has joined, and not all others have.
    HasJoined,
    /// The name is longer than `NAME_BYTES_MAX`, or the call data than `CALL_VALUES_MAX`.
    TooLarge,
}

impl fmt::Display for SubmitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SubmitError::DuplicateName => f.write_str(
                "an operation of this name is in flight on this rank; wait for it, or give each its own name",
            ),
            SubmitError::TooMany => {
                write!(f, "{IN_FLIGHT_MAX} operations are in flight on this rank; wait for some first")
            }
            SubmitError::HasJoined => f.write_str(
                "this rank has joined; it can submit again when join() has returned, which is when all have joined",
            ),
            SubmitError::TooLarge => write!(
                f,
                "a name has at most {NAME_BYTES_MAX} bytes, and an operation at most {} splits over all ranks",
                wire::CALL_VALUES_MAX
            ),
        }
    }
}

/// The agreement of one process set, seen from one member. The same type everywhere; the root is the member
/// without a parent.
#[derive(Debug)]
pub struct Coordinator {
    setup: Setup,
    tree: Tree,
    table: Table,
    /// Where each operation in flight here stands.
    ops: NumberMap<OpId, u32>,
    held: usize,
    /// Complete names that have not gone up (or, at the root, into the log).
    outbox: Vec<u32>,
    outbox_bytes: u64,
    window_ends: Option<Time>,
    /// What goes up next answers a `Nack`.
    renames: bool,
    join: Join,
    /// Names in flight that each source has marked.
    marked_by: Vec<usize>,
    /// Bodies that go on in a next message: from each source, and (at 0) from the parent.
    unfinished: Vec<Vec<u8>>,
    /// The number of the next cut.
    sequence: u64,
    stall: stall::Stall,
    intents: VecDeque<Intent>,
    spare: Spare,
}

/// Who has joined.
#[derive(Debug)]
struct Join {
    /// The Join operation in flight here.
    op: Option<OpId>,
    /// It waits for operations held back, which were submitted before it.
    behind_held: bool,
    /// Per member of the subtree.
    has: Vec<bool>,
    /// How many of each source have.
    count: Vec<usize>,
    /// Joins that have not gone up.
    outbox: Vec<Member>,
    /// The last, at the root.
    last: Member,
    /// Per source, `Nack`s that it has not answered. Its marks come again, and they came before its joins.
    nacked: Vec<u32>,
    /// Joins that wait for such an answer.
    behind_nacked: Vec<Member>,
}

/// Memory that is used again.
#[derive(Debug)]
struct Spare {
    messages: Vec<Vec<u8>>,
    cuts: Vec<Vec<Agreed>>,
    tables: Vec<Arc<CallTable>>,
    payload: Vec<u8>,
    keys: Vec<TensorKey>,
    rows: Vec<u32>,
    no_call: Arc<CallTable>,
    nobody: Arc<[Member]>,
    /// The last list of absent members: it seldom changes while it is not empty.
    absent: Arc<[Member]>,
}

/// Buffers kept for use again; a burst beyond it goes back to the allocator.
const SPARE_MAX: usize = 64;
/// Items of one body.
const PAYLOAD_BYTES_MAX: usize = CONTROL_BYTES_MAX - ENVELOPE_BYTES - wire::HEADER_BYTES;

impl Coordinator {
    /// The agreement of a set that has just been made.
    #[must_use]
    pub fn new(setup: Setup) -> Coordinator {
        assert_eq!(setup.ranks.len(), setup.hosts.len());
        assert!(setup.ranks.is_sorted() && (setup.me.0 as usize) < setup.ranks.len());
        let tree = Tree::new(setup.me, &setup.hosts);
        let sources = tree.subtree.len();
        let nobody: Arc<[Member]> = Arc::new([]);
        Coordinator {
            table: Table::new(setup.rules.cache_keys.min(crate::limits::CACHE_KEYS_MAX)),
            ops: NumberMap::default(),
            held: 0,
            outbox: Vec::new(),
            outbox_bytes: 0,
            window_ends: None,
            renames: false,
            join: Join {
                op: None,
                behind_held: false,
                has: vec![false; setup.ranks.len()],
                count: vec![0; sources],
                outbox: Vec::new(),
                last: Member(0),
                nacked: vec![0; sources],
                behind_nacked: Vec::new(),
            },
            marked_by: vec![0; sources],
            unfinished: vec![Vec::new(); sources],
            sequence: 0,
            stall: stall::Stall::default(),
            intents: VecDeque::new(),
            spare: Spare {
                messages: Vec::new(),
                cuts: Vec::new(),
                tables: Vec::new(),
                payload: Vec::new(),
                keys: Vec::new(),
                rows: Vec::new(),
                no_call: Arc::default(),
                absent: nobody.clone(),
                nobody,
            },
            tree,
            setup,
        }
    }

    /// Whether this member has joined and not all have.
    #[must_use]
    pub fn has_joined(&self) -> bool {
        self.join.op.is_some()
    }

    /// Takes an operation.
    pub fn submit(&mut self, submission: Submission<'_>, now: Time) -> Result<(), SubmitError> {
        if self.has_joined() {
            return Err(SubmitError::HasJoined);
        }
        if self.ops.len() >= IN_FLIGHT_MAX {
            return Err(SubmitError::TooMany);
        }
        assert!(!self.ops.contains_key(&submission.op), "operation numbers in flight are unique");
        if submission.signature.collective == Collective::Join {
            self.join.op = Some(submission.op);
            self.join.behind_held = self.held > 0;
            if self.held == 0 {
                self.join_now(now);
            }
            return Ok(());
        }
        let values = submission.call.len().saturating_mul(self.setup.ranks.len());
        if submission.name.len() > NAME_BYTES_MAX || values > wire::CALL_VALUES_MAX {
            return Err(SubmitError::TooLarge);
        }
        let row = self.table.find(submission.name);
        if let Some(row) = row.filter(|&row| self.table.rows[row as usize].mark.op.is_some()) {
            if !submission.hold_if_busy && !self.table.rows[row as usize].is_refused_here() {
                return Err(SubmitError::DuplicateName);
            }
            self.ops.insert(submission.op, row);
            self.held += 1;
            self.table.row(row).held.push_back(Held {
                op: submission.op,
                signature: submission.signature.clone(),
                call: submission.call.to_vec(),
                refused: submission.refused.map(str::to_owned),
            });
            return Ok(());
        }
        let row = row.unwrap_or_else(|| self.table.open(submission.name));
        self.mark_own(row, &submission, now);
        if self.outbox_bytes >= self.setup.rules.fusion_bytes || self.setup.ranks.len() == 1 {
            self.flush(false, now);
        }
        Ok(())
    }

    /// Somebody waits for this operation: what is held back goes now.
    pub fn wait_for(&mut self, op: OpId, now: Time) {
        if self.ops.contains_key(&op) && !self.outbox.is_empty() {
            self.flush(true, now);
        }
    }

    /// Takes what a member sent (the body of `Message::Coordination`). An error is that member's fault.
    pub fn receive(&mut self, from: Member, body: &[u8], now: Time) -> Result<(), Cause> {
        let mut reader = crate::wire::Reader::new(body);
        let (kind, flags) = wire::header(&mut reader)?;
        let child = self.tree.child(from);
        let source = match (kind, child) {
            (Kind::Up, Some(source)) => source,
            (Kind::Cut | Kind::Nack | Kind::Query | Kind::Stalled, _) if self.tree.parent == Some(from) => 0,
            _ => return Err(misbehaved("an agreement message against the direction of the tree")),
        };
        let payload = reader.rest();
        if kind == Kind::Cut {
            // Before it is applied, so that those below need not wait for it.
            self.tell_children(kind, flags, payload);
        }
        let mut whole = std::mem::take(&mut self.unfinished[source]);
        if matches!(kind, Kind::Up | Kind::Cut) && (flags & MORE != 0 || !whole.is_empty()) {
            if whole.len() + payload.len() > wire::ITEM_BYTES_MAX + PAYLOAD_BYTES_MAX {
                return Err(misbehaved("an agreement item above ITEM_BYTES_MAX"));
            }
            whole.extend_from_slice(payload);
            if flags & MORE != 0 {
                self.unfinished[source] = whole;
                return Ok(());
            }
            return self.take(kind, source, flags, &whole, now);
        }
        self.unfinished[source] = whole;
        self.take(kind, source, flags, payload, now)
    }

    /// Lets time pass.
    pub fn handle_timeout(&mut self, now: Time) {
        if self.window_ends.is_some_and(|ends| ends <= now) {
            self.flush(true, now);
        }
        self.check_stalls(now);
    }

    /// When to call `handle_timeout`.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        [self.window_ends, self.stall.check_at].into_iter().flatten().min()
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Option<Intent> {
        self.intents.pop_front()
    }

    /// Takes back the memory of a message.
    pub fn recycle(&mut self, message: Vec<u8>) {
        if self.spare.messages.len() < SPARE_MAX {
            self.spare.messages.push(message);
        }
    }

    /// Takes back the memory of a cut.
    pub fn recycle_cut(&mut self, mut cut: Vec<Agreed>) {
        for mut agreed in cut.drain(..) {
            let unused = agreed.call.width > 0 && Arc::get_mut(&mut agreed.call).is_some();
            if unused && self.spare.tables.len() < SPARE_MAX {
                self.spare.tables.push(agreed.call);
            }
        }
        if self.spare.cuts.len() < SPARE_MAX {
            self.spare.cuts.push(cut);
        }
    }

    /// The member from which agreement comes; none at the root.
    #[must_use]
    pub fn parent(&self) -> Option<Member> {
        self.tree.parent
    }

    /// The members to which this one needs a link: its parent and its children in the tree.
    pub fn neighbours(&self) -> impl Iterator<Item = Member> + '_ {
        self.tree.parent.into_iter().chain(self.tree.children.iter().copied())
    }

    /// Operations submitted here that have no outcome.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.ops.len() + usize::from(self.join.op.is_some())
    }

    fn take(&mut self, kind: Kind, source: usize, flags: u8, payload: &[u8], now: Time) -> Result<(), Cause> {
        match kind {
            Kind::Up => self.take_up(source, flags, payload, now),
            Kind::Cut => self.take_cut(payload, now),
            Kind::Nack => self.take_nack(payload, now),
            Kind::Query => self.take_query(payload, now),
            Kind::Stalled => self.take_stalled(payload, now),
        }
    }

    fn is_root(&self) -> bool {
        self.tree.parent.is_none()
    }

    /// Sends a body, in several messages if it is a single item too large for one.
    fn tell(&mut self, to: Member, kind: Kind, flags: u8, payload: &[u8]) {
        let mut rest = payload;
        loop {
            let (part, after) = rest.split_at(rest.len().min(PAYLOAD_BYTES_MAX));
            rest = after;
            let more = if rest.is_empty() { 0 } else { MORE };
            let mut message = self.spare.messages.pop().unwrap_or_default();
            begin_coordination(&mut message, self.setup.set);
            wire::put_header(&mut message, kind, flags | more);
            message.extend_from_slice(part);
            self.intents.push_back(Intent::Tell { to, message });
            if rest.is_empty() {
                return;
            }
        }
    }

    fn tell_children(&mut self, kind: Kind, flags: u8, payload: &[u8]) {
        for i in 0..self.tree.children.len() {
            self.tell(self.tree.children[i], kind, flags, payload);
        }
    }
}

fn misbehaved(what: impl Into<String>) -> Cause {
    Cause::Misbehaved(what.into())
}
