//! Persistent collectives: planned once, started many times.

use crate::abi::*;
use crate::collectives::Call;
use crate::convert::{self, put};
use crate::status::enter;
use runtime::error::{Error, Result};
use runtime::runtime::{Persistent, PlannedOutput};
use std::ffi::c_void;
use std::time::Duration;

/// A collective that was planned once and can be started many times.
pub struct carole_persistent {
    plan: Persistent,
}

unsafe fn plan<'a>(persistent: *const carole_persistent) -> Result<&'a Persistent> {
    // SAFETY: the functions below ask for a pointer that Carole gave and that was not freed.
    let known = unsafe { persistent.as_ref() };
    known.map(|known| &known.plan).ok_or_else(|| Error::usage("the persistent collective is NULL"))
}

/// Plans a collective by its code (CAROLE_ALLREDUCE and so on), and waits until all members of its process set have
/// planned the same; matched by its name, or by order. The tensors stay where they are until carole_persistent_free:
/// every start reads the inputs anew and writes the outputs. They are in the host's memory; `splits` is for alltoall
/// only. Nothing is agreed on at a start, so within a host it is much faster than carole_submit.
///
/// # Safety
/// As carole_submit, for as long as the plan lives; `persistent` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_plan(
    collective: u32,
    tensors: *const carole_tensor,
    count: usize,
    splits: *const u64,
    split_count: usize,
    options: *const carole_options,
    persistent: *mut *mut carole_persistent,
) -> i32 {
    enter(|| {
        let collective = convert::collective(collective)?;
        if persistent.is_null() {
            return Err(Error::usage("persistent is NULL; a plan without a name cannot be started"));
        }
        let call = Call { collective, tensors, count, splits, split_count, options };
        // SAFETY: the caller's promise.
        let plan = unsafe { call.plan() }?;
        let made = Box::into_raw(Box::new(carole_persistent { plan }));
        // SAFETY: the caller's promise.
        unsafe { put(persistent, made, "persistent") }
    })
}

/// Starts a plan. Never blocks. All members start it equally often, and wait for it before they start it again.
///
/// # Safety
/// `persistent` was given by Carole and not freed; its inputs are not written and its outputs not touched until
/// carole_persistent_wait has returned other than CAROLE_ERROR_TIMEOUT.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_persistent_start(persistent: *mut carole_persistent) -> i32 {
    // SAFETY: the caller's promise.
    enter(|| unsafe { plan(persistent)?.start() })
}

/// Starts a plan and waits for it.
///
/// # Safety
/// As carole_persistent_start.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_persistent_run(persistent: *mut carole_persistent) -> i32 {
    // SAFETY: the caller's promise.
    enter(|| unsafe { plan(persistent)?.run() })
}

/// Sets `done` to 1 when the last start is over, else to 0. Never blocks.
///
/// # Safety
/// `persistent` was given by Carole and not freed; `done` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_persistent_poll(persistent: *mut carole_persistent, done: *mut i32) -> i32 {
    // SAFETY: the caller's promise.
    enter(|| unsafe { put(done, i32::from(plan(persistent)?.poll()?), "done") })
}

/// Waits for the last start; without one there is nothing to wait for. `timeout_ms` may be CAROLE_FOREVER (any negative
/// number); after CAROLE_ERROR_TIMEOUT it goes on and can be waited for again.
///
/// # Safety
/// `persistent` was given by Carole and not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_persistent_wait(persistent: *mut carole_persistent, timeout_ms: i64) -> i32 {
    let forever = timeout_ms <= CAROLE_FOREVER;
    let timeout = (!forever).then(|| Duration::from_millis(timeout_ms.unsigned_abs()));
    // SAFETY: the caller's promise.
    enter(|| unsafe { plan(persistent)?.wait(timeout) })
}

unsafe fn output<'a>(persistent: *const carole_persistent, index: usize) -> Option<&'a PlannedOutput> {
    // SAFETY: the caller's promise.
    unsafe { plan(persistent) }.ok()?.outputs().get(index)
}

/// The bytes of an output that Carole has allocated, aligned to 64, the same at every start and valid until the plan is
/// freed; NULL where there is no such output, and where the caller gave the place: then the bytes are there.
///
/// # Safety
/// `persistent` is NULL or was given by Carole and not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_persistent_data(
    persistent: *const carole_persistent,
    index: usize,
) -> *mut c_void {
    // SAFETY: the caller's promise.
    let output = unsafe { output(persistent, index) };
    let memory = output.and_then(|output| output.memory.as_ref());
    memory.map_or(std::ptr::null_mut(), |memory| memory.as_ptr().cast())
}

/// How many bytes an output has; 0 where there is no such output.
///
/// # Safety
/// `persistent` is NULL or was given by Carole and not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_persistent_bytes(persistent: *const carole_persistent, index: usize) -> u64 {
    // SAFETY: the caller's promise.
    unsafe { output(persistent, index) }
        .map_or(0, |output| output.shape.iter().product::<u64>() * output.dtype.size() as u64)
}

/// Gives a plan up; its tensors are the caller's again. What is under way is waited for. NULL is fine. A rank has to do
/// so with all its plans before carole_join.
///
/// # Safety
/// `persistent` is NULL or was given by Carole and not freed before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_persistent_free(persistent: *mut carole_persistent) -> i32 {
    enter(|| {
        if !persistent.is_null() {
            // SAFETY: made by `carole_plan` from a box, and the caller promises that this is the only free.
            drop(unsafe { Box::from_raw(persistent) });
        }
        Ok(())
    })
}
