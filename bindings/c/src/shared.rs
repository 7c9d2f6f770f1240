//! Tensors that live in shared memory from the start.

use crate::convert::put;
use crate::status::enter;
use runtime::error::{Error, Result};
use runtime::runtime::{SharedBytes, allocate};
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What was given out, by address.
static GIVEN: Mutex<BTreeMap<usize, SharedBytes>> = Mutex::new(BTreeMap::new());

fn given() -> MutexGuard<'static, BTreeMap<usize, SharedBytes>> {
    GIVEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Allocates `bytes` zeroed bytes for tensors, in memory that the ranks of this host share: an allreduce of at least
/// 64 KiB whose tensors and outputs lie there on all ranks is done where they lie, without a copy. Ordinary memory where
/// ranks share none. It can be used until carole_deallocate, after carole_shutdown too; a forked child shares it.
///
/// # Safety
/// `memory` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_allocate(bytes: u64, memory: *mut *mut c_void) -> i32 {
    enter(|| {
        if memory.is_null() {
            return Err(Error::usage("memory is NULL; what is allocated could not be found again"));
        }
        let bytes = usize::try_from(bytes).map_err(|_| Error::usage("so many bytes have no address"))?;
        // An empty tensor has an address of its own, too.
        let made = allocate(bytes.max(1))?;
        let start = made.as_ptr();
        given().insert(start.addr(), made);
        // SAFETY: the caller's promise.
        unsafe { put(memory, start.cast(), "memory") }
    })
}

/// Gives memory of carole_allocate back. NULL is fine.
///
/// # Safety
/// No operation or plan that uses it is under way, and nobody touches it any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_deallocate(memory: *mut c_void) -> i32 {
    enter(|| {
        if memory.is_null() {
            return Result::Ok(());
        }
        let known = given().remove(&memory.addr());
        known.map(drop).ok_or_else(|| {
            Error::usage(
                "this memory is not of carole_allocate, or was given back before; free() what malloc() gave",
            )
        })
    })
}
