//! Who drives the engine, and how they sleep.
//!
//! The engine belongs to whoever holds the *baton* (its mutex). A caller that waits drives progress itself, as
//! MPI does, and keeps the baton while it sleeps; a background thread drives while work is unfinished and no
//! caller waits, and gives the baton up while it sleeps, so that a caller takes over without a hand-off.
//!
//! Everybody sleeps on descriptors: the process's own eventfd (which peers on the host, the porter and
//! submitters write), the links' sockets, and for the background thread one eventfd more. The handshake is
//! the same everywhere (`Drowsy`): the sleeper stores *asleep*, then looks at every queue again; the
//! producer publishes, then looks at *asleep*. The full fence between the two on each side makes one of them
//! see the other; `loom` checks it.

mod channels;
mod intake;
mod standing;

pub use standing::Ran;

use super::Engine;
use super::channel::Activity;
use super::handles::{Handles, Submitted, Waited};
use super::spin::{Naps, Spin};
use super::standing::Standings;
use crate::coordinator::{OpId, rank_list};
use crate::error::{Broken, Cause, Error, Result};
use crate::limits;
use crate::log;
use crate::transport::wake::Waker;
use crate::types::{Rank, SetId, Time};
use intake::Arriving;
#[cfg(loom)]
use loom::sync::atomic::{AtomicBool as SleepFlag, fence};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use standing::Watched;
use std::any::Any;
use std::os::fd::{BorrowedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicBool as SleepFlag, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A flag that says *I am about to sleep; wake me*.
#[derive(Default)]
pub(super) struct Drowsy {
    asleep: SleepFlag,
}

impl Drowsy {
    /// The sleeper says so, and must look at every queue once more before it sleeps.
    pub(super) fn lie_down(&self) {
        self.asleep.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }
    /// The sleeper is awake.
    pub(super) fn rise(&self) {
        self.asleep.store(false, Ordering::SeqCst);
    }
    /// The producer has published. True if the sleeper must be woken; then only this producer does so.
    pub(super) fn must_wake(&self) -> bool {
        fence(Ordering::SeqCst);
        self.asleep.load(Ordering::SeqCst) && self.asleep.swap(false, Ordering::SeqCst)
    }
}

/// How waiting callers spend their time before they sleep.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// How long to look again and again at most, in nanoseconds.
    pub spin_ns: u64,
    /// Whether to give the processor away between two looks: more ranks than cores.
    pub yields: bool,
    /// The processor to which the background thread is bound.
    pub processor: Option<usize>,
    /// How often a start of what stands is warned of that others do not make, in nanoseconds; 0 for never.
    pub stall_warn_ns: u64,
    /// After what time the epoch ends for it; 0 for never.
    pub stall_fail_ns: u64,
}

/// What submitters leave for the driver.
enum Mail {
    /// The submission in this slot.
    Submitted(u32),
    /// Somebody waits for the operation in this slot.
    Waiting(u32),
    /// A member does not start this plan: the epoch is to end.
    Stalled(String, Vec<Rank>),
    /// The plan of this number was given up.
    Freed(SetId, u64),
}

struct Shared {
    engine: Mutex<Engine>,
    handles: Arc<Handles>,
    /// What the engine's channels tell.
    activity: Arc<Activity>,
    /// What stands.
    standings: Arc<Standings>,
    mail: Mutex<Vec<Mail>>,
    has_mail: AtomicBool,
    /// In the order of submission. Whoever drives looks after them.
    arriving: Mutex<Vec<Arriving>>,
    has_arriving: AtomicBool,
    /// A caller drives, or is about to.
    caller: AtomicBool,
    /// The driving caller sleeps on `waker`.
    caller_sleep: Drowsy,
    /// The background thread sleeps on `nudge` (and perhaps more).
    background_sleep: Drowsy,
    /// When it will wake by itself, where that is soon; else 0.
    background_wakes_ns: AtomicU64,
    waker: Waker,
    nudge: Waker,
    stop: AtomicBool,
    origin: Instant,
    patience: Patience,
    /// Used by whoever drives as a caller.
    spin: Mutex<Spin>,
    failure: Mutex<Option<Error>>,
}

