//! Persistent collectives: planned once by all members of a set, started many times.

use super::live::Live;
use super::{Handle, Outcome, OutputTensor, OwnedBytes, Request, TensorArg, request};
use crate::coordinator::PLAN_NAMES;
use crate::engine::channel::Channel;
use crate::engine::handles::{Submitted, Waited};
use crate::error::{Error, Result};
use crate::log;
use crate::types::{Collective, DType, Rank, ReduceOp, Scale, SetId};
use std::any::Any;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A planned collective. Its tensors stay where they are; every start reads the inputs anew and writes the outputs.
/// All members of its set start it equally often, and wait for it before they start it again. When it is dropped, it
/// is given up.
pub struct Persistent {
    live: Arc<Live>,
    plan: Plan,
    name: String,
    set: SetId,
    number: u64,
    closed: AtomicBool,
    /// Started, and not waited for since.
    started: AtomicBool,
    /// Of who has waited for longer than a moment.
    patience: Mutex<Option<Patience>>,
    outputs: Vec<PlannedOutput>,
    received_splits: Vec<u64>,
    /// What the binding had asked to be kept alive.
    keep: Mutex<Option<Box<dyn Any + Send>>>,
}

/// Since when a start is waited for, when that is warned of next, and when the epoch ends for it.
#[derive(Clone, Copy)]
struct Patience {
    since: Instant,
    warn_at: Option<Instant>,
    fail_at: Option<Instant>,
}

/// One output of a plan.
#[derive(Clone, Debug)]
pub struct PlannedOutput {
    /// Element type.
    pub dtype: DType,
    /// Dimensions.
    pub shape: Vec<u64>,
    /// The bytes, where the runtime allocated them.
    pub memory: Option<Arc<OwnedBytes>>,
}

enum Plan {
    /// Through memory that all members map.
    Channel(Arc<Channel>),
    /// As an operation of the plan's own name.
    ByName(Box<Owned>, Mutex<Option<Handle>>),
}

/// A request that outlives its call.
struct Owned {
    set: SetId,
    collective: Collective,
    op: ReduceOp,
    scale: Scale,
    root: Rank,
    tensors: Vec<(*const u8, *mut u8, DType, Vec<u64>)>,
    splits: Vec<u64>,
}

// SAFETY: the addresses are handed to the engine and not used otherwise, but for outputs that this value owns.
unsafe impl Send for Owned {}
// SAFETY: as above.
unsafe impl Sync for Owned {}

impl Live {
    /// Plans a collective, and waits until all members of its set have.
    ///
    /// # Safety
    /// As for [`super::plan`].
    pub(super) unsafe fn plan(
        self: &Arc<Self>,
        request: &Request<'_>,
        keep: Option<Box<dyn Any + Send>>,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<Persistent> {
        let tensorless = matches!(request.collective, Collective::Barrier | Collective::Join);
        let refused = match request.stream {
            Some(_) => Some("a persistent collective takes tensors in the host's memory only".to_owned()),
            None if tensorless || request.tensors.is_empty() => {
                Some(format!("{} without tensors cannot be persistent", request.collective))
            }
            None => None,
        };
        let request = &Request { refused: request.refused.or(refused.as_deref()), ..*request };
        let (set, name) = self.admit(request)?;
        let mut refusal = None;
        let fill = |submitted: &mut Submitted| {
            if let Err(reason) = request::fill(request, &set, submitted) {
                submitted.refused = Some(reason.clone());
                refusal = Some(reason);
            }
            submitted.name.clear();
            submitted.name.push(PLAN_NAMES);
            submitted.name.push_str(&name);
        };
        let handle = self.driver.submit(None, true, fill)?;
        if let Some(reason) = refusal {
            self.driver.abandon(handle);
            return Err(Error::Usage(reason));
        }
        let outcome = loop {
            match self.driver.wait(handle, Some(Instant::now() + ASK_EVERY))? {
                Waited::Done(outcome, _) => break outcome?,
                Waited::Pending if go_on() => {}
                Waited::Pending => {
                    self.driver.abandon(handle);
                    return Err(Error::Timeout(format!("the plan of '{name}' was given up")));
                }
            }
        };
        self.plans.fetch_add(1, Ordering::SeqCst);
        Ok(Persistent::new(Arc::clone(self), request, outcome, name, keep))
    }
}

impl Persistent {
    fn new(
        live: Arc<Live>,
        request: &Request<'_>,
        outcome: Outcome,
        name: String,
        keep: Option<Box<dyn Any + Send>>,
    ) -> Persistent {
        let number = outcome.plan.unwrap_or_default();
        let plan = match outcome.channel {
            Some(channel) => Plan::Channel(channel),
            None => Plan::ByName(Box::new(Owned::new(request)), Mutex::default()),
        };
        let share = |OutputTensor { dtype, shape, memory, .. }| PlannedOutput {
            dtype,
            shape,
            memory: memory.map(Arc::new),
        };
        let outputs = outcome.tensors.into_iter().map(share).collect();
        let received_splits = outcome.received_splits;
        Persistent {
            live,
            plan,
            name,
            set: request.set,
            number,
            closed: AtomicBool::new(false),
            started: AtomicBool::new(false),
            patience: Mutex::default(),
            outputs,
            received_splits,
            keep: Mutex::new(keep),
        }
    }

