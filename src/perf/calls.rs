//! Calls that wait for their end, so that the buffers they borrow are safe.

use crate::error::Result;
use crate::runtime::{self, Handle, Outcome, Persistent, Request, SharedBytes, TensorArg};
use crate::types::{DType, GLOBAL_SET, Rank};
use std::ops::{Deref, DerefMut};

/// Memory of a tensor.
pub(super) enum Memory {
    Own(Vec<u8>),
    Shared(SharedBytes),
}

impl Memory {
    pub(super) fn zeroed(len: usize, shared: bool) -> Result<Memory> {
        if shared { runtime::allocate(len).map(Memory::Shared) } else { Ok(Memory::Own(vec![0; len])) }
    }
}

impl Deref for Memory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Memory::Own(bytes) => bytes,
            // SAFETY: the bytes live as long as `self`; other ranks touch them only during an operation on them, which
            // borrows them for writing.
            Memory::Shared(bytes) => unsafe { std::slice::from_raw_parts(bytes.as_ptr(), bytes.len()) },
        }
    }
}

impl DerefMut for Memory {
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            Memory::Own(bytes) => bytes,
            // SAFETY: as above.
            Memory::Shared(bytes) => unsafe { std::slice::from_raw_parts_mut(bytes.as_ptr(), bytes.len()) },
        }
    }
}

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
    let tensors = [argument(dtype, &shape, buffers)];
    // SAFETY: the buffers are borrowed for the whole of this call, which waits for the outcome without a
    // limit; after any outcome the engine touches them no more.
    unsafe { runtime::run(&Request { tensors: &tensors, ..*request }, || None) }?.outcome()
}

/// An operation on one tensor of one dimension that is planned once, with its memory.
pub(super) struct Planned {
    plan: Persistent,
    input: Memory,
    output: Memory,
}

impl Planned {
    /// Plans it, in place if there is no `output`. `request.tensors` is filled in here.
    pub(super) fn new(
        request: &Request<'_>,
        dtype: DType,
        elements: u64,
        mut input: Memory,
        mut output: Memory,
        in_place: bool,
    ) -> Result<Planned> {
        let shape = [elements];
        let buffers = match in_place {
            true => Buffers::InPlace(&mut input),
            false => Buffers::Apart(&input, &mut output),
        };
        let tensors = [argument(dtype, &shape, buffers)];
        // SAFETY: the value keeps both, whose memory does not move, behind the plan, which is dropped first.
        let plan = unsafe { runtime::plan(&Request { tensors: &tensors, ..*request }, None) }?;
        Ok(Planned { plan, input, output })
    }

    /// Runs it to its end.
    pub(super) fn run(&mut self) -> Result<()> {
        // SAFETY: the memory is this value's, which is borrowed until all is over.
        unsafe { self.plan.run() }
    }

    /// What is given.
    pub(super) fn input(&mut self) -> &mut [u8] {
        &mut self.input
    }

    /// The place of the result, where the caller gives one; else what the runtime has allocated.
    pub(super) fn output(&mut self) -> &mut [u8] {
        &mut self.output
    }

    /// The result.
    pub(super) fn result(&self, in_place: bool) -> &[u8] {
        let made = self.plan.outputs().first().and_then(|output| output.memory.as_ref());
        made.map_or(if in_place { &*self.input } else { &*self.output }, |memory| memory.as_slice())
    }
}

fn argument<'a>(dtype: DType, shape: &'a [u64; 1], buffers: Buffers<'_>) -> TensorArg<'a> {
    let elements = shape[0];
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
    TensorArg { input, output, dtype, shape }
}

/// No rank leaves before all have entered.
pub(super) fn barrier() -> Result<()> {
    // SAFETY: a barrier has no buffers.
    unsafe { runtime::run(&Request::default(), || None) }?.outcome().map(drop)
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