/// The engine of this process, and the thread that drives it while nobody waits.
pub struct Driver {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Tensors up to this size may wait for the end of a batching window.
const SMALL_BYTES: u64 = 64 << 10;
/// A sleep that ends by itself within this time is not cut short for a small tensor.
const SOON: Duration = Duration::from_millis(1);

/// Short naps of the background thread after it had something to do, and their length.
const NAPS: u32 = 4;
const SHORT_NAP: Duration = Duration::from_micros(100);

/// The longest sleep: a bound on what a lost wake could cost, never relied upon.
const NAP: Duration = Duration::from_millis(100);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Driver {
    /// Starts driving. `make` builds the engine, `waker` is the eventfd
    /// that peers and the porter write.
    pub fn start(
        waker: Waker,
        handles: Arc<Handles>,
        patience: Patience,
        make: impl FnOnce() -> Engine,
    ) -> std::io::Result<Driver> {
        let origin = Instant::now();
        let engine = make();
        let shared = Arc::new(Shared {
            activity: engine.activity(),
            standings: engine.standings(),
            engine: Mutex::new(engine),
            handles,
            mail: Mutex::default(),
            has_mail: AtomicBool::new(false),
            arriving: Mutex::default(),
            has_arriving: AtomicBool::new(false),
            caller: AtomicBool::new(false),
            caller_sleep: Drowsy::default(),
            background_sleep: Drowsy::default(),
            background_wakes_ns: AtomicU64::new(0),
            waker,
            nudge: Waker::new()?,
            stop: AtomicBool::new(false),
            origin,
            patience,
            // With a processor for each rank it is never wrong to look for the whole time: it is short, and a waiter
            // that sleeps makes the others' waits longer than their own looks, so that all sleep for ever after.
            // Whoever gives the processor away may get it back late: then it is better not to do so at all.
            spin: Mutex::new(Spin::new(patience.spin_ns, if patience.yields { 0 } else { patience.spin_ns })),
            failure: Mutex::default(),
        });
        let background = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("carole".into()).spawn(move || {
            if let Some(processor) = background.patience.processor {
                bind_to(processor);
            }
            background.background();
        })?;
        Ok(Driver { shared, thread: Mutex::new(Some(thread)) })
    }

    /// Submits what `fill` writes. With `quiet` nobody is woken: the caller waits at once and drives itself. Nor is
    /// the background thread woken for a small tensor when it will soon look by itself, at the end of its
    /// batching window: else a thousand small tensors would cost a thousand wakes.
    pub fn submit(
        &self,
        keep: Option<Box<dyn Any + Send>>,
        quiet: bool,
        fill: impl FnOnce(&mut Submitted),
    ) -> Result<u64> {
        if let Some(error) = lock(&self.shared.failure).as_ref() {
            return Err(error.clone());
        }
        let mut bytes = 0;
        let (handle, index) = self.shared.handles.open(keep, |submitted| {
            fill(submitted);
            bytes = match &submitted.on_device {
                Some(there) => there.tensors.iter().map(|memory| memory.input.len()).sum(),
                None => submitted.tensors.iter().map(|(input, _)| input.len()).sum(),
            };
        })?;
        self.shared.send(Mail::Submitted(index));
        if !quiet && (bytes > SMALL_BYTES || !self.shared.looks_soon()) {
            self.shared.wake_driver();
        }
        Ok(handle)
    }

    /// Waits for an operation, driving if nobody else does. `until` is the caller's limit.
    pub fn wait(&self, handle: u64, until: Option<Instant>) -> Result<Waited> {
        let shared = &*self.shared;
        let mut told = false;
        if let Some(standing) = shared.handles.standing(handle)? {
            shared.spin_for_start(&standing);
        }
        loop {
            if let Waited::Done(result, keep) = shared.handles.try_take(handle)? {
                return Ok(Waited::Done(result, keep));
            }
            if until.is_some_and(|at| Instant::now() >= at) {
                return Ok(Waited::Pending);
            }
            if shared.stop.load(Ordering::SeqCst) {
                // Somebody is saying goodbye: what was in flight ends, and what came too late ends here.
                shared.refuse_mail();
                shared.handles.sleep(handle, Instant::now() + NAP)?;
                continue;
            }
            if !shared.caller.swap(true, Ordering::SeqCst) {
                let op = shared.handles.index(handle).ok().map(OpId);
                shared.drive_until(op, until, &|| shared.handles.poll(handle).unwrap_or(true));
                continue;
            }
            if !told {
                shared.send(Mail::Waiting(shared.handles.index(handle)?));
                told = true;
            }
            shared.wake_driver();
            let nap = Instant::now() + NAP;
            shared.handles.sleep(handle, until.map_or(nap, |at| at.min(nap)))?;
        }
    }

    /// What makes whoever drives look again, from any thread.
    #[must_use]
    pub fn wake(&self) -> Arc<dyn Fn() + Send + Sync> {
        let waker = self.shared.waker.clone();
        Arc::new(move || waker.wake())
    }

    /// Gives up a handle.
    pub fn abandon(&self, handle: u64) {
        self.shared.handles.abandon(handle);
    }

    /// Reads something from the engine; `None` while somebody else drives it.
    pub fn try_with<T>(&self, read: impl FnOnce(&mut Engine) -> T) -> Option<T> {
        self.shared.engine.try_lock().ok().map(|mut engine| read(&mut engine))
    }

    /// What an operation waits for.
    #[must_use]
    pub fn explain(&self, handle: u64) -> Option<String> {
        if let Some(standing) = self.shared.handles.standing(handle).ok()?.filter(|s| s.number().is_some()) {
            return Some(format!("waiting for {} on '{}'", rank_list(&standing.missing()), standing.name()));
        }
        let index = self.shared.handles.index(handle).ok()?;
        // Not while another caller holds the baton in its sleep: an explanation is not worth a hang.
        let engine = self.shared.engine.try_lock().ok()?;
        engine.explain(OpId(index), self.shared.now())
    }

    /// Says goodbye, lets it leave for a bounded time, and stops. Before that, `last` is read from the engine.
    pub fn stop<T>(&self, last: impl FnOnce(&Engine) -> T) -> T {
        self.stop_background();
        let mut engine = lock(&self.shared.engine);
        let last = last(&engine);
        let now = self.shared.now();
        engine.leave();
        let limit = now.after_ns(limits::SHUTDOWN_MS * 1_000_000);
        *lock(&self.shared.failure) = Some(Error::Shutdown(None));
        loop {
            let now = self.shared.now();
            let moved = self.shared.turn(&mut engine, None, now);
            if engine.is_gone() || now >= limit {
                break;
            }
            if !moved {
                let mut fds = Vec::new();
                engine.descriptors(&mut |fd, _| fds.push((fd, true)));
                let nap = if engine.is_polled() { Naps::LONGEST } else { Duration::from_millis(10) };
                watch(&fds, nap);
            }
        }
        last
    }

    /// Ends the thread, and makes a caller that drives give the baton up.
    fn stop_background(&self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.nudge.wake();
        self.shared.waker.wake();
        if let Some(thread) = lock(&self.thread).take() {
            // The thread catches its own panics; there is nothing to learn from its result.
            let _ = thread.join();
        }
    }
}

/// Binds this thread to one processor. One that does not exist is a loss of speed and not of the job.
fn bind_to(processor: usize) {
    use rustix::thread::{CpuSet, sched_setaffinity};
    let mut set = CpuSet::new();
    let known = processor < CpuSet::MAX_CPU;
    if known {
        set.set(processor);
    }
    if !known || sched_setaffinity(None, &set).is_err() {
        log::warn(format_args!(
            "the background thread cannot be bound to processor {processor} (CAROLE_THREAD_AFFINITY); it runs \
             wherever the kernel puts it"
        ));
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.stop_background();
    }
}

impl Shared {
    fn now(&self) -> Time {
        Time(self.origin.elapsed().as_nanos() as u64)
    }

