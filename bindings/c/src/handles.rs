//! Handles: looked at, waited for, given up.

use crate::abi::*;
use crate::convert::put;
use crate::output::carole_output;
use crate::status::enter;
use runtime::error::{Error, Result};
use runtime::runtime::{self as core, Completion, Handle, Outcome};
use std::time::Duration;

/// Gives an outcome to the caller where it is wanted.
///
/// # Safety
/// `output` is null or can be written.
pub unsafe fn deliver(completion: Completion, output: *mut *mut carole_output) -> Result<()> {
    let outcome: Outcome = completion.result?;
    if let Some(arrives) = &outcome.arrives {
        // The copies are under way already; a device that fails is an error.
        arrives.0.block(None).map_err(|cause| {
            Error::usage(format!("the results have not reached the CUDA device: {cause}"))
        })?;
    }
    if output.is_null() {
        return Ok(());
    }
    // SAFETY: not null, and the caller's promise.
    unsafe { output.write(carole_output::hand_over(outcome)) };
    Ok(())
}

/// Sets `done` to 1 when the operation has an outcome, which carole_wait then gives at once, else to 0. Never
/// blocks. The handle stays valid.
///
/// # Safety
/// `done` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_poll(handle: u64, done: *mut i32) -> i32 {
    // SAFETY: the caller's promise.
    enter(|| unsafe { put(done, i32::from(core::poll(Handle(handle))?), "done") })
}

/// Waits for an operation and uses its handle up; after CAROLE_ERROR_TIMEOUT the handle is as before.
/// `timeout_ms` may be CAROLE_FOREVER (any negative number). `output` may be NULL when it is not wanted.
/// Waiting for one handle on two threads at once is an error on one of them.
///
/// # Safety
/// `output` is NULL or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_wait(handle: u64, timeout_ms: i64, output: *mut *mut carole_output) -> i32 {
    let forever = timeout_ms <= CAROLE_FOREVER;
    let timeout = (!forever).then(|| Duration::from_millis(timeout_ms.unsigned_abs()));
    // SAFETY: the caller's promise.
    enter(|| unsafe { deliver(core::wait(Handle(handle), timeout), output) })
}

/// Gives a handle up: the operation finishes by itself and its output is dropped. Its buffers stay the
/// engine's until it has; a program that must know when waits instead.
#[unsafe(no_mangle)]
pub extern "C" fn carole_release(handle: u64) -> i32 {
    enter(|| {
        core::abandon(Handle(handle));
        // What operations kept alive is dropped here; C keeps nothing.
        drop(core::released());
        Ok(())
    })
}
