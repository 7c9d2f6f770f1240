//! What of a device belongs to the whole process: its context, and events and memory that are used again.

use super::driver::{Context, Event, Fault, Stream, call, is_capturing};
use super::memory::{DeviceBytes, PinnedBytes};
use crate::device::accelerator::{Arrival, Mark, Point};
use crate::error::Cause;
use cudarc::driver::sys;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a waiter looks again and again before it lets itself be called.
const LOOK: Duration = Duration::from_micros(200);
/// Events kept for later marks.
const EVENTS_KEPT: usize = 256;
/// Blocks of staging memory that are kept: a training step has hundreds of tensors in flight.
const BLOCKS_KEPT: usize = 512;
/// And the bytes of all of them.
const KEPT_BYTES_MAX: usize = 4 << 30;

/// A device as this process uses it.
#[derive(Debug)]
pub struct Home {
    /// The device's number.
    pub number: i32,
    /// Its primary context.
    pub context: Arc<Context>,
    events: Mutex<Vec<Event>>,
    /// Streams on which waiters are called.
    bells: Mutex<Vec<Stream>>,
    /// Staging memory that nobody uses.
    pinned: Mutex<Vec<PinnedBytes>>,
    /// Memory for other processes to open that nobody uses; it is not freed, since they may have it open.
    shared: Mutex<Vec<DeviceBytes>>,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Home {
    /// The device of this number, which the user's memory lies on.
    pub fn of_device(number: i32) -> Result<Arc<Home>, Cause> {
        static HOMES: Mutex<Option<HashMap<i32, Arc<Home>>>> = Mutex::new(None);
        let mut homes = lock(&HOMES);
        let homes = homes.get_or_insert_default();
        if let Some(home) = homes.get(&number) {
            return Ok(Arc::clone(home));
        }
        let home = Arc::new(Home {
            number,
            context: Arc::new(Context::of_device(number)?),
            events: Mutex::default(),
            bells: Mutex::default(),
            pinned: Mutex::default(),
            shared: Mutex::default(),
        });
        homes.insert(number, Arc::clone(&home));
        Ok(home)
    }

    /// A mark behind what `stream` has been given so far.
    ///
    /// # Safety
    /// `stream` must be a live stream of this device, or 0, 1 or 2: its default streams.
    pub unsafe fn mark(self: &Arc<Home>, stream: sys::CUstream) -> Result<Mark, Cause> {
        let known = lock(&self.events).pop();
        let event = known.map_or_else(|| Event::new(&self.context, false), Ok)?;
        // SAFETY: the caller's promise.
        unsafe { event.record(stream)? };
        Ok(Mark(Arc::new(StreamMark { event: Some(event), home: Arc::clone(self) })))
    }

    /// Staging memory of at least `bytes` that nobody uses; never a block that is much too large.
    pub(super) fn reuse(&self, bytes: usize) -> Option<PinnedBytes> {
        let mut blocks = lock(&self.pinned);
        let fits = |block: &PinnedBytes| (bytes..=4 * bytes).contains(&block.len());
        let best = (0..blocks.len()).filter(|&i| fits(&blocks[i])).min_by_key(|&i| blocks[i].len())?;
        Some(blocks.swap_remove(best))
    }

    /// Device memory for other processes to open: what an earlier owner has left, or a new allocation.
    pub(super) fn share(&self, bytes: usize) -> Result<DeviceBytes, Cause> {
        let mut shared = lock(&self.shared);
        let known = shared.iter().position(|memory| memory.len() == bytes).map(|at| shared.swap_remove(at));
        drop(shared);
        Ok(known.map_or_else(|| DeviceBytes::new(&self.context, bytes), Ok)?)
    }

    pub(super) fn keep_shared(&self, memory: DeviceBytes) {
        lock(&self.shared).push(memory);
    }

    pub(super) fn give_back(&self, block: PinnedBytes) {
        let mut blocks = lock(&self.pinned);
        let kept: usize = blocks.iter().map(PinnedBytes::len).sum();
        let crowded = blocks.len() >= BLOCKS_KEPT || kept + block.len() > KEPT_BYTES_MAX;
        let oldest = (crowded && !blocks.is_empty()).then(|| blocks.remove(0));
        blocks.push(block);
        drop(blocks);
        // Freeing waits for the device.
        drop(oldest);
    }
}

/// The device that memory at `address` lies on, and the point up to which its producer has been given work: none
/// where it is no device memory.
///
/// # Safety
/// `stream` must be a live stream of that device, or 0, 1 or 2: its default streams.
pub unsafe fn arrival(address: u64, stream: u64) -> Result<Option<Arrival>, Cause> {
    let Some(number) = Context::number_of(address)? else { return Ok(None) };
    // SAFETY: the caller's promise.
    unsafe { arrival_on(number, stream) }.map(Some)
}

/// The point up to which a stream of the device of this number has been given work.
///
/// # Safety
/// `stream` must be a live stream of that device, or 0, 1 or 2: its default streams.
pub unsafe fn arrival_on(number: i32, stream: u64) -> Result<Arrival, Cause> {
    let home = Home::of_device(number)?;
    let stream = stream as usize as sys::CUstream;
    let current = home.context.enter()?;
    // SAFETY: the caller's promise.
    if unsafe { is_capturing(stream)? } {
        return Err(Cause::System(
            "this stream is being captured into a CUDA graph, which collectives do not support; call them \
             outside of the capture"
                .to_owned(),
        ));
    }
    drop(current);
    // SAFETY: as above.
    let mark = unsafe { home.mark(stream)? };
    Ok(Arrival { device: number, mark })
}

/// An event that goes back to where it came from.
#[derive(Debug)]
struct StreamMark {
    event: Option<Event>,
    home: Arc<Home>,
}

impl StreamMark {
    fn event(&self) -> &Event {
        self.event.as_ref().expect("there until it is dropped")
    }

