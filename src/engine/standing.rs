//! Standing operations: collectives that repeat and stay in cache, done without any agreement.
//!
//! A collective of one tensor of moderate size that has been agreed on a few times with the same name, signature, row
//! counts and splits *stands*: from there on each start goes through a niche on the boards of the members ([`Niche`]),
//! by whoever submits and whoever waits, and neither the coordinator nor the engine hears of it. That it stands, and
//! where its niche lies, are functions of the agreed log, so all members know it before any can submit that name again.
//!
//! Whoever deviates withdraws from the next start: by submitting the name with anything else, or by joining. The others
//! see that in the niche, and the start becomes an ordinary operation on all members: what it then comes to is agreed as
//! ever, a mismatch that names both ranks included. None of them can have finished that start, since one has never
//! posted it. When the name comes in the agreed log again, all have left the niche, and it is free.
//!
//! Who waits at once looks for the end of a start before anything else hears of it; most small ones end so, and are no
//! operation of the engine at all.
//!
//! Starts are in no ledger. When the epoch breaks one is complete if all members have started it, as it would have been
//! before (`engine/uniform.rs`).
#![forbid(unsafe_code)]

mod repeats;
mod share;

pub(super) use repeats::Repeats;

use share::Share;

use super::operation::{Outcome, OutputTensor};
use crate::coordinator::OpId;
use crate::hash::Map;
use crate::memory::{OwnedBytes, Region};
use crate::transport::board::{Niche, Progress};
use crate::types::{Collective, DType, JoinAverage, Rank, ReduceOp, Scale, SetId, SharedSignature};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What stands in a set, by name.
type Names = Map<Arc<str>, Arc<Standing>>;

/// What the callers' threads and the engine share: the operations that stand, and what is to be done about them.
#[derive(Default)]
pub struct Standings {
    sets: Mutex<BTreeMap<SetId, Names>>,
    /// Operations that stand.
    count: AtomicUsize,
    /// Starts that are not over.
    under_way: AtomicUsize,
    /// Those of them that somebody sleeps for, so that the engine looks at them.
    awaited: Mutex<Vec<Arc<Standing>>>,
    awaits: AtomicBool,
    /// Starts from which a member has withdrawn, on their way to the coordinator.
    fallen: Mutex<Vec<(Arc<Standing>, Start)>>,
    has_fallen: AtomicBool,
    /// Members that sleep are to be woken.
    nudges: AtomicBool,
}

/// An operation that stands.
#[derive(Debug)]
pub struct Standing {
    set: SetId,
    name: Arc<str>,
    signature: SharedSignature,
    ranks: Arc<[Rank]>,
    niche: Niche,
    /// Where the niche lies behind each seat.
    offset: usize,
    share: Share,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// The number of the next start. That of one under way is one less.
    next: u64,
    start: Option<Start>,
    /// Somebody has withdrawn, or the epoch is over: nothing is started any more.
    is_over: bool,
}

/// A start that is under way.
#[derive(Debug)]
pub struct Start {
    op: OpId,
    input: Region,
    output: Region,
    /// The output's bytes, where the runtime allocated them.
    made: Option<OwnedBytes>,
}

/// A call that may be the next start of an operation that stands.
#[derive(Clone, Copy, Debug)]
pub struct Repeat<'a> {
    /// What is to be done.
    pub collective: Collective,
    /// How values are combined, where they are.
    pub op: ReduceOp,
    /// Factors before and after.
    pub scale: Scale,
    /// How Average counts joined ranks.
    pub join_average: JoinAverage,
    /// The root, where there is one.
    pub root: Rank,
    /// Element type and dimensions of the one tensor in the host's memory; nothing where the call is something else.
    pub tensor: Option<(DType, &'a [u64])>,
    /// Alltoall: rows for each member; none where all get as many.
    pub splits: &'a [u64],
    /// The input; empty where this member gives none.
    pub input: Region,
    /// The output that the caller supplies; `None` to have it allocated.
    pub output: Option<Region>,
}

/// What has become of a call.
#[derive(Debug)]
pub enum Posted {
    /// It is the next start.
    Started,
    /// It was the next start, and is over already.
    Done(Outcome),
    /// It is none, or somebody has withdrawn: it is an ordinary operation.
    Ordinary,
    /// The start before is not over.
    Busy,
}

