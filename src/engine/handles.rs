//! Handles: where a submitted operation waits for its outcome, shared between the callers' threads and
//! whoever drives the engine.
//!
//! A handle is a slot and a generation. A slot is free, pending, done or abandoned; the word `state` holds the
//! generation and the state together, so that a handle used after its wait, or after it was given up, is an
//! error and never somebody else's operation. Slots come in pages that are allocated when first needed.
#![forbid(unsafe_code)]

use super::operation::Outcome;
use super::passage::{OnDevice, Passage};
use super::standing::Standing;
use crate::coordinator;
use crate::device::accelerator::Mark;
use crate::error::{Cause, Error, Result};
use crate::limits::IN_FLIGHT_MAX;
use crate::memory::Region;
use crate::types::{SetId, Signature};
use std::any::Any;
use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::Instant;

const PAGE: usize = 1024;
const PENDING: u64 = 1;
const DONE: u64 = 2;
/// In flight, but nobody's: it closes itself at its end.
const ABANDONED: u64 = 3;

/// An operation as submitted, on its way to the engine.
#[derive(Debug)]
pub struct Submitted {
    /// The process set.
    pub set: SetId,
    /// Its name.
    pub name: String,
    /// Whether the name is one of a ring, so that a busy name is waited for.
    pub hold: bool,
    /// What must agree on all ranks.
    pub signature: Signature,
    /// Row counts or splits.
    pub call: Vec<u64>,
    /// Inputs, and outputs where the caller supplies them.
    pub tensors: Vec<(Region, Option<Region>)>,
    /// Why this rank cannot take part.
    pub refused: Option<String>,
    /// A point-to-point message instead of a collective.
    pub message: Option<Message>,
    /// How its tensors come to the host and its results back, where they lie elsewhere.
    pub passage: Option<Box<dyn Passage>>,
    /// Where they lie then.
    pub on_device: Option<Arc<OnDevice>>,
}

/// A point-to-point message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// The other end; `None` to receive from any.
    pub peer: Option<crate::types::Rank>,
    /// The tag.
    pub tag: u32,
    /// Whether this end sends.
    pub sends: bool,
}

impl Message {
    /// Whether this one, if it is submitted first, is to be carried out before `later`: they may meet the same messages.
    pub fn precedes(self, later: Message) -> bool {
        let may_meet = self.peer == later.peer || self.peer.is_none() || later.peer.is_none();
        self.sends == later.sends && self.tag == later.tag && may_meet
    }
}

#[derive(Default)]
struct Inner {
    submitted: Option<Box<Submitted>>,
    result: Option<Result<Outcome>>,
    keep: Option<Box<dyn Any + Send>>,
    /// Brings the results back.
    passage: Option<Box<dyn Passage>>,
    /// Somebody sleeps on `done`: without sleepers there is nobody to wake, which would cost a system call.
    sleepers: u32,
    name: Option<u128>,
    /// What it is a start of.
    standing: Option<Arc<Standing>>,
}

#[derive(Default)]
struct Slot {
    /// Generation in the upper 62 bits, state in the lower 2.
    state: AtomicU64,
    inner: Mutex<Inner>,
    done: Condvar,
}

impl Slot {
    /// Begins with another operation; its handle.
    fn begin(&self, index: u32, operation: Inner) -> u64 {
        let mut inner = lock(&self.inner);
        // Late risers of the slot's last operation still count themselves out.
        let sleepers = inner.sleepers;
        *inner = Inner { sleepers, ..operation };
        drop(inner);
        let generation = (self.state.load(Ordering::Relaxed) >> 2) + 1;
        self.state.store(generation << 2 | PENDING, Ordering::Release);
        (generation & 0xFF_FFFF_FFFF) << 24 | u64::from(index)
    }
}

/// All handles of a process.
pub struct Handles {
    pages: Box<[OnceLock<Box<[Slot]>>]>,
    free: Mutex<Free>,
    names: Names,
    /// What abandoned operations had kept alive and need no more.
    released: Mutex<Vec<Released>>,
}

