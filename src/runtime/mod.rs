//! The Rust face: init, process sets, collectives, shutdown. Bindings use [`submit`], [`poll`] and [`wait`].

mod changes;
mod live;
mod persistent;
mod reform;
mod request;
mod shared;
mod staged;
pub mod typed;

pub use crate::device::accelerator::{DeviceBuffer, Mark};
use crate::engine::handles::{Handles, Message, Waited};
pub use crate::engine::{Outcome, OutputTensor};
use crate::error::{Error, Result};
use crate::fork;
pub use crate::memory::OwnedBytes;
pub use crate::rendezvous::card::News;
use crate::types::{Collective, DType, JoinAverage, Rank, ReduceOp, Scale, SetId};
use live::Live;
pub use persistent::{Persistent, PlannedOutput};
pub use shared::SharedBytes;
use std::any::Any;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

/// How to start. The default takes everything from the environment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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
    /// The tensors lie on a CUDA device, and this is the stream (a `CUstream`) that has been given what makes the
    /// inputs. Outputs that the runtime allocates lie there, too.
    pub stream: Option<u64>,
    /// With a stream: the device's number, which counts where all tensors are empty, so that no memory tells.
    pub device: Option<i32>,
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
            stream: None,
            device: None,
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

static LIVE: RwLock<Option<Arc<Live>>> = RwLock::new(None);
/// Init and shutdown take turns.
static TURN: Mutex<()> = Mutex::new(());
/// Handles outlive epochs, so that one of an earlier init is told from a later one's.
static HANDLES: OnceLock<Arc<Handles>> = OnceLock::new();
/// Set in a forked child: the engine's threads are not there.
static FORKED: AtomicBool = AtomicBool::new(false);

fn handles() -> &'static Arc<Handles> {
    HANDLES.get_or_init(Arc::default)
}

fn live() -> Result<Arc<Live>> {
    if FORKED.load(Ordering::Relaxed) {
        return Err(Error::usage(
            "this process was forked from a rank; Carole works in the process that called init(), so start workers \
             before init(), or start them with spawn instead of fork",
        ));
    }
    let live = LIVE.read().unwrap_or_else(PoisonError::into_inner);
    live.clone().ok_or_else(|| Error::usage("Carole has not been initialized; call init() first"))
}

fn my_turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Joins the job (or starts one of size 1 when no variables are set). Does nothing when called again with the
/// same options; other options are an error.
pub fn init(options: &Options) -> Result<()> {
    let _turn = my_turn();
    if FORKED.load(Ordering::Relaxed) {
        return live().map(drop);
    }
    if let Ok(live) = live() {
        return match live.options == *options {
            true => Ok(()),
            false => {
                Err(Error::usage("init() was called with other arguments before; call shutdown() first"))
            }
        };
    }
    fork::watch(&FORKED);
    let live = Arc::new(Live::start(options, Arc::clone(handles()))?);
    // Whoever comes to an elastic job later finds the sets of those who are there.
    let late = live.table.epoch.0 > 0 && live.config.worker.is_some();
    *LIVE.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&live));
    let made = if late { Ok(()) } else { live.add_first_sets(&options.process_sets) };
    if made.is_err() {
        stop();
    }
    made
}

fn stop() {
    let taken = LIVE.write().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(live) = taken {
        live.stop();
    }
}

/// Says goodbye and leaves. Local and bounded; operations in flight end with [`Error::Shutdown`]. init may be
/// called again. In a forked child it does nothing.
pub fn shutdown() -> Result<()> {
    if FORKED.load(Ordering::Relaxed) {
        return Ok(());
    }
    let _turn = my_turn();
    stop();
    Ok(())
}