/// What a look at a start has found.
#[derive(Debug)]
pub enum Look {
    /// Nothing is under way.
    Idle,
    /// Somebody has not started.
    Waiting,
    /// It is over, and this is the outcome of that operation.
    Done(OpId, Outcome),
    /// A member has withdrawn: the engine makes an ordinary operation of it.
    Fallen,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere must not hide the outcome from the waiters; the data is valid at every step.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Standings {
    /// The operation of this name, if it stands.
    #[must_use]
    pub fn find(&self, set: SetId, name: &str) -> Option<Arc<Standing>> {
        if self.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        lock(&self.sets).get(&set)?.get(name).cloned()
    }

    /// Starts it once more, if the call is what stands; else withdraws from it. `spin` looks again and again for a while
    /// and says whether what it was given has come true; where it has, the start is over and nobody else has heard of it.
    /// Otherwise `open` gives it its number as an operation.
    pub fn post(
        &self,
        standing: &Standing,
        call: &Repeat<'_>,
        spin: impl FnOnce(&dyn Fn() -> bool) -> bool,
        open: impl FnOnce() -> OpId,
    ) -> Posted {
        let mut inner = lock(&standing.inner);
        if inner.start.is_some() {
            return Posted::Busy;
        }
        if inner.is_over || !standing.is(call) || standing.niche.is_withdrawn(inner.next) {
            self.withdraw(standing, &mut inner);
            return Posted::Ordinary;
        }
        let share = &standing.share;
        let (output, made) = match call.output {
            Some(given) => (given, None),
            None if share.shape.is_none() => (Region::none(), None),
            None => {
                let made = OwnedBytes::recycled(share.output_bytes);
                (made.as_region(), Some(made))
            }
        };
        let (number, niche) = (inner.next, &standing.niche);
        niche.post(number, call.input, share.input_bytes);
        inner.next += 1;
        // Who sleeps is to be woken first, by whoever drives.
        if !niche.has_sleepers() && spin(&|| niche.progress(number) == Progress::Complete) {
            share.take(niche, number, standing.signature.scale.pre, (call.input, output));
            return Posted::Done(standing.outcome(made));
        }
        inner.start = Some(Start { op: open(), input: call.input, output, made });
        self.under_way.fetch_add(1, Ordering::SeqCst);
        drop(inner);
        self.call(standing);
        Posted::Started
    }

    /// Members that sleep are to look at the niche.
    fn call(&self, standing: &Standing) {
        if standing.niche.has_sleepers() {
            self.nudges.store(true, Ordering::SeqCst);
        }
    }

    fn withdraw(&self, standing: &Standing, inner: &mut Inner) {
        if !std::mem::replace(&mut inner.is_over, true) {
            standing.niche.withdraw(inner.next);
            self.call(standing);
        }
    }

    /// This rank withdraws from all that stands in a set, or at all.
    pub fn withdraw_all(&self, set: Option<SetId>) {
        for standing in self.of(set) {
            self.withdraw(&standing, &mut lock(&standing.inner));
        }
    }

    /// What stands in a set, or in all, in order of the names.
    fn of(&self, set: Option<SetId>) -> Vec<Arc<Standing>> {
        if self.count.load(Ordering::Acquire) == 0 {
            return Vec::new();
        }
        let sets = lock(&self.sets);
        let of_set = sets.iter().filter(|(id, _)| set.is_none_or(|set| set == **id));
        let mut all: Vec<Arc<Standing>> = of_set.flat_map(|(_, names)| names.values().cloned()).collect();
        // So that the simulator repeats.
        all.sort_unstable_by(|a, b| (a.set, &a.name).cmp(&(b.set, &b.name)));
        all
    }

    /// Looks how far a start is, and ends it if it is over.
    pub fn look(&self, standing: &Arc<Standing>) -> Look {
        let mut inner = lock(&standing.inner);
        if inner.start.is_none() {
            return Look::Idle;
        }
        let number = inner.next - 1;
        let progress = standing.niche.progress(number);
        if progress == Progress::Waiting {
            return Look::Waiting;
        }
        let start = inner.start.take().expect("it was just there");
        if progress == Progress::Withdrawn {
            inner.is_over = true;
            // Before the lock is let go of, so that at no moment it is in neither place.
            lock(&self.fallen).push((Arc::clone(standing), start));
            self.has_fallen.store(true, Ordering::SeqCst);
            return Look::Fallen;
        }
        let memory = (start.input, start.output);
        standing.share.take(&standing.niche, number, standing.signature.scale.pre, memory);
        drop(inner);
        self.under_way.fetch_sub(1, Ordering::SeqCst);
        Look::Done(start.op, standing.outcome(start.made))
    }

    /// Somebody is about to sleep for it: whoever drives looks at it from now on.
    pub fn watch(&self, standing: &Arc<Standing>) {
        let mut awaited = lock(&self.awaited);
        if !awaited.iter().any(|other| Arc::ptr_eq(other, standing)) {
            awaited.push(Arc::clone(standing));
        }
        self.awaits.store(true, Ordering::SeqCst);
    }

    /// Looks at all that is under way, whether somebody waits for it or not; what is over is appended to `done`.
    pub fn look_at_all(&self, set: Option<SetId>, done: &mut Vec<(OpId, Outcome)>) {
        for standing in self.of(set) {
            if let Look::Done(op, outcome) = self.look(&standing) {
                done.push((op, outcome));
            }
        }
    }

    /// What has a start under way.
    #[must_use]
    pub fn under_way(&self) -> Vec<Arc<Standing>> {
        let mut all = self.of(None);
        all.retain(|standing| standing.number().is_some());
        all
    }

    /// Whether a start is under way in a set, or on its way to the coordinator.
    #[must_use]
    pub fn is_under_way(&self, set: SetId) -> bool {
        self.is_any_under_way()
            && (self.of(Some(set)).iter().any(|standing| lock(&standing.inner).start.is_some())
                || lock(&self.fallen).iter().any(|(standing, _)| standing.set == set))
    }

    /// Whether any start is under way.
    #[must_use]
    pub fn is_any_under_way(&self) -> bool {
        self.under_way.load(Ordering::SeqCst) > 0
    }

    /// Whether somebody sleeps for a start, or one is on its way to the coordinator.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.calls() || self.awaits.load(Ordering::SeqCst)
    }