/// What an operation had kept alive, and until when a device may still write there.
type Released = (Option<Mark>, Box<dyn Any + Send>);

/// The names in flight, so that the second submit of one is refused at once and not only when the engine
/// comes to it. Kept as 128 bits of two keyed hashes: no allocation for a name that comes back, and no chance
/// worth the name that two differ and look alike.
#[derive(Default)]
struct Names {
    keys: [RandomState; 2],
    taken: Mutex<HashSet<u128>>,
}

impl Names {
    /// Names of a ring may be in flight twice, messages have none, and a refused call leaves its name to the next.
    fn hash(&self, submitted: &Submitted) -> Option<u128> {
        let named = !submitted.hold
            && submitted.refused.is_none()
            && submitted.message.is_none()
            && !submitted.name.is_empty();
        let half = |key: &RandomState| u128::from(key.hash_one((submitted.set, &submitted.name)));
        named.then(|| half(&self.keys[0]) << 64 | half(&self.keys[1]))
    }
}

#[derive(Default)]
struct Free {
    slots: Vec<u32>,
    /// Boxes whose vectors have capacity already.
    #[expect(clippy::vec_box, reason = "the boxes travel to the engine and back; only their address moves")]
    spare: Vec<Box<Submitted>>,
    made: u32,
}

/// What a waiter found.
pub enum Waited {
    /// The operation has ended.
    Done(Result<Outcome>, Option<Box<dyn Any + Send>>),
    /// It is still in flight.
    Pending,
}

