//! Handles: where a submitted operation waits for its outcome, shared between the callers' threads and
//! whoever drives the engine.
//!
//! A handle is a slot and a generation. A slot is free, pending or done; the word `state` holds the generation
//! and the state together, so that a handle used after its wait is an error and never somebody else's
//! operation. Slots come in pages that are allocated when first needed.
#![forbid(unsafe_code)]

use super::operation::Outcome;
use crate::error::{Error, Result};
use crate::limits::IN_FLIGHT_MAX;
use crate::memory::Region;
use crate::types::{SetId, Signature};
use std::any::Any;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock};
use std::time::Instant;

const PAGE: usize = 1024;
const PENDING: u64 = 1;
const DONE: u64 = 2;

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
}

/// A point-to-point message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// The other end.
    pub peer: crate::types::Rank,
    /// The tag.
    pub tag: u32,
    /// Whether this end sends.
    pub sends: bool,
}

#[derive(Default)]
struct Inner {
    submitted: Option<Box<Submitted>>,
    result: Option<Result<Outcome>>,
    keep: Option<Box<dyn Any + Send>>,
    abandoned: bool,
    /// Somebody sleeps on `done`: without sleepers there is nobody to wake, which would cost a system call.
    sleepers: u32,
}

#[derive(Default)]
struct Slot {
    /// Generation in the upper 62 bits, state in the lower 2.
    state: AtomicU64,
    inner: Mutex<Inner>,
    done: Condvar,
}

/// All handles of a process.
pub struct Handles {
    pages: Box<[OnceLock<Box<[Slot]>>]>,
    free: Mutex<Free>,
    /// What abandoned operations had kept alive and need no more.
    released: Mutex<Vec<Box<dyn Any + Send>>>,
}

#[derive(Default)]
struct Free {
    slots: Vec<u32>,
    /// Boxes whose vectors have capacity already.
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
        "this handle is not in flight: it was waited for already, or it belongs to an earlier init()",
    )
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
        if state & 3 != 0 && (state >> 2) & 0xFF_FFFF_FFFF == handle >> 24 {
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
            (index, free.spare.pop())
        };
        self.pages[index as usize / PAGE].get_or_init(|| (0..PAGE).map(|_| Slot::default()).collect());
        let slot = self.slot(index);
        let mut submitted = spare.unwrap_or_default();
        fill(&mut submitted);
        let mut inner = lock(&slot.inner);
        // Late risers of the slot's last operation still count themselves out.
        let sleepers = inner.sleepers;
        *inner = Inner { submitted: Some(submitted), keep, sleepers, ..Inner::default() };
        drop(inner);
        let generation = (slot.state.load(Ordering::Relaxed) >> 2) + 1;
        slot.state.store(generation << 2 | PENDING, Ordering::Release);
        Ok(((generation & 0xFF_FFFF_FFFF) << 24 | u64::from(index), index))
    }

    /// What was submitted in a slot; the engine takes it once.
    pub fn take_submitted(&self, index: u32) -> Box<Submitted> {
        lock(&self.slot(index).inner).submitted.take().expect("a slot is taken once")
    }

    /// Gives the memory of a submission back for a later one.
    pub fn recycle(&self, submitted: Box<Submitted>) {
        lock(&self.free).spare.push(submitted);
    }

    /// The outcome of the operation in a slot; wakes who waits.
    pub fn complete(&self, index: u32, result: Result<Outcome>) {
        let slot = self.slot(index);
        let mut inner = lock(&slot.inner);
        inner.result = Some(result);
        let abandoned = inner.abandoned;
        let state = slot.state.load(Ordering::Relaxed);
        assert_eq!(state & 3, PENDING, "an operation ends once");
        slot.state.store((state & !3) | DONE, Ordering::Release);
        if abandoned {
            let keep = self.close(index, slot, &mut inner).1;
            lock(&self.released).extend(keep);
        } else if inner.sleepers > 0 {
            slot.done.notify_all();
        }
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

    /// The caller gives up its handle; the operation finishes by itself.
    pub fn abandon(&self, handle: u64) {
        let Ok((slot, _)) = self.find(handle) else { return };
        let mut inner = lock(&slot.inner);
        let Ok((_, state)) = self.find(handle) else { return };
        inner.abandoned = true;
        if state & 3 == DONE {
            let keep = self.close((handle & 0xFF_FFFF) as u32, slot, &mut inner).1;
            lock(&self.released).extend(keep);
        }
    }

    /// What abandoned operations had kept alive and need no more.
    pub fn released(&self) -> Vec<Box<dyn Any + Send>> {
        std::mem::take(&mut lock(&self.released))
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
    fn an_abandoned_operation_gives_back_what_it_kept() {
        let handles = Handles::default();
        let (handle, index) = handles.open(Some(Box::new(7u8)), |_| {}).unwrap();
        handles.abandon(handle);
        assert!(handles.released().is_empty(), "kept until the end");
        handles.take_submitted(index);
        handles.complete(index, Err(Error::Shutdown(None)));
        assert_eq!(handles.released().len(), 1);
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