    /// Whether the engine is to do something.
    #[must_use]
    pub fn calls(&self) -> bool {
        self.nudges.load(Ordering::SeqCst) || self.has_fallen.load(Ordering::SeqCst)
    }

    /// Starts of a set, or of all, are over without an outcome, and nothing is started any more; with `without`, starts
    /// that this member has not posted.
    fn give_up(&self, set: Option<SetId>, without: Option<Rank>) -> Vec<OpId> {
        let mut ended = Vec::new();
        for standing in self.of(set) {
            let mut inner = lock(&standing.inner);
            let number = inner.next - 1;
            // Who has not heard of it yet must not wait for this rank.
            self.withdraw(&standing, &mut inner);
            let waits = |who| standing.missing_at(number).contains(&who);
            if inner.start.is_some() && without.is_none_or(waits) {
                ended.extend(inner.start.take().map(|start| start.op));
            }
        }
        if without.is_none() {
            let is_concerned = |standing: &Standing| set.is_none_or(|set| set == standing.set);
            let fallen =
                lock(&self.fallen).extract_if(.., |(standing, _)| is_concerned(standing)).collect::<Vec<_>>();
            ended.extend(fallen.into_iter().map(|(_, start)| start.op));
        }
        self.under_way.fetch_sub(ended.len(), Ordering::SeqCst);
        ended
    }

    fn insert(&self, standing: Standing) -> Arc<Standing> {
        let standing = Arc::new(standing);
        let mut sets = lock(&self.sets);
        sets.entry(standing.set).or_default().insert(Arc::clone(&standing.name), Arc::clone(&standing));
        self.count.fetch_add(1, Ordering::Release);
        standing
    }

    fn remove(&self, set: SetId, name: &str) -> Option<Arc<Standing>> {
        if self.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        let removed = lock(&self.sets).get_mut(&set)?.remove(name)?;
        self.count.fetch_sub(1, Ordering::Release);
        Some(removed)
    }

    fn forget(&self, set: SetId) {
        if let Some(names) = lock(&self.sets).remove(&set) {
            self.count.fetch_sub(names.len(), Ordering::Release);
        }
    }
}

impl Standing {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it can be started: nobody is known to have withdrawn.
    #[must_use]
    pub fn is_good(&self) -> bool {
        !lock(&self.inner).is_over
    }

    /// Whether a call is the same as all those before.
    fn is(&self, call: &Repeat<'_>) -> bool {
        let (what, known, tensor) = (call.collective, &*self.signature, &self.signature.tensors[0]);
        let is_like = |(dtype, shape): (DType, &[u64])| {
            dtype == tensor.dtype && self.share.fits(&tensor.shape, shape, call)
        };
        what == known.collective
            && (!what.reduces() || (call.op == known.op && call.scale == known.scale))
            && (!what.has_root() || call.root == known.root)
            && call.join_average == known.join_average
            && call.tensor.is_some_and(is_like)
            && call.input.len() >= self.share.input_bytes as u64
            && call.output.is_none_or(|output| self.may_write(output))
    }

    /// Whether this is an output that the caller may supply.
    fn may_write(&self, output: Region) -> bool {
        let fits = self.share.shape.is_none() || output.len() == self.share.output_bytes as u64;
        fits && !self.signature.collective.has_free_rows()
    }

    fn outcome(&self, made: Option<OwnedBytes>) -> Outcome {
        let dtype = self.signature.tensors[0].dtype;
        let output = |shape: &Vec<u64>| OutputTensor {
            dtype,
            shape: shape.clone(),
            memory: made,
            ..OutputTensor::default()
        };
        Outcome {
            tensors: self.share.shape.as_ref().map(output).into_iter().collect(),
            received_splits: self.share.received_splits.clone(),
            ..Outcome::default()
        }
    }

    /// The number of the start under way, if one is.
    #[must_use]
    pub fn number(&self) -> Option<u64> {
        let inner = lock(&self.inner);
        inner.start.as_ref().map(|_| inner.next - 1)
    }

    fn missing_at(&self, number: u64) -> Vec<Rank> {
        self.niche.missing(number).map(|member| self.ranks[member]).collect()
    }

    /// Ranks that have not begun with the start under way.
    #[must_use]
    pub fn missing(&self) -> Vec<Rank> {
        self.number().map_or(Vec::new(), |number| self.missing_at(number))
    }
}

impl Standing {
    fn has_news(&self) -> bool {
        let inner = lock(&self.inner);
        inner.start.is_none() || self.niche.progress(inner.next - 1) != Progress::Waiting
    }
}