impl Default for Handles {
    fn default() -> Self {
        Handles {
            pages: (0..IN_FLIGHT_MAX / PAGE).map(|_| OnceLock::new()).collect(),
            free: Mutex::default(),
            names: Names::default(),
            released: Mutex::default(),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere must not hide the outcome from the waiters; the data is valid at every step.
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn used_up() -> Error {
    Error::usage(
        "this handle is not in flight: it was waited for or given up already, or it belongs to an earlier init()",
    )
}

/// A second operation of a name.
pub(super) fn in_flight(name: &str) -> Error {
    Error::usage(format!(
        "an operation named '{name}' is in flight already; wait for it first, or give each its own name"
    ))
}

impl Handles {
    fn slot(&self, index: u32) -> &Slot {
        let page = self.pages[index as usize / PAGE].get().expect("slots that were given out have pages");
        &page[index as usize % PAGE]
    }

    fn find(&self, handle: u64) -> Result<(&Slot, u64)> {
        let index = (handle & 0xFF_FFFF) as u32;
        let page = self.pages.get(index as usize / PAGE).and_then(OnceLock::get).ok_or_else(used_up)?;
        let slot = &page[index as usize % PAGE];
        let state = slot.state.load(Ordering::Acquire);
        if matches!(state & 3, PENDING | DONE) && (state >> 2) & 0xFF_FFFF_FFFF == handle >> 24 {
            Ok((slot, state))
        } else {
            Err(used_up())
        }
    }

    /// Takes a slot and lets `fill` write the submission into recycled memory. Returns the handle and the slot.
    pub fn open(
        &self,
        keep: Option<Box<dyn Any + Send>>,
        fill: impl FnOnce(&mut Submitted),
    ) -> Result<(u64, u32)> {
        let (index, spare) = {
            let mut free = lock(&self.free);
            (self.take_slot(&mut free)?, free.spare.pop())
        };
        let slot = self.slot(index);
        let mut submitted = spare.unwrap_or_default();
        fill(&mut submitted);
        let name = self.names.hash(&submitted);
        if name.is_some_and(|name| !lock(&self.names.taken).insert(name)) {
            let error = in_flight(coordinator::shown(&submitted.name));
            let mut free = lock(&self.free);
            free.slots.push(index);
            free.spare.push(submitted);
            return Err(error);
        }
        let inner = Inner { submitted: Some(submitted), keep, name, ..Inner::default() };
        Ok((slot.begin(index, inner), index))
    }

    /// Takes a slot for a start of what stands, which is no submission.
    pub fn reserve(&self) -> Result<u32> {
        self.take_slot(&mut lock(&self.free))
    }

    /// Gives a slot back that was not needed.
    pub fn release(&self, index: u32) {
        lock(&self.free).slots.push(index);
    }

    /// Begins with a start in a slot that was reserved for it. Returns the handle.
    pub fn open_start(&self, index: u32, keep: Option<Box<dyn Any + Send>>, standing: &Arc<Standing>) -> u64 {
        let inner = Inner { keep, standing: Some(Arc::clone(standing)), ..Inner::default() };
        self.slot(index).begin(index, inner)
    }

    /// What the operation of a handle is a start of, if it is one.
    pub fn standing(&self, handle: u64) -> Result<Option<Arc<Standing>>> {
        let (slot, _) = self.find(handle)?;
        Ok(lock(&slot.inner).standing.clone())
    }

    fn take_slot(&self, free: &mut Free) -> Result<u32> {
        let index = match free.slots.pop() {
            Some(index) => index,
            None if (free.made as usize) < IN_FLIGHT_MAX => {
                free.made += 1;
                free.made - 1
            }
            None => {
                return Err(Error::usage(format!(
                    "{IN_FLIGHT_MAX} operations are in flight; wait for some of them first"
                )));
            }
        };
        self.pages[index as usize / PAGE].get_or_init(|| (0..PAGE).map(|_| Slot::default()).collect());
        Ok(index)
    }

    /// What was submitted in a slot; the engine takes it once.
    pub fn take_submitted(&self, index: u32) -> Box<Submitted> {
        lock(&self.slot(index).inner).submitted.take().expect("a slot is taken once")
    }

    /// Keeps the passage of an operation until it has ended.
    pub fn keep_passage(&self, index: u32, passage: Box<dyn Passage>) {
        lock(&self.slot(index).inner).passage = Some(passage);
    }

    /// Gives the memory of a submission back for a later one.
    pub fn recycle(&self, submitted: Box<Submitted>) {
        lock(&self.free).spare.push(submitted);
    }

    /// The outcome of the operation in a slot; wakes who waits.
    pub fn complete(&self, index: u32, result: Result<Outcome>) {
        self.deliver(index, result, |cause| Error::usage(cause.to_string()));
    }

    /// The outcome of the operation in a slot, whose results are sent on their way back first; where that fails, `lost`
    /// makes the error of it. Wakes who waits.
    pub fn deliver(&self, index: u32, mut result: Result<Outcome>, lost: impl FnOnce(Cause) -> Error) {
        let slot = self.slot(index);
        let mut inner = lock(&slot.inner);
        let state = slot.state.load(Ordering::Relaxed);
        assert!(matches!(state & 3, PENDING | ABANDONED), "an operation ends once");
        if let Some(mut passage) = inner.passage.take()
            && state & 3 == PENDING
            && let Ok(outcome) = &mut result
            && let Err(cause) = passage.go_back(outcome)
        {
            result = Err(lost(cause));
        }
        inner.result = Some(result);
        // Before anyone can see the end, so that whoever has seen it may submit the name again.
        if let Some(name) = inner.name.take() {
            lock(&self.names.taken).remove(&name);
        }
        if state & 3 == ABANDONED {
            self.close_and_release(index, slot, &mut inner);
        } else {
            slot.state.store((state & !3) | DONE, Ordering::Release);
            if inner.sleepers > 0 {
                slot.done.notify_all();
            }
        }
    }

    /// Closes what nobody waits for, and keeps what it had kept alive until a device has come past its results.
    fn close_and_release(&self, index: u32, slot: &Slot, inner: &mut Inner) {
        let (result, keep) = self.close(index, slot, inner);
        let arrives = result.ok().and_then(|outcome| outcome.arrives);
        lock(&self.released).extend(keep.map(|keep| (arrives, keep)));
    }

    fn close(
        &self,
        index: u32,
        slot: &Slot,
        inner: &mut Inner,
    ) -> (Result<Outcome>, Option<Box<dyn Any + Send>>) {
        let state = slot.state.load(Ordering::Relaxed);
        slot.state.store(state & !3, Ordering::Release);
        let result = inner.result.take().expect("only what has ended is closed");
        let keep = inner.keep.take();
        inner.standing = None;
        lock(&self.free).slots.push(index);
        (result, keep)
    }

    /// Whether the operation has ended.
    pub fn poll(&self, handle: u64) -> Result<bool> {
        self.find(handle).map(|(_, state)| state & 3 == DONE)
    }

    /// The slot of a handle, for the coordinator's batching window.
    pub fn index(&self, handle: u64) -> Result<u32> {
        self.find(handle).map(|_| (handle & 0xFF_FFFF) as u32)
    }

    /// Takes the outcome if it is there.
    pub fn try_take(&self, handle: u64) -> Result<Waited> {
        let (slot, state) = self.find(handle)?;
        if state & 3 != DONE {
            return Ok(Waited::Pending);
        }
        let mut inner = lock(&slot.inner);
        // Two threads may wait for one handle; the second finds it used up.
        self.find(handle)?;
        let (result, keep) = self.close((handle & 0xFF_FFFF) as u32, slot, &mut inner);
        Ok(Waited::Done(result, keep))
    }

    /// Sleeps until the operation has ended or `until` has come; for callers that do not drive themselves.
    pub fn sleep(&self, handle: u64, until: Instant) -> Result<()> {
        let (slot, _) = self.find(handle)?;
        let mut inner = lock(&slot.inner);
        if self.find(handle)?.1 & 3 == DONE {
            return Ok(());
        }
        let left = until.saturating_duration_since(Instant::now());
        inner.sleepers += 1;
        let (mut inner, _) =
            slot.done.wait_timeout(inner, left).unwrap_or_else(std::sync::PoisonError::into_inner);
        inner.sleepers -= 1;
        Ok(())
    }

    /// The caller gives up its handle, which is no handle from now on; the operation finishes by itself.
    pub fn abandon(&self, handle: u64) {
        let Ok((slot, _)) = self.find(handle) else { return };
        let mut inner = lock(&slot.inner);
        let Ok((_, state)) = self.find(handle) else { return };
        if state & 3 == DONE {
            self.close_and_release((handle & 0xFF_FFFF) as u32, slot, &mut inner);
        } else {
            slot.state.store((state & !3) | ABANDONED, Ordering::Release);
            // Another thread may sleep for this handle; it finds it given up.
            if inner.sleepers > 0 {
                slot.done.notify_all();
            }
        }
    }

    /// What abandoned operations had kept alive and need no more.
    pub fn released(&self) -> Vec<Box<dyn Any + Send>> {
        let mut released = lock(&self.released);
        // A device that fails does not write any more.
        let over = |(mark, _): &mut Released| mark.as_ref().is_none_or(|m| m.0.is_over().unwrap_or(true));
        released.extract_if(.., over).map(|(_, keep)| keep).collect()
    }
}

impl Default for Submitted {
    fn default() -> Self {
        use crate::types::{Collective, JoinAverage, Place, Rank, ReduceOp, Scale};
        Submitted {
            set: SetId(0),
            name: String::new(),
            hold: false,
            signature: Signature {
                collective: Collective::Barrier,
                op: ReduceOp::Sum,
                scale: Scale::default(),
                root: Rank(0),
                place: Place::Host,
                join_average: JoinAverage::Size,
                tensors: Vec::new(),
                ranks: Vec::new(),
            },
            call: Vec::new(),
            tensors: Vec::new(),
            refused: None,
            message: None,
            passage: None,
            on_device: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::time::Duration;

    #[test]
    fn a_handle_is_used_once() {
        let handles = Handles::default();
        let (handle, index) = handles.open(None, |s| s.name.push('x')).unwrap();
        assert!(!handles.poll(handle).unwrap());
        assert_eq!(handles.take_submitted(index).name, "x");
        handles.complete(index, Ok(Outcome::default()));
        assert!(handles.poll(handle).unwrap());
        assert!(matches!(handles.try_take(handle), Ok(Waited::Done(Ok(_), None))));
        assert!(matches!(handles.try_take(handle), Err(Error::Usage(_))));
        let (again, same) = handles.open(None, |_| {}).unwrap();
        assert_eq!(index, same);
        assert_ne!(handle, again, "the generation differs");
        assert!(handles.poll(handle).is_err());
    }

    #[test]
    fn a_name_is_in_flight_once_in_each_set() {
        let handles = Handles::default();
        let named = |set: u32, name: &'static str| {
            handles.open(None, move |s| {
                (s.set, s.hold) = (SetId(set), name.is_empty());
                s.name.clear();
                s.name.push_str(if name.is_empty() { "ring.0" } else { name });
            })
        };
        let (first, index) = named(0, "x").unwrap();
        let Err(Error::Usage(words)) = named(0, "x") else { panic!("the second is refused") };
        assert!(words.contains("'x'"), "{words}");
        for _ in 0..2 {
            named(0, "").unwrap();
        }
        named(0, "y").unwrap();
        named(1, "x").unwrap();
        handles.complete(index, Ok(Outcome::default()));
        assert!(handles.poll(first).unwrap(), "nobody has waited yet");
        let (_, again) = named(0, "x").unwrap();
        handles.complete(again, Ok(Outcome::default()));
        named(0, "x").unwrap();
    }

    #[test]
    fn an_abandoned_operation_gives_back_what_it_kept() {
        let handles = Handles::default();
        let (handle, index) = handles.open(Some(Box::new(7u8)), |_| {}).unwrap();
        handles.abandon(handle);
        assert!(handles.released().is_empty(), "kept until the end");
        assert!(matches!(handles.poll(handle), Err(Error::Usage(_))), "given up, so nobody's");
        assert!(matches!(handles.try_take(handle), Err(Error::Usage(_))));
        assert!(matches!(handles.sleep(handle, Instant::now()), Err(Error::Usage(_))));
        handles.take_submitted(index);
        handles.complete(index, Err(Error::Shutdown(None)));
        assert_eq!(handles.released().len(), 1);
        let (next, same) = handles.open(None, |_| {}).unwrap();
        assert_eq!(same, index, "the slot is free again");
        assert!(handles.poll(handle).is_err() && !handles.poll(next).unwrap());
    }

    #[test]
    fn a_sleeper_hears_that_its_handle_was_given_up() {
        let handles = Arc::new(Handles::default());
        let (handle, _) = handles.open(None, |_| {}).unwrap();
        let sleeper = {
            let handles = Arc::clone(&handles);
            std::thread::spawn(move || {
                loop {
                    match handles.try_take(handle) {
                        Ok(Waited::Pending) => {}
                        Ok(Waited::Done(..)) => panic!("nothing ended"),
                        Err(error) => return error,
                    }
                    if let Err(error) = handles.sleep(handle, Instant::now() + Duration::from_secs(20)) {
                        return error;
                    }
                }
            })
        };
        handles.abandon(handle);
        assert!(matches!(sleeper.join().unwrap(), Error::Usage(_)));
    }

    #[test]
    fn a_sleeper_is_woken() {
        let handles = Arc::new(Handles::default());
        let (handle, index) = handles.open(None, |_| {}).unwrap();
        let sleeper = {
            let handles = Arc::clone(&handles);
            std::thread::spawn(move || {
                while matches!(handles.try_take(handle), Ok(Waited::Pending)) {
                    handles.sleep(handle, Instant::now() + Duration::from_secs(20)).unwrap();
                }
            })
        };
        handles.complete(index, Ok(Outcome::default()));
        sleeper.join().unwrap();
    }
}
