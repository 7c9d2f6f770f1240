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