    /// The outputs, one per tensor, where this member gets any; with memory where the runtime allocated them. Their
    /// values are those of the last start, once it was waited for.
    #[must_use]
    pub fn outputs(&self) -> &[PlannedOutput] {
        &self.outputs
    }

    /// Alltoall: the rows received from each member, for each tensor one after another.
    #[must_use]
    pub fn received_splits(&self) -> &[u64] {
        &self.received_splits
    }

    /// Whether starts go through memory that all members map, without agreement.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        matches!(self.plan, Plan::Channel(_))
    }

    /// Starts the collective. Never blocks; it goes on while nobody waits.
    ///
    /// # Safety
    /// The tensors of the plan must be valid, inputs unwritten and outputs untouched, until [`Persistent::wait`] has
    /// returned other than `Timeout`.
    pub unsafe fn start(&self) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.begin(false) }
    }

    /// Starts it and waits for it.
    ///
    /// # Safety
    /// As [`Persistent::start`], until this has returned.
    pub unsafe fn run(&self) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.begin(true) }?;
        self.wait(None)
    }

    /// As [`Persistent::start`]; a caller that `waits` at once drives it itself.
    ///
    /// # Safety
    /// As [`Persistent::start`].
    pub unsafe fn begin(&self, waits: bool) -> Result<()> {
        if self.started.swap(true, Ordering::AcqRel) {
            return Err(Error::usage(format!(
                "persistent '{}' is under way already; wait for it first",
                self.name
            )));
        }
        *lock(&self.patience) = None;
        let begun = match &self.plan {
            Plan::Channel(channel) => self.live.driver.start_channel(channel, waits),
            Plan::ByName(owned, handle) => {
                let mut handle = lock(handle);
                let name = format!("{} (plan {})", self.name, self.number);
                owned.submit(&self.live, &name, waits).map(|submitted| *handle = Some(submitted))
            }
        };
        if begun.is_err() {
            self.started.store(false, Ordering::Release);
        }
        begun
    }

    /// Whether the last start is over. Never blocks.
    pub fn poll(&self) -> Result<bool> {
        match &self.plan {
            Plan::Channel(channel) => Ok(self.live.driver.test_channel(channel)),
            Plan::ByName(_, handle) => lock(handle).map_or(Ok(true), super::poll),
        }
    }

    /// Waits for the last start; the caller's thread does the work. Without one there is nothing to wait for.
    ///
    /// # Errors
    /// [`Error::Timeout`]: it goes on and can be waited for again. [`Error::Broken`], [`Error::Shutdown`]: it has
    /// failed, and so will every later start.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<()> {
        if !self.started.load(Ordering::Acquire) {
            return Ok(());
        }
        let outcome = self.end(timeout);
        if !matches!(outcome, Err(Error::Timeout(_))) {
            self.started.store(false, Ordering::Release);
        }
        outcome
    }

    fn end(&self, timeout: Option<Duration>) -> Result<()> {
        if let Plan::Channel(channel) = &self.plan
            && self.live.driver.spin_for_channel(channel)
        {
            return channel.outcome();
        }
        let until = timeout.map(|timeout| Instant::now() + timeout);
        match &self.plan {
            Plan::Channel(channel) => self.wait_for_channel(channel, until),
            Plan::ByName(owned, handle) => self.wait_by_name(owned, handle, until),
        }
    }

    fn wait_for_channel(&self, channel: &Channel, until: Option<Instant>) -> Result<()> {
        let (warn_every, fail_after) = self.live.stall_limits();
        // Whoever waits again after a timeout goes on with the same patience.
        let known = *lock(&self.patience);
        let Patience { since, mut warn_at, mut fail_at } = known.unwrap_or_else(|| {
            let since = Instant::now();
            let after = |limit: Option<Duration>| limit.map(|limit| since + limit);
            Patience { since, warn_at: after(warn_every), fail_at: after(fail_after) }
        });
        loop {
            let limit = [until, warn_at, fail_at].into_iter().flatten().min();
            if self.live.driver.wait_for_channel(channel, limit) {
                return channel.outcome();
            }
            let now = Instant::now();
            let is_over = |at: Option<Instant>| at.is_some_and(|at| now >= at);
            if is_over(until) {
                *lock(&self.patience) = Some(Patience { since, warn_at, fail_at });
                return Err(Error::Timeout(format!(
                    "persistent '{}' is not over: {}; it goes on and can be waited for again",
                    self.name,
                    waits_for(channel)
                )));
            }
            if is_over(fail_at) {
                fail_at = None;
                self.live.driver.fail_stalled(&self.name, channel.missing());
            }
            if is_over(warn_at) {
                log::warn(format_args!(
                    "persistent '{}' waits since {} s: {}",
                    self.name,
                    since.elapsed().as_secs(),
                    waits_for(channel)
                ));
                warn_at = warn_every.map(|every| now + every);
            }
        }
    }

    fn wait_by_name(
        &self,
        owned: &Owned,
        slot: &Mutex<Option<Handle>>,
        until: Option<Instant>,
    ) -> Result<()> {
        let Some(handle) = *lock(slot) else { return Ok(()) };
        let waited = match super::live() {
            Ok(_) => self.live.driver.wait(handle.0, until)?,
            Err(_) => super::handles().try_take(handle.0)?,
        };
        let Waited::Done(result, _) = waited else {
            return Err(Error::Timeout(format!(
                "persistent '{}' is not over; it goes on and can be waited for again",
                self.name
            )));
        };
        *lock(slot) = None;
        let outcome = result?;
        for ((output, made), (.., given, _, _)) in
            self.outputs.iter().zip(&outcome.tensors).zip(&owned.tensors)
        {
            if let (true, Some(to), Some(from)) = (given.is_null(), &output.memory, &made.memory) {
                let len = to.as_slice().len().min(from.as_slice().len());
                // SAFETY: `len` bytes lie at both, which are two allocations; nobody touches the plan's output while
                // it is under way, as the caller of `start` promised.
                unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to.as_ptr(), len) };
            }
        }
        Ok(())
    }
}

