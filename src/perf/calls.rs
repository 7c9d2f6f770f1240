//! Calls that wait for their end, so that the buffers they borrow are safe.

use crate::error::Result;
use crate::runtime::{self, Handle, Outcome, Request, TensorArg};
use crate::types::{DType, GLOBAL_SET, Rank};

/// Where a tensor's bytes are, and where its output goes.
pub(super) enum Buffers<'a> {
    /// From here to there. An empty output lets the engine allocate it.
    Apart(&'a [u8], &'a mut [u8]),
    /// The output takes the place of the input.
    InPlace(&'a mut [u8]),
}

/// Runs an operation on one tensor of one dimension to its end. `request.tensors` is filled in here.
pub(super) fn run(
    request: &Request<'_>,
    dtype: DType,
    elements: u64,
    buffers: Buffers<'_>,
) -> Result<Outcome> {
    let shape = [elements];
    let (input, output, output_len) = match buffers {
        Buffers::Apart(input, []) => {
            assert!(input.len() as u64 >= elements * dtype.size() as u64, "the input holds the tensor");
            (input.as_ptr(), std::ptr::null_mut(), 0)
        }
        Buffers::Apart(input, output) => {
            assert!(input.len() as u64 >= elements * dtype.size() as u64, "the input holds the tensor");
            (input.as_ptr(), output.as_mut_ptr(), output.len())
        }
        Buffers::InPlace(both) => {
            assert!(both.len() as u64 >= elements * dtype.size() as u64, "the input holds the tensor");
            (both.as_ptr(), both.as_mut_ptr(), both.len())
        }
    };
    // Reducescatter and scatter write less than the input holds, the others as much.
    assert!(output.is_null() || output_len as u64 >= elements * dtype.size() as u64, "the output has room");
    let tensors = [TensorArg { input, output, dtype, shape: &shape }];
    // SAFETY: the buffers are borrowed for the whole of this call, which waits for the outcome without a
    // limit; after any outcome the engine touches them no more.
    let handle = unsafe { runtime::submit_to_wait(&Request { tensors: &tensors, ..*request }, None) }?;
    runtime::wait(handle, None).result
}

/// No rank leaves before all have entered.
pub(super) fn barrier() -> Result<()> {
    // SAFETY: a barrier has no buffers.
    let handle = unsafe { runtime::submit_to_wait(&Request::default(), None) }?;
    runtime::wait(handle, None).result.map(drop)
}

/// Sends to one rank and receives from another, at the same time.
pub(super) fn sendrecv(
    to: Rank,
    from: Rank,
    dtype: DType,
    elements: u64,
    input: &[u8],
    output: &mut [u8],
) -> Result<()> {
    let bytes = elements * dtype.size() as u64;
    assert!(input.len() as u64 >= bytes && output.len() as u64 >= bytes, "the buffers hold the message");
    let shape = [elements];
    let incoming = TensorArg { input: std::ptr::null(), output: output.as_mut_ptr(), dtype, shape: &shape };
    let outgoing = TensorArg { input: input.as_ptr(), output: std::ptr::null_mut(), dtype, shape: &shape };
    // SAFETY: both buffers are borrowed until both outcomes, which are waited for below on every path.
    let received: Handle = unsafe { runtime::recv(GLOBAL_SET, from, 0, incoming, None, None) }?;
    // SAFETY: as above.
    let sent = unsafe { runtime::send(GLOBAL_SET, to, 0, outgoing, None, None) };
    let sent = sent.and_then(|handle| runtime::wait(handle, None).result);
    if sent.is_err() {
        // The peer that gets nothing may never send: the group is broken, and so is this receive.
        return runtime::wait(received, None).result.and(sent).map(drop);
    }
    runtime::wait(received, None).result.map(drop)
}
