//! Channels: a collective that was planned once, and what its members exchange it through.
//!
//! A channel has a block of each member's board to itself (`transport::board`), so that starts of one channel need no
//! agreement with anything else: whoever waits turns it without the engine's baton, and the engine turns it beside
//! its other work, so that it goes on while nobody waits. It is shared between the caller's threads and the engine.
#![forbid(unsafe_code)]

use crate::error::{Cause, Error, Result};
use crate::memory::{Memory, OwnedBytes, RunId};
use crate::transport::board::{Block, BoardMemory, Exchange, Seat};
use crate::types::Rank;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// A planned collective on this rank.
pub struct Channel {
    /// The members, ascending.
    pub ranks: Arc<[Rank]>,
    /// The boards of the other members.
    boards: Vec<Arc<BoardMemory>>,
    inner: Mutex<Inner>,
    under_way: AtomicBool,
    failed: OnceLock<Error>,
    over: Condvar,
    activity: Arc<Activity>,
    /// Whether it reduces tensors where they lie.
    pub(super) lends: bool,
}

/// What the channels of an engine and whoever drives it tell each other.
#[derive(Default)]
pub struct Activity {
    /// Channels under way.
    under_way: AtomicUsize,
    /// One has something that the engine must see to.
    called: AtomicBool,
}

impl Activity {
    /// Whether a channel is under way.
    pub(super) fn is_any_under_way(&self) -> bool {
        self.under_way.load(Ordering::SeqCst) > 0
    }
    /// Whether the engine is to look after its channels.
    pub(super) fn calls(&self) -> bool {
        self.called.load(Ordering::SeqCst)
    }
    /// The same, and it does so now.
    pub(super) fn take_call(&self) -> bool {
        self.calls() && self.called.swap(false, Ordering::SeqCst)
    }
}

/// What a channel works with.
pub(super) struct Inner {
    /// Where it exchanges.
    pub(super) seat: Seat,
    /// The memory of its tensors.
    pub(super) memory: Memory,
    /// What it does, in this order.
    pub(super) jobs: Vec<(RunId, Arc<Exchange>)>,
    /// Bytes in the place of results that this member does not get.
    pub(super) _stand_ins: Vec<OwnedBytes>,
    /// This member's part of the memory that it exchanges through.
    block: Option<Block>,
    /// All members have given the channel up.
    is_free: bool,
    /// The epoch is over: this member does no more for the others.
    is_closed: bool,
    /// What is over has failed.
    is_lost: bool,
    complete: Vec<RunId>,
    /// Jobs that are not complete.
    left: usize,
    published: bool,
    fault: Option<(usize, Cause)>,
    sleepers: u32,
}

impl Inner {
    pub(super) fn new(
        seat: Seat,
        memory: Memory,
        jobs: Vec<(RunId, Arc<Exchange>)>,
        stand_ins: Vec<OwnedBytes>,
        block: Block,
    ) -> Inner {
        Inner {
            seat,
            memory,
            jobs,
            _stand_ins: stand_ins,
            block: Some(block),
            is_free: false,
            is_closed: false,
            is_lost: false,
            complete: Vec::new(),
            left: 0,
            published: false,
            fault: None,
            sleepers: 0,
        }
    }
}

/// What a turn of a channel has come to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Turn {
    /// Something moved.
    pub moved: bool,
    /// The collective is over here, or has failed.
    pub over: bool,
    /// The engine must look at it: a peer sleeps that is to be woken, or one has broken the protocol.
    pub calls: bool,
}