impl Persistent {
    /// Gives the plan up, and hands back what was kept alive for it.
    #[must_use]
    pub fn close(self) -> Option<Box<dyn Any + Send>> {
        self.give_up();
        lock(&self.keep).take()
    }

    fn give_up(&self) {
        if self.closed.swap(true, Ordering::SeqCst) {
            return;
        }
        self.live.plans.fetch_sub(1, Ordering::SeqCst);
        match &self.plan {
            Plan::Channel(channel) => {
                // Its memory is the caller's again: what is under way must be over, or has to fail.
                if channel.is_under_way()
                    && !self.live.driver.wait_for_channel(channel, Some(Instant::now() + LAST))
                {
                    log::warn(format_args!(
                        "persistent '{}' was dropped while it was under way: {}; this rank leaves the job",
                        self.name,
                        waits_for(channel)
                    ));
                    self.live.stop();
                }
                self.live.driver.free_plan(self.set, self.number);
            }
            Plan::ByName(_, handle) => {
                if let Some(handle) = lock(handle).take() {
                    self.live.driver.abandon(handle.0);
                }
            }
        }
    }
}

impl Drop for Persistent {
    fn drop(&mut self) {
        self.give_up();
    }
}

/// How often a caller that plans is asked whether it still wants to.
const ASK_EVERY: Duration = Duration::from_millis(100);
/// How long a plan that is dropped while it is under way is waited for.
const LAST: Duration = Duration::from_secs(2);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn waits_for(channel: &Channel) -> String {
    match &channel.missing()[..] {
        [] => "all have started it, and it moves".to_owned(),
        ranks => {
            let ranks: Vec<String> = ranks.iter().map(|rank| rank.0.to_string()).collect();
            format!("rank {} has not started it", ranks.join(", "))
        }
    }
}

impl Owned {
    fn new(request: &Request<'_>) -> Owned {
        let tensors = request.tensors.iter().map(|t| (t.input, t.output, t.dtype, t.shape.to_vec()));
        Owned {
            set: request.set,
            collective: request.collective,
            op: request.op,
            scale: request.scale,
            root: request.root,
            tensors: tensors.collect(),
            splits: request.splits.to_vec(),
        }
    }

    fn submit(&self, live: &Live, name: &str, waits: bool) -> Result<Handle> {
        let tensors: Vec<TensorArg<'_>> = self
            .tensors
            .iter()
            .map(|(input, output, dtype, shape)| TensorArg {
                input: *input,
                output: *output,
                dtype: *dtype,
                shape,
            })
            .collect();
        let request = Request {
            name: Some(name),
            set: self.set,
            collective: self.collective,
            op: self.op,
            scale: self.scale,
            root: self.root,
            tensors: &tensors,
            splits: &self.splits,
            ..Request::default()
        };
        live.submit(&request, None, waits)
    }
}