/// Forms the next epoch with the ranks that are left: after an error that says [`Error::Broken`], or whenever all
/// ranks call it. No process is restarted; ranks keep their order and are numbered anew from 0, process sets keep
/// their numbers and lose the members that are gone, and in an elastic job workers that wait to be let in come last.
/// Operations in flight have ended with an error. Waits for ranks that live, at most `CAROLE_ELASTIC_TIMEOUT_S`.
///
/// # Errors
/// [`Error::Broken`] with [`Cause::Excluded`](crate::error::Cause::Excluded) when the others have gone on without this
/// rank, with [`Cause::Minority`](crate::error::Cause::Minority) when they may have. After any error this process is in no
/// job.
pub fn reform() -> Result<World> {
    let _turn = my_turn();
    let old = live()?;
    let next = reform::next(&old, Arc::clone(handles()));
    let mut slot = LIVE.write().unwrap_or_else(PoisonError::into_inner);
    match next {
        Ok(next) => {
            let world = next.world;
            *slot = Some(Arc::new(next));
            Ok(world)
        }
        Err(error) => {
            *slot = None;
            Err(error)
        }
    }
}

/// What has changed about the workers of an elastic job since this epoch began: [`reform()`] on all ranks takes account
/// of it. Costs one read of a socket.
pub fn news() -> Result<News> {
    Ok(reform::news(&*live()?))
}

/// The number of the present epoch: how often the ranks have come together before.
pub fn epoch() -> Result<u32> {
    Ok(live()?.table.epoch.0)
}

/// Whether [`init`] has succeeded and [`shutdown`] has not been called.
#[must_use]
pub fn is_initialized() -> bool {
    live().is_ok()
}

/// Who this process is.
pub fn world() -> Result<World> {
    Ok(live()?.world)
}

/// The transport of the link to a rank ("shm", "tcp"), once traffic has made one (and while no other thread waits).
pub fn link_kind(peer: Rank) -> Result<Option<&'static str>> {
    let live = live()?;
    match peer.0 < live.world.size {
        true => Ok(live.driver.try_with(|engine| engine.link_kind(peer)).flatten()),
        false => Err(Error::usage(format!("{peer} is not in this job of {} ranks", live.world.size))),
    }
}

/// The algorithm of the batch that this rank started last; none before the first that moves data, and for what
/// is complete by agreement alone (barrier, join). For tools that measure one operation at a time;
/// like [`link_kind`] it says nothing while another thread drives.
pub fn last_algorithm() -> Result<Option<&'static str>> {
    Ok(live()?.driver.try_with(|engine| engine.last_algorithm()).flatten())
}

/// Whether a collective of this name has repeated so often that its starts need no agreement ([`crate::engine::standing`]).
/// For tests and tools: nobody needs to know.
pub fn stands(set: SetId, name: &str) -> Result<bool> {
    Ok(live()?.driver.find_standing(set, name).is_some_and(|standing| standing.is_good()))
}

/// Submits an operation. Never blocks.
///
/// # Errors
/// [`Error::Usage`] when the call can never work: on an initialised set the other ranks are told, so that theirs of
/// the same name ends with a mismatch. Also when its name is in flight already on this rank, which concerns nobody
/// else. [`Error::Broken`] and [`Error::Shutdown`] when the group is no more.
///
/// # Safety
/// Inputs and outputs must stay valid, inputs unwritten and outputs untouched, until the operation has an
/// outcome (poll says true, or wait returns other than Timeout). `keep` is held until then and handed back. With a
/// stream, they must be memory of one CUDA device, valid until what [`Outcome::arrives`] marks is over, and the
/// stream a live one of that device.
pub unsafe fn submit(request: &Request<'_>, keep: Option<Box<dyn Any + Send>>) -> Result<Handle> {
    live()?.submit(request, keep, false)
}

/// What [`run`] has come to.
#[derive(Debug)]
pub enum Running {
    /// The operation is over.
    Done(Outcome),
    /// It is under way: [`wait`] for it.
    Started(Handle),
}

impl Running {
    /// Waits for the outcome.
    pub fn outcome(self) -> Result<Outcome> {
        match self {
            Running::Done(outcome) => Ok(outcome),
            Running::Started(handle) => wait(handle, None).result,
        }
    }
}