impl Channel {
    pub(super) fn new(
        ranks: Arc<[Rank]>,
        boards: Vec<Arc<BoardMemory>>,
        inner: Inner,
        activity: Arc<Activity>,
    ) -> Channel {
        let lends = inner.jobs.iter().any(|(_, exchange)| exchange.lends);
        Channel {
            ranks,
            boards,
            inner: Mutex::new(inner),
            under_way: AtomicBool::new(false),
            failed: OnceLock::new(),
            over: Condvar::new(),
            activity,
            lends,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic elsewhere must not hide the outcome from the waiters.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins with the collective once more.
    pub fn start(&self) -> Result<Turn> {
        let mut inner = self.lock();
        self.check()?;
        assert!(!self.is_under_way(), "whoever starts a channel has waited for it");
        let inner = &mut *inner;
        (inner.left, inner.is_lost) = (0, false);
        for (run, exchange) in inner.jobs.iter().filter(|(_, exchange)| exchange.ticks > 0) {
            inner.seat.push(*run, exchange);
            inner.left += 1;
        }
        self.under_way.store(true, Ordering::Release);
        self.activity.under_way.fetch_add(1, Ordering::SeqCst);
        Ok(self.advance(inner))
    }

    /// Moves what can be moved.
    pub fn turn(&self) -> Turn {
        self.advance(&mut self.lock())
    }

    fn advance(&self, inner: &mut Inner) -> Turn {
        if !self.is_under_way() {
            return Turn { moved: false, over: true, calls: false };
        }
        let mut moved = false;
        if inner.left > 0 && inner.fault.is_none() && !inner.is_closed {
            match inner.seat.progress(&inner.memory, &mut inner.complete) {
                Ok(any) => moved = any,
                Err(fault) => inner.fault = Some(fault),
            }
            inner.left -= inner.complete.len();
            inner.complete.clear();
        }
        if inner.seat.take_published() {
            // Before the look whether somebody sleeps; whoever lies down says so before a last look at the counters.
            fence(Ordering::SeqCst);
            inner.published |= self.boards.iter().any(|board| board.asleep().load(Ordering::Relaxed) != 0);
        }
        let over = inner.left == 0;
        if over {
            self.end(inner);
        }
        let calls = inner.published || inner.fault.is_some();
        if calls {
            self.activity.called.store(true, Ordering::SeqCst);
        }
        Turn { moved, over, calls }
    }

    fn end(&self, inner: &mut Inner) {
        if self.under_way.swap(false, Ordering::AcqRel) {
            self.activity.under_way.fetch_sub(1, Ordering::SeqCst);
            if inner.sleepers > 0 {
                self.over.notify_all();
            }
        }
    }

    /// Whether it was started and is not over.
    #[must_use]
    pub fn is_under_way(&self) -> bool {
        self.under_way.load(Ordering::Acquire)
    }

    /// Why it can not be started any more.
    pub fn check(&self) -> Result<()> {
        self.failed.get().map_or(Ok(()), |error| Err(error.clone()))
    }

    /// How the last start has ended.
    pub fn outcome(&self) -> Result<()> {
        if self.lock().is_lost { self.check() } else { Ok(()) }
    }

    /// The epoch is over, and what is under way is settled later.
    pub(super) fn close(&self) {
        self.lock().is_closed = true;
    }

    /// The epoch is over: so is what is under way, and every later start. What all members have done their part for is
    /// completed.
    pub(super) fn fail(&self, error: &Error) {
        let inner = &mut *self.lock();
        let _ = self.failed.set(error.clone());
        if self.is_under_way() {
            inner.seat.finish(&inner.memory, &mut inner.complete);
            inner.left -= inner.complete.len();
            inner.complete.clear();
            inner.is_lost |= inner.left > 0;
        }
        self.end(inner);
    }

    /// A member has left in good order. What it has done its part for goes on; nothing can be started any more.
    pub(super) fn depart(&self, who: Rank, error: &Error) {
        let Ok(member) = self.ranks.binary_search(&who) else { return };
        let needed = self.lock().seat.needs(member);
        match needed {
            true => self.fail(error),
            false => drop(self.failed.set(error.clone())),
        }
    }

    /// All members have given it up: nobody looks at its memory any more.
    pub(super) fn release(&self) {
        self.lock().is_free = true;
    }

    /// Whether something was published to members that may sleep, since the last call.
    pub(super) fn take_published(&self) -> bool {
        std::mem::take(&mut self.lock().published)
    }

    /// Which member has broken the protocol, and how.
    pub(super) fn take_fault(&self) -> Option<(usize, Cause)> {
        self.lock().fault.take()
    }

    /// Whether a member has counted since this side last looked.
    pub(super) fn has_news(&self) -> bool {
        self.is_under_way() && self.lock().seat.has_news()
    }

    /// Members that have not come to where this one waits.
    #[must_use]
    pub fn missing(&self) -> Vec<Rank> {
        let inner = self.lock();
        inner.seat.missing().map(|member| self.ranks[member]).collect()
    }

    /// Sleeps until it is over, for at most `nap`; for callers that do not drive themselves.
    pub fn sleep(&self, nap: Duration) {
        let mut inner = self.lock();
        if self.is_under_way() {
            inner.sleepers += 1;
            let (mut inner, _) = self.over.wait_timeout(inner, nap).unwrap_or_else(PoisonError::into_inner);
            inner.sleepers -= 1;
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        let inner = self.inner.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(block) = inner.block.take().filter(|_| !inner.is_free) {
            block.leave();
        }
    }
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a channel of {} ranks", self.ranks.len())
    }
}
