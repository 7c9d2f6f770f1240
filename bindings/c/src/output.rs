//! Outputs that the engine allocated, handed over.

use crate::status::enter;
use runtime::error::Error;
use runtime::runtime::Outcome;
use std::ffi::c_void;

/// What an operation produced. Reading it from several threads at once is safe; freeing it while another
/// thread reads is not.
pub struct carole_output {
    outcome: Outcome,
}

impl carole_output {
    /// Hands an outcome over to C.
    pub fn hand_over(outcome: Outcome) -> *mut carole_output {
        Box::into_raw(Box::new(carole_output { outcome }))
    }
}

/// The outcome behind a pointer of C's, or `None` for NULL.
unsafe fn view<'a>(output: *const carole_output) -> Option<&'a Outcome> {
    // SAFETY: the functions below ask for a pointer that Carole gave and that was not freed.
    unsafe { output.as_ref() }.map(|output| &output.outcome)
}

unsafe fn tensor<'a>(
    output: *const carole_output,
    index: usize,
) -> Option<&'a runtime::runtime::OutputTensor> {
    // SAFETY: as for `view`.
    unsafe { view(output) }?.tensors.get(index)
}

/// How many tensors there are; 0 for barrier and join, on members that get no result, and for NULL.
///
/// # Safety
/// `output` is NULL or was given by Carole and not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_output_count(output: *const carole_output) -> usize {
    // SAFETY: the caller's promise.
    unsafe { view(output) }.map_or(0, |outcome| outcome.tensors.len())
}

/// The element type of a tensor; UINT32_MAX where there is no such tensor.
///
/// # Safety
/// `output` is NULL or was given by Carole and not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_output_dtype(output: *const carole_output, index: usize) -> u32 {
    // SAFETY: the caller's promise.
    unsafe { tensor(output, index) }.map_or(u32::MAX, |tensor| u32::from(tensor.dtype.code()))
}

/// The number of dimensions of a tensor; 0 where there is no such tensor.
///
/// # Safety
/// `output` is NULL or was given by Carole and not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_output_dimensions(output: *const carole_output, index: usize) -> u32 {
    // SAFETY: the caller's promise.
    unsafe { tensor(output, index) }.map_or(0, |tensor| tensor.shape.len() as u32)
}

/// The dimensions of a tensor, valid until the output is freed; NULL where there is no such tensor or it is a
/// scalar.
///
/// # Safety
/// `output` is NULL or was given by Carole and not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_output_shape(output: *const carole_output, index: usize) -> *const u64 {
    // SAFETY: the caller's promise.
    match unsafe { tensor(output, index) } {
        Some(tensor) if !tensor.shape.is_empty() => tensor.shape.as_ptr(),
        _ => std::ptr::null(),
    }
}

/// The bytes of a tensor, aligned to 64, writable and valid until the output is freed; memory of the device where the
/// inputs were on one. NULL where there is no such tensor, and where the caller gave the place: then the bytes are there.
///
/// # Safety
/// `output` is NULL or was given by Carole and not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_output_data(output: *const carole_output, index: usize) -> *mut c_void {
    // SAFETY: the caller's promise.
    let Some(tensor) = (unsafe { tensor(output, index) }) else { return std::ptr::null_mut() };
    match (&tensor.memory, &tensor.on_device) {
        (Some(memory), _) => memory.as_ptr().cast(),
        (None, Some(memory)) => memory.address as usize as *mut c_void,
        (None, None) => std::ptr::null_mut(),
    }
}

/// How many bytes a tensor has; 0 where there is no such tensor.
///
/// # Safety
/// `output` is NULL or was given by Carole and not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_output_bytes(output: *const carole_output, index: usize) -> u64 {
    // SAFETY: the caller's promise.
    unsafe { tensor(output, index) }
        .map_or(0, |tensor| tensor.shape.iter().product::<u64>() * tensor.dtype.size() as u64)
}

/// Alltoall: the rows received from each member, for each tensor one after another; `count` (may be NULL)
/// gets their number. NULL where there are none. Valid until the output is freed.
///
/// # Safety
/// `output` is NULL or was given by Carole and not freed; `count` is NULL or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_output_received_splits(
    output: *const carole_output,
    count: *mut usize,
) -> *const u64 {
    // SAFETY: the caller's promise.
    let splits = unsafe { view(output) }.map_or(&[][..], |outcome| &outcome.received_splits);
    if !count.is_null() {
        // SAFETY: not null, and the caller's promise.
        unsafe { count.write(splits.len()) };
    }
    if splits.is_empty() { std::ptr::null() } else { splits.as_ptr() }
}

/// Receive: the rank that has sent the message; -1 where this was no receive.
///
/// # Safety
/// `output` is NULL or was given by Carole and not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_output_source(output: *const carole_output) -> i64 {
    // SAFETY: the caller's promise.
    unsafe { view(output) }.and_then(|outcome| outcome.source).map_or(-1, |rank| i64::from(rank.0))
}

/// Join: the last rank to join; -1 where this was no join.
///
/// # Safety
/// `output` is NULL or was given by Carole and not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_output_last_joined(output: *const carole_output) -> i64 {
    // SAFETY: the caller's promise.
    unsafe { view(output) }.and_then(|outcome| outcome.last_joined).map_or(-1, |rank| i64::from(rank.0))
}

/// Frees an output and its bytes. NULL is fine. Nothing of it may be used afterwards, on any thread.
///
/// # Safety
/// `output` is NULL or was given by Carole and not freed before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_output_free(output: *mut carole_output) {
    enter(|| {
        if !output.is_null() {
            // SAFETY: made by `hand_over` from a box, and the caller promises that this is the only free.
            drop(unsafe { Box::from_raw(output) });
        }
        Ok::<(), Error>(())
    });
}