/// Submits an operation for a caller that waits at once: nobody is woken, since [`wait`] drives, and where the outcome is
/// there in no time it is taken, which costs less than a handle does. What `keep` makes is held as in [`submit`], where
/// the operation goes on.
///
/// # Errors
/// Those of [`submit`].
///
/// # Safety
/// As [`submit`].
pub unsafe fn run(
    request: &Request<'_>,
    keep: impl FnOnce() -> Option<Box<dyn Any + Send>>,
) -> Result<Running> {
    live()?.run(request, keep)
}

/// Plans a collective that is to be started many times, and waits until all members of its set have planned the same:
/// a planning call is matched by its name, or by order, as an operation is. The set may not be joined as long as there
/// are plans.
///
/// # Errors
/// Those of [`submit`], and [`Error::Mismatch`] when members differ.
///
/// # Safety
/// The tensors must stay valid for as long as the plan lives; [`Persistent::start`] says when they may not be touched.
pub unsafe fn plan(request: &Request<'_>, keep: Option<Box<dyn Any + Send>>) -> Result<Persistent> {
    // SAFETY: the caller's promise.
    unsafe { plan_while(request, keep, &mut || true) }
}

/// As [`plan`], for callers that can be interrupted: `go_on` is asked every 100 ms, and when it says no this call ends
/// with [`Error::Timeout`].
///
/// # Safety
/// As [`plan`]; after `Timeout` the tensors are the caller's again.
pub unsafe fn plan_while(
    request: &Request<'_>,
    keep: Option<Box<dyn Any + Send>>,
    go_on: &mut dyn FnMut() -> bool,
) -> Result<Persistent> {
    // SAFETY: the caller's promise.
    unsafe { live()?.plan(request, keep, go_on) }
}

/// Memory for tensors that the ranks of this host share: an allreduce of at least 64 KiB whose tensors and results lie
/// there on all ranks is done where they lie, without a copy of them. Ordinary memory where ranks share none. It counts
/// against `CAROLE_MEMORY`.
///
/// When an epoch breaks while such an allreduce is under way, this memory becomes private, at the same address: a rank
/// that was only silent may still write what it believes to be shared. After [`reform()`] or another [`init`] the job has
/// other memory; what was allocated before remains usable as any other.
///
/// # Errors
/// [`Error::Usage`] before [`init`], and where there is not so much shared memory.
pub fn allocate(bytes: usize) -> Result<SharedBytes> {
    SharedBytes::new(live()?.board.as_ref(), bytes)
}

/// Whether the operation has an outcome. Never blocks, and moves nothing but what stands, which it may end.
pub fn poll(handle: Handle) -> Result<bool> {
    match live() {
        Ok(live) => live.driver.poll(handle.0),
        Err(error) if FORKED.load(Ordering::Relaxed) => Err(error),
        Err(_) => handles().poll(handle.0),
    }
}

/// Waits for the outcome and takes it; the handle is used up, except after `Timeout`. The caller's thread
/// drives progress while it waits.
pub fn wait(handle: Handle, timeout: Option<Duration>) -> Completion {
    let until = timeout.map(|t| Instant::now() + t);
    let waited = match live() {
        Ok(live) => live.driver.wait(handle.0, until),
        // After shutdown every operation has an outcome.
        Err(error) if FORKED.load(Ordering::Relaxed) => Err(error),
        Err(_) => handles().try_take(handle.0),
    };
    match waited {
        Ok(Waited::Done(result, keep)) => {
            if let Ok(outcome @ Outcome { last_joined: Some(_), .. }) = &result
                && let Ok(live) = live()
            {
                live.realign(outcome);
            }
            Completion { result, keep }
        }
        Ok(Waited::Pending) => Completion { result: Err(timed_out(handle, timeout)), keep: None },
        Err(error) => Completion { result: Err(error), keep: None },
    }
}