    fn send(&self, mail: Mail) {
        lock(&self.mail).push(mail);
        self.has_mail.store(true, Ordering::SeqCst);
    }

    /// Whether the background thread wakes by itself before long. The mail is there already: whoever rises after
    /// this look finds it.
    fn looks_soon(&self) -> bool {
        !self.caller.load(Ordering::SeqCst) && self.now().0 < self.background_wakes_ns.load(Ordering::SeqCst)
    }

    fn wake_driver(&self) {
        if self.caller.load(Ordering::SeqCst) {
            if self.caller_sleep.must_wake() {
                self.waker.wake();
            }
        } else if self.background_sleep.must_wake() {
            self.nudge.wake();
        }
    }

    /// One turn of the engine, which may begin with the news that somebody waits for an operation. A panic in it
    /// (a bug of ours) breaks the epoch and leaves no waiter behind.
    fn turn(&self, engine: &mut Engine, waits_for: Option<OpId>, now: Time) -> bool {
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let mut moved = self.read_mail(engine, now);
            moved |= self.take_in(engine, now);
            if let Some(op) = waits_for {
                self.wait_for(engine, op, now);
            }
            moved |= engine.turn(now);
            self.report(engine);
            moved
        }));
        outcome.unwrap_or_else(|panic| {
            self.fail(engine, &*panic);
            false
        })
    }

    fn report(&self, engine: &mut Engine) {
        let (epoch, me) = (engine.epoch, engine.me);
        let mut failure = None;
        for ended in engine.ended() {
            self.handles.deliver(ended.op.0, ended.result, |cause| {
                failure = Some(cause.clone());
                Error::Broken(Arc::new(Broken { epoch, culprit: Some(me), cause }))
            });
        }
        if let Some(cause) = failure {
            engine.break_epoch_with(Some(me), cause);
        }
        for warning in engine.warnings() {
            log::warn(format_args!("{warning}"));
        }
    }

    fn fail(&self, engine: &mut Engine, panic: &(dyn Any + Send)) {
        let text = panic.downcast_ref::<&str>().map(ToString::to_string);
        let text =
            text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic".into());
        let cause = Cause::Aborted(text);
        let broken = Broken { epoch: engine.epoch, culprit: Some(engine.me), cause: cause.clone() };
        let error = Error::Broken(Arc::new(broken));
        *lock(&self.failure) = Some(error.clone());
        let now = self.now();
        // The invariant that broke may be anywhere; what can still be done is done, each part by itself.
        let _ = catch_unwind(AssertUnwindSafe(|| {
            engine.break_epoch_with(Some(engine.me), cause);
            engine.turn(now);
        }));
        let _ = catch_unwind(AssertUnwindSafe(|| self.report(engine)));
        let _ = catch_unwind(AssertUnwindSafe(|| engine.fail_channels(None, &error)));
        for op in engine.ops_in_flight() {
            let _ = catch_unwind(AssertUnwindSafe(|| self.handles.complete(op.0, Err(error.clone()))));
        }
    }

    /// A caller drives until what it waits for is over. It has set `caller`.
    fn drive_until(&self, mut waits_for: Option<OpId>, until: Option<Instant>, is_over: &dyn Fn() -> bool) {
        let mut engine = lock(&self.engine);
        let mut spin = lock(&self.spin);
        // The background thread's arming is undone: this thread looks by itself.
        engine.disarm();
        let mut idle_since = None;
        let mut naps = Naps::new();
        loop {
            let now = self.now();
            let moved = self.turn(&mut engine, waits_for.take(), now);
            let over = is_over() || self.stop.load(Ordering::SeqCst);
            if moved
                && let Some((since, learns)) = idle_since.take()
                && learns
            {
                spin.found(now.since(since));
            }
            if over || until.is_some_and(|at| Instant::now() >= at) {
                break;
            }
            if moved {
                naps = Naps::new();
                continue;
            }
            // While all members are at a batch the next window is known to be on its way, and comes soon.
            let (exchanging, polled) = (engine.is_exchanging(), engine.is_polled());
            let (since, _) = *idle_since.get_or_insert((now, !exchanging && !polled));
            let limit = if exchanging { spin.whole_ns() } else { spin.limit_ns() };
            let limit = if polled { spin.polled_ns() } else { limit };
            if now.since(since) < limit {
                if self.patience.yields {
                    std::thread::yield_now()
                } else {
                    std::hint::spin_loop()
                }
                continue;
            }
            if !exchanging && !polled {
                spin.failed();
            }
            self.sleep_as_caller(&mut engine, until, &mut naps);
            idle_since = None;
        }
        if self.is_busy(&engine) {
            // What the last turn had to say leaves now: to wake the background thread for it costs far more.
            self.turn(&mut engine, None, self.now());
        }
        let busy = self.is_busy(&engine);
        drop(spin);
        drop(engine);
        self.caller.store(false, Ordering::SeqCst);
        if (busy || self.has_mail.load(Ordering::SeqCst)) && self.background_sleep.must_wake() {
            self.nudge.wake();
        }
    }

    fn sleep_as_caller(&self, engine: &mut Engine, until: Option<Instant>, naps: &mut Naps) {
        self.caller_sleep.lie_down();
        let busy = engine.arm() || self.has_mail.load(Ordering::SeqCst);
        if !busy {
            let mut limit = self.until_timeout(engine);
            if engine.is_polled() {
                limit = limit.min(naps.take());
            }
            if let Some(at) = until {
                limit = limit.min(at.saturating_duration_since(Instant::now()));
            }
            let mut fds = engine.spare_descriptors();
            fds.push((self.waker.descriptor(), false));
            engine.descriptors(&mut |fd, writes| fds.push((fd, writes)));
            watch(&fds, limit);
            engine.return_descriptors(fds);
        }
        self.caller_sleep.rise();
        self.waker.clear();
        engine.disarm();
    }

    /// Whether somebody must go on driving, or look after what is on its way here.
    fn is_busy(&self, engine: &Engine) -> bool {
        engine.is_busy() || self.has_arriving.load(Ordering::Relaxed)
    }

    fn until_timeout(&self, engine: &Engine) -> Duration {
        let now = self.now();
        engine.poll_timeout().map_or(NAP, |at| Duration::from_nanos(at.since(now)).min(NAP))
    }

    /// The background thread: drives while work is unfinished and no caller does, looks in now and then for
    /// heartbeats, sleeps otherwise.
    fn background(&self) {
        let mut fds = Vec::new();
        let (mut short_naps, mut naps) = (0, Naps::new());
        let mut watched = Watched::default();
        while !self.stop.load(Ordering::SeqCst) {
            self.look_after_standings(&mut watched);
            let (mut limit, moved, polled) = self.background_turns(&mut fds);
            // Tensors come in bursts: for a while it looks by itself, so that nobody needs to wake it.
            short_naps = if moved { NAPS } else { short_naps - short_naps.min(1) };
            if short_naps > 0 {
                limit = limit.min(SHORT_NAP);
            }
            if moved {
                naps = Naps::new();
            }
            if polled {
                limit = limit.min(naps.take());
            }
            if limit <= SOON {
                self.background_wakes_ns.store(self.now().0 + limit.as_nanos() as u64, Ordering::SeqCst);
            }
            self.background_sleep.lie_down();
            let news =
                self.has_mail.load(Ordering::SeqCst) || self.activity.calls() || self.standings.calls();
            let mail = news && !self.caller.load(Ordering::SeqCst);
            if !mail && !self.stop.load(Ordering::SeqCst) {
                fds.push((self.nudge.descriptor(), false));
                watch(&fds, limit);
            }
            self.background_sleep.rise();
            self.background_wakes_ns.store(0, Ordering::SeqCst);
            self.nudge.clear();
        }
    }

    /// Drives as long as something moves; fills in what to watch in the sleep that follows, and says how long it may
    /// be, whether anything moved, and whether something may come that does not end it.
    fn background_turns(&self, fds: &mut Vec<(RawFd, bool)>) -> (Duration, bool, bool) {
        fds.clear();
        let mut moved = false;
        loop {
            if self.caller.load(Ordering::SeqCst) || self.stop.load(Ordering::SeqCst) {
                return (NAP, false, false);
            }
            let mut engine = match self.engine.try_lock() {
                Ok(engine) => engine,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return (NAP, false, false),
            };
            // Only who drives may clear the eventfd: a caller that sleeps on it would miss its wake.
            self.waker.clear();
            engine.disarm();
            if self.turn(&mut engine, None, self.now()) {
                moved = true;
                continue;
            }
            let busy = self.is_busy(&engine);
            if busy {
                if engine.arm() || self.has_mail.load(Ordering::SeqCst) {
                    continue;
                }
                fds.push((self.waker.descriptor(), false));
                engine.descriptors(&mut |fd, writes| fds.push((fd, writes)));
            }
            return (self.until_timeout(&engine), moved, busy && engine.is_polled());
        }
    }
}

/// Sleeps until one of the descriptors is ready or the time is over.
fn watch(fds: &[(RawFd, bool)], limit: Duration) {
    let mut list: Vec<PollFd<'_>> = Vec::with_capacity(fds.len());
    for &(fd, writes) in fds {
        // SAFETY: the descriptor is only handed to poll, which answers POLLNVAL for one that was closed.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let flags = if writes { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        list.push(PollFd::from_borrowed_fd(fd, flags));
    }
    let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
    // Interrupted by a signal, or ready: either way the caller looks for itself.
    let _ = poll(&mut list, Some(&limit));
}