    /// Calls when the mark is passed, and waits for the call until `until`.
    fn sleep(&self, until: Option<Instant>) -> Result<bool, Cause> {
        let known = lock(&self.home.bells).pop();
        let stream = known.map_or_else(|| Stream::new(&self.home.context), Ok)?;
        let bell = Arc::new(Bell::default());
        stream.wait(self.event())?;
        let current = self.home.context.enter()?;
        ring(&stream, Arc::clone(&bell))?;
        drop(current);
        let mut rung = lock(&bell.rung);
        while !*rung {
            let left = until.map(|at| at.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                // The stream still waits for this mark: nobody else is to stand behind it.
                return Ok(false);
            }
            let left = left.unwrap_or(Duration::from_secs(3600));
            (rung, _) = bell.changed.wait_timeout(rung, left).unwrap_or_else(PoisonError::into_inner);
        }
        drop(rung);
        lock(&self.home.bells).push(stream);
        Ok(true)
    }
}

impl Point for StreamMark {
    fn is_over(&self) -> Result<bool, Cause> {
        Ok(self.event().is_over()?)
    }

    fn block(&self, until: Option<Instant>) -> Result<bool, Cause> {
        let start = Instant::now();
        loop {
            if self.event().is_over()? {
                return Ok(true);
            }
            if until.is_some_and(|at| Instant::now() >= at) {
                return Ok(false);
            }
            if start.elapsed() > LOOK {
                return self.sleep(until);
            }
            std::hint::spin_loop();
        }
    }

    unsafe fn hold(&self, stream: u64) -> Result<(), Cause> {
        let stream = stream as usize as sys::CUstream;
        let _current = self.home.context.enter()?;
        // SAFETY: the event is alive; the stream is the caller's promise.
        unsafe { call!(cuStreamWaitEvent(stream, self.event().raw, 0))? };
        Ok(())
    }
}

impl Drop for StreamMark {
    fn drop(&mut self) {
        let Some(event) = self.event.take() else { return };
        let mut events = lock(&self.home.events);
        if events.len() < EVENTS_KEPT {
            events.push(event);
        }
    }
}

#[derive(Debug, Default)]
struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

/// Rings when the stream has come so far; its context must be current.
fn ring(stream: &Stream, bell: Arc<Bell>) -> Result<(), Fault> {
    unsafe extern "C" fn rung(bell: *mut c_void) {
        // SAFETY: what `ring` gave away, once.
        let bell = unsafe { Arc::from_raw(bell.cast::<Bell>().cast_const()) };
        *lock(&bell.rung) = true;
        bell.changed.notify_all();
    }
    call_back(stream, rung, Arc::into_raw(bell).cast_mut().cast(), |bell| {
        // SAFETY: given away just now, and not called.
        drop(unsafe { Arc::from_raw(bell.cast::<Bell>().cast_const()) });
    })
}

/// Has the driver call `function` when the stream has come so far. Its context must be current.
pub(super) fn call_back(
    stream: &Stream,
    function: unsafe extern "C" fn(*mut c_void),
    argument: *mut c_void,
    undo: impl FnOnce(*mut c_void),
) -> Result<(), Fault> {
    // SAFETY: a function for such an argument, which lives until it is called.
    let launched = unsafe { call!(cuLaunchHostFunc(stream.raw, Some(function), argument)) };
    launched.inspect_err(|_| undo(argument))
}