/// What an operation that is under way waits for, if that is known: "waiting for rank 2 on gradient.7 since 3 s".
#[must_use]
pub fn explain(handle: Handle) -> Option<String> {
    live().ok().and_then(|live| live.driver.explain(handle.0))
}

fn timed_out(handle: Handle, timeout: Option<Duration>) -> Error {
    let seconds = timeout.unwrap_or_default().as_secs_f64();
    let reason = explain(handle).map_or(String::new(), |e| format!(": {e}"));
    Error::Timeout(format!(
        "the operation has no outcome after {seconds} s{reason}; it stays in flight and can be waited for again"
    ))
}

/// Gives up a handle: the operation finishes by itself, and what it kept alive comes back from [`released`].
pub fn abandon(handle: Handle) {
    // In a forked child another thread may have held the lock for ever.
    if !FORKED.load(Ordering::Relaxed) {
        handles().abandon(handle.0);
    }
}

/// What abandoned operations had kept alive and need no more. Bindings call it where they hold their own locks.
#[must_use]
pub fn released() -> Vec<Box<dyn Any + Send>> {
    if FORKED.load(Ordering::Relaxed) {
        return Vec::new();
    }
    handles().released()
}

/// Sends `tensor.input` to `to`, to be met by [`recv`] with the same set and tag. Complete when the bytes may
/// be overwritten. `stream` as in [`Request::stream`].
///
/// # Safety
/// As [`submit`].
pub unsafe fn send(
    set: SetId,
    to: Rank,
    tag: u32,
    tensor: TensorArg<'_>,
    stream: Option<u64>,
    keep: Option<Box<dyn Any + Send>>,
) -> Result<Handle> {
    live()?.message(set, Message { peer: Some(to), tag, sends: true }, tensor, stream, keep)
}

/// Receives into `tensor.output` what `from` sends with this set and tag, in the order in which it was sent.
///
/// # Safety
/// As [`submit`].
pub unsafe fn recv(
    set: SetId,
    from: Rank,
    tag: u32,
    tensor: TensorArg<'_>,
    stream: Option<u64>,
    keep: Option<Box<dyn Any + Send>>,
) -> Result<Handle> {
    live()?.message(set, Message { peer: Some(from), tag, sends: false }, tensor, stream, keep)
}

/// As [`recv`], from whichever member of the set sends with this tag; [`Outcome::source`] tells which one. Receives of
/// one tag, from any rank or from one, meet messages in the order in which they were submitted. Ends with
/// [`Error::Shutdown`] when all other members have left and nothing of theirs is here.
///
/// # Safety
/// As [`submit`].
pub unsafe fn recv_any(
    set: SetId,
    tag: u32,
    tensor: TensorArg<'_>,
    stream: Option<u64>,
    keep: Option<Box<dyn Any + Send>>,
) -> Result<Handle> {
    live()?.message(set, Message { peer: None, tag, sends: false }, tensor, stream, keep)
}

/// Makes a process set of these ranks, and waits until all ranks have agreed. Collective over the global set: every
/// rank makes the same sets. A call is identified by its ranks, so ranks may make several sets in different orders
/// and from several threads; where all wait for each other, all of their sets are made, and a rank that comes to ask
/// for one of these later finds it made. A set of the same ranks that exists already is an error on every rank.
pub fn add_process_set(ranks: &[Rank]) -> Result<SetId> {
    live()?.add_process_set(ranks)
}

/// Ends a process set. Collective over the global set, as [`add_process_set`] is, and identified by the set's ranks.
/// False for the global set and for sets that do not exist, which every rank sees alike, so nobody waits.
pub fn remove_process_set(set: SetId) -> Result<bool> {
    live()?.remove_process_set(set)
}

/// A process set.
pub fn process_set(set: SetId) -> Result<SetInfo> {
    live()?.set(set).map(|info| (*info).clone())
}

/// All process sets, the global one first.
pub fn process_sets() -> Result<Vec<SetInfo>> {
    Ok(live()?.all_sets())
}
