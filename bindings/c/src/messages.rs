//! Messages between two ranks.

use crate::abi::*;
use crate::convert::{self, put, slice};
use crate::handles::deliver;
use crate::status::enter;
use runtime::error::Result;
use runtime::runtime::{self as core, Handle, TensorArg};
use runtime::types::{Rank, SetId};

/// A message between two ranks, before it is checked.
struct Message {
    peer: u32,
    tag: u32,
    tensor: *const carole_tensor,
    process_set: u32,
}

impl Message {
    unsafe fn send(&self) -> Result<Handle> {
        // SAFETY: the caller's promise.
        unsafe {
            let tensor = self.tensor()?;
            core::send(SetId(self.process_set), Rank(self.peer), self.tag, tensor, None, None)
        }
    }
    unsafe fn recv(&self) -> Result<Handle> {
        // SAFETY: the caller's promise.
        unsafe {
            let tensor = self.tensor()?;
            core::recv(SetId(self.process_set), Rank(self.peer), self.tag, tensor, None, None)
        }
    }
    unsafe fn tensor<'a>(&self) -> Result<TensorArg<'a>> {
        // SAFETY: the caller's promise.
        unsafe { convert::tensor(&slice(self.tensor, 1, "tensor")?[0]) }
    }
}

unsafe fn start_any(tag: u32, tensor: *const carole_tensor, process_set: u32) -> Result<Handle> {
    // SAFETY: the caller's promise.
    unsafe {
        let tensor = convert::tensor(&slice(tensor, 1, "tensor")?[0])?;
        core::recv_any(SetId(process_set), tag, tensor, None, None)
    }
}

/// Sends the input of a tensor to a rank, to be met by carole_recv there with the same process set, tag, type
/// and size. Returns when the bytes may be overwritten.
///
/// # Safety
/// `tensor` is valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_send(
    to: u32,
    tag: u32,
    tensor: *const carole_tensor,
    process_set: u32,
) -> i32 {
    // SAFETY: the caller's promise.
    enter(|| unsafe {
        let handle = Message { peer: to, tag, tensor, process_set }.send()?;
        deliver(core::wait(handle, None), std::ptr::null_mut())
    })
}

/// As carole_send, but returns at once with a handle.
///
/// # Safety
/// `tensor` is valid until there is an outcome; `handle` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_send_async(
    to: u32,
    tag: u32,
    tensor: *const carole_tensor,
    process_set: u32,
    handle: *mut u64,
) -> i32 {
    // SAFETY: the caller's promise.
    enter(|| unsafe { put(handle, Message { peer: to, tag, tensor, process_set }.send()?.0, "handle") })
}

/// Receives into the output of a tensor what a rank sends with this tag; the shape tells how much.
///
/// # Safety
/// `tensor` is valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_recv(
    from: u32,
    tag: u32,
    tensor: *const carole_tensor,
    process_set: u32,
) -> i32 {
    // SAFETY: the caller's promise.
    enter(|| unsafe {
        let handle = Message { peer: from, tag, tensor, process_set }.recv()?;
        deliver(core::wait(handle, None), std::ptr::null_mut())
    })
}

/// As carole_recv, but returns at once with a handle.
///
/// # Safety
/// `tensor` is valid until there is an outcome; `handle` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_recv_async(
    from: u32,
    tag: u32,
    tensor: *const carole_tensor,
    process_set: u32,
    handle: *mut u64,
) -> i32 {
    // SAFETY: the caller's promise.
    enter(|| unsafe { put(handle, Message { peer: from, tag, tensor, process_set }.recv()?.0, "handle") })
}

/// As carole_recv, from whichever rank of the process set sends with this tag; `source` (may be NULL) gets the rank.
///
/// # Safety
/// `tensor` is valid; `source` is NULL or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_recv_any(
    tag: u32,
    tensor: *const carole_tensor,
    process_set: u32,
    source: *mut i64,
) -> i32 {
    // SAFETY: the caller's promise.
    enter(|| unsafe {
        let outcome = core::wait(start_any(tag, tensor, process_set)?, None).result?;
        match source.is_null() {
            true => Ok(()),
            false => put(source, outcome.source.map_or(-1, |rank| i64::from(rank.0)), "source"),
        }
    })
}

/// As carole_recv_any, but returns at once with a handle; carole_output_source tells the rank. Receives of one tag, from
/// any rank or from one, take messages in the order in which they were started.
///
/// # Safety
/// `tensor` is valid until there is an outcome; `handle` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carole_recv_any_async(
    tag: u32,
    tensor: *const carole_tensor,
    process_set: u32,
    handle: *mut u64,
) -> i32 {
    // SAFETY: the caller's promise.
    enter(|| unsafe { put(handle, start_any(tag, tensor, process_set)?.0, "handle") })
}
