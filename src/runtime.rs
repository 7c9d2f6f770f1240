//! The Rust face: init, process sets, collectives, shutdown. Bindings use [`submit`], [`poll`] and [`wait`].

use crate::error::{Error, Result};
use crate::types::{Collective, DType, JoinAverage, Rank, ReduceOp, Scale, SetId};
pub use crate::engine::{Outcome, OutputTensor};
pub use crate::memory::OwnedBytes;
use std::any::Any;
use std::time::Duration;

/// How to start. The default takes everything from the environment.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Knobs that go before every other source, by name: `("CAROLE_ALGORITHM", "ring")`.
    pub knobs: Vec<(String, String)>,
    /// Process sets to make at once, each a list of ranks.
    pub process_sets: Vec<Vec<Rank>>,
}

/// Who this process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct World {
    /// This process, among all.
    pub rank: u32,
    /// All processes.
    pub size: u32,
    /// This process, among those on its host.
    pub local_rank: u32,
    /// Processes on its host.
    pub local_size: u32,
    /// Its host, among the hosts that have this local rank.
    pub cross_rank: u32,
    /// Hosts that have this local rank.
    pub cross_size: u32,
    /// Whether all hosts have equally many processes.
    pub homogeneous: bool,
}

/// One tensor of a request.
#[derive(Clone, Copy, Debug)]
pub struct TensorArg<'a> {
    /// The first byte of the input (C-contiguous). May be null when there are no bytes.
    pub input: *const u8,
    /// Where the output goes: `input` for in place; null to let the engine allocate it (always allowed; for
    /// allgather, alltoall and gather the size is known only after agreement, and null is the only choice).
    pub output: *mut u8,
    /// Element type.
    pub dtype: DType,
    /// Dimensions of the input.
    pub shape: &'a [u64],
}

/// An operation to submit.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Its name; `None` matches by order of submission per set and collective.
    pub name: Option<&'a str>,
    /// The process set.
    pub set: SetId,
    /// What is to be done.
    pub collective: Collective,
    /// How values are combined (ignored where nothing is reduced).
    pub op: ReduceOp,
    /// Factors before and after.
    pub scale: Scale,
    /// The root, as a global rank.
    pub root: Rank,
    /// How Average counts joined ranks.
    pub join_average: JoinAverage,
    /// One tensor, or the tensors of a group. None for barrier and join.
    pub tensors: &'a [TensorArg<'a>],
    /// Alltoall: rows for each member, for each tensor one after another; empty for equal splits.
    pub splits: &'a [u64],
    /// The binding could not accept the call (a bad buffer, say): the other ranks are told this reason and
    /// no payload is sent. `submit` then returns a handle whose wait fails with it.
    pub refused: Option<&'a str>,
}

impl Default for Request<'_> {
    fn default() -> Self {
        Request {
            name: None,
            set: crate::types::GLOBAL_SET,
            collective: Collective::Barrier,
            op: ReduceOp::Sum,
            scale: Scale::default(),
            root: Rank(0),
            join_average: JoinAverage::Size,
            tensors: &[],
            splits: &[],
            refused: None,
        }
    }
}

/// An operation in flight. Copyable; a use after its wait is an error, not undefined.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Handle(pub u64);

/// The end of an operation: what it produced, and what the binding had asked to be kept alive for it.
pub struct Completion {
    /// What it produced, or why not.
    pub result: Result<Outcome>,
    /// What was given to [`submit`].
    pub keep: Option<Box<dyn Any + Send>>,
}

/// A process set, as seen from this rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetInfo {
    /// Its identifier.
    pub id: SetId,
    /// Its ranks, ascending.
    pub ranks: Vec<Rank>,
    /// This rank's position in it, if it is a member.
    pub me: Option<u32>,
}

fn not_yet<T>() -> Result<T> {
    Err(Error::usage("under construction"))
}

/// Joins the job (or starts one of size 1 when no variables are set). Does nothing when called again with the same options.
pub fn init(_options: &Options) -> Result<()> {
    not_yet()
}
/// Says goodbye and leaves. Bounded; init may be called again.
pub fn shutdown() -> Result<()> {
    not_yet()
}
/// Whether [`init`] has succeeded and [`shutdown`] has not been called.
#[must_use]
pub fn is_initialized() -> bool {
    false
}
/// Who this process is.
pub fn world() -> Result<World> {
    not_yet()
}
/// Submits an operation. Never blocks.
///
/// # Safety
/// Inputs and outputs must stay valid, inputs unwritten and outputs untouched, until the operation has an
/// outcome (poll says true, or wait returns other than Timeout). `keep` is held until then and handed back.
pub unsafe fn submit(_request: &Request<'_>, _keep: Option<Box<dyn Any + Send>>) -> Result<Handle> {
    not_yet()
}
/// Whether the operation has an outcome. Drives nothing; never blocks.
pub fn poll(_handle: Handle) -> Result<bool> {
    not_yet()
}
/// Waits for the outcome and takes it; the handle is used up, except after `Timeout`.
pub fn wait(_handle: Handle, _timeout: Option<Duration>) -> Completion {
    Completion { result: not_yet(), keep: None }
}
/// Gives up a handle: the operation finishes by itself, and what it kept alive comes back from [`released`].
pub fn abandon(_handle: Handle) {}
/// What abandoned operations had kept alive and need no more. Bindings call it where they hold their own locks.
#[must_use]
pub fn released() -> Vec<Box<dyn Any + Send>> {
    Vec::new()
}
/// Sends bytes to `to`, to be met by [`recv`] with the same set, tag and dtype. Complete when the bytes may be overwritten.
///
/// # Safety
/// As [`submit`].
pub unsafe fn send(
    _set: SetId,
    _to: Rank,
    _tag: u32,
    _tensor: TensorArg<'_>,
    _keep: Option<Box<dyn Any + Send>>,
) -> Result<Handle> {
    not_yet()
}
/// Receives into `tensor.output` what `from` sends with this tag.
///
/// # Safety
/// As [`submit`].
pub unsafe fn recv(
    _set: SetId,
    _from: Rank,
    _tag: u32,
    _tensor: TensorArg<'_>,
    _keep: Option<Box<dyn Any + Send>>,
) -> Result<Handle> {
    not_yet()
}
/// Makes a process set of these ranks. Collective over the global set, identified by the list; waits for agreement.
pub fn add_process_set(_ranks: &[Rank]) -> Result<SetId> {
    not_yet()
}
/// Ends a process set. False for the global set and for unknown ones.
pub fn remove_process_set(_set: SetId) -> Result<bool> {
    not_yet()
}
/// A process set.
pub fn process_set(_set: SetId) -> Result<SetInfo> {
    not_yet()
}
/// All process sets, the global one first.
pub fn process_sets() -> Result<Vec<SetInfo>> {
    not_yet()
}
