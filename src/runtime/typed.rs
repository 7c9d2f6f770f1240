//! The safe Rust face: collectives on slices and vectors of numbers.
//!
//! Calls that wait borrow their buffers: nothing of Carole touches a buffer after the call has returned, errors
//! included. Calls that do not wait take their buffers over, and [`Pending::wait`] gives them back.
//!
//! Run alone, a process is a job of one rank, so this works as it stands; under `carolerun -np 4` the sum
//! is over four ranks:
//!
//! ```
//! use carole::runtime::{self, Options, typed};
//! use carole::types::ReduceOp;
//!
//! runtime::init(&Options::default())?;
//! let mut gradient = vec![1.0f32, 2.0, 3.0];
//! typed::allreduce("gradient", &mut gradient, ReduceOp::Average)?;
//! assert_eq!(gradient, [1.0, 2.0, 3.0]);
//!
//! let pending = typed::allreduce_async("next", vec![1i64; 4], ReduceOp::Sum)?;
//! let sum = pending.wait()?;
//! # assert_eq!(sum, [1; 4]);
//! runtime::shutdown()?;
//! # Ok::<(), carole::error::Error>(())
//! ```

use super::{
    Completion, Handle, Outcome, OwnedBytes, Request, TensorArg, abandon, poll, recv as recv_raw,
    recv_any as recv_any_raw, run, send as send_raw, submit, wait,
};
use crate::error::{Error, Result};
use crate::types::{Collective, DType, GLOBAL_SET, Rank, ReduceOp, SetId};
use bytemuck::Pod;
use std::any::Any;

/// A number that tensors are made of.
pub trait Element: Pod + Send {
    /// Its type on the wire.
    const DTYPE: DType;
}

macro_rules! elements {
    ($($kind:ty => $dtype:ident),* $(,)?) => {
        $(impl Element for $kind {
            const DTYPE: DType = DType::$dtype;
        })*
    };
}

elements! {
    u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, u64 => U64, i64 => I64,
    f32 => F32, f64 => F64,
}

/// IEEE half precision, as its bits.
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct F16(pub u16);

/// bfloat16, as its bits.
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct Bf16(pub u16);

elements! { F16 => F16, Bf16 => BF16 }

/// Which ranks take part: all, or a process set.
pub const EVERYBODY: SetId = GLOBAL_SET;

/// A tensor whose output the engine allocates.
fn tensor<'a, T: Element>(input: &[T], shape: &'a [u64; 1]) -> TensorArg<'a> {
    TensorArg { input: input.as_ptr().cast(), output: std::ptr::null_mut(), dtype: T::DTYPE, shape }
}

/// A tensor whose output is its input.
fn in_place<'a, T: Element>(values: &mut [T], shape: &'a [u64; 1]) -> TensorArg<'a> {
    let address: *mut u8 = values.as_mut_ptr().cast();
    TensorArg { input: address, output: address, dtype: T::DTYPE, shape }
}

/// Submits, waits, and returns the outcome. Borrowed buffers are free again when it returns.
fn call(request: &Request<'_>) -> Result<Outcome> {
    // SAFETY: the buffers are borrowed by the caller of this function until it returns, and it returns only
    // with an outcome: the wait has no limit.
    unsafe { run(request, || None) }?.outcome()
}

/// Replaces `values` by the reduction over all ranks, which give equally many.
pub fn allreduce<T: Element>(name: &str, values: &mut [T], op: ReduceOp) -> Result<()> {
    allreduce_in(EVERYBODY, name, values, op)
}

/// As [`allreduce`], over the ranks of a process set.
pub fn allreduce_in<T: Element>(set: SetId, name: &str, values: &mut [T], op: ReduceOp) -> Result<()> {
    let shape = [values.len() as u64];
    let tensors = [in_place(values, &shape)];
    let request = Request {
        name: Some(name),
        set,
        collective: Collective::Allreduce,
        op,
        tensors: &tensors,
        ..Request::default()
    };
    call(&request).map(drop)
}

/// All ranks' values, in the order of ranks. They may give differently many.
pub fn allgather<T: Element>(name: &str, values: &[T]) -> Result<Vec<T>> {
    let shape = [values.len() as u64];
    let tensors = [tensor(values, &shape)];
    let request = Request {
        name: Some(name),
        collective: Collective::Allgather,
        tensors: &tensors,
        ..Request::default()
    };
    call(&request).map(first)
}

/// Replaces `values` by the root's.
pub fn broadcast<T: Element>(name: &str, values: &mut [T], root: Rank) -> Result<()> {
    let shape = [values.len() as u64];
    let tensors = [in_place(values, &shape)];
    let request = Request {
        name: Some(name),
        collective: Collective::Broadcast,
        root,
        tensors: &tensors,
        ..Request::default()
    };
    call(&request).map(drop)
}

/// This rank's part of the reduction; the lower ranks get one element more where they do not come out even.
pub fn reducescatter<T: Element>(name: &str, values: &[T], op: ReduceOp) -> Result<Vec<T>> {
    let shape = [values.len() as u64];
    let tensors = [tensor(values, &shape)];
    let request = Request {
        name: Some(name),
        collective: Collective::Reducescatter,
        op,
        tensors: &tensors,
        ..Request::default()
    };
    call(&request).map(first)
}

/// Sends `splits[j]` of the values to rank `j`, in order; returns what came and how many from each rank.
/// Empty splits deal the values out evenly.
pub fn alltoall<T: Element>(name: &str, values: &[T], splits: &[u64]) -> Result<(Vec<T>, Vec<u64>)> {
    let shape = [values.len() as u64];
    let tensors = [tensor(values, &shape)];
    let request = Request {
        name: Some(name),
        collective: Collective::Alltoall,
        tensors: &tensors,
        splits,
        ..Request::default()
    };
    let mut outcome = call(&request)?;
    let received = std::mem::take(&mut outcome.received_splits);
    Ok((first(outcome), received))
}

/// The reduction, on the root; `None` elsewhere.
pub fn reduce<T: Element>(name: &str, values: &[T], op: ReduceOp, root: Rank) -> Result<Option<Vec<T>>> {
    on_root(Collective::Reduce, name, values, op, root)
}

/// All ranks' values, in the order of ranks, on the root; `None` elsewhere.
pub fn gather<T: Element>(name: &str, values: &[T], root: Rank) -> Result<Option<Vec<T>>> {
    on_root(Collective::Gather, name, values, ReduceOp::Sum, root)
}

fn on_root<T: Element>(
    collective: Collective,
    name: &str,
    values: &[T],
    op: ReduceOp,
    root: Rank,
) -> Result<Option<Vec<T>>> {
    let shape = [values.len() as u64];
    let tensors = [tensor(values, &shape)];
    let request = Request { name: Some(name), collective, op, root, tensors: &tensors, ..Request::default() };
    let outcome = call(&request)?;
    let has_result = outcome.tensors.iter().any(|t| t.memory.is_some());
    Ok(has_result.then(|| first(outcome)))
}

/// This rank's part of the root's values. Every rank gives equally many; only the root's count.
pub fn scatter<T: Element>(name: &str, values: &[T], root: Rank) -> Result<Vec<T>> {
    let shape = [values.len() as u64];
    let tensors = [tensor(values, &shape)];
    let request = Request {
        name: Some(name),
        collective: Collective::Scatter,
        root,
        tensors: &tensors,
        ..Request::default()
    };
    call(&request).map(first)
}

/// Returns when all ranks have called it.
pub fn barrier(name: &str) -> Result<()> {
    call(&Request { name: Some(name), ..Request::default() }).map(drop)
}

/// This rank has no more data: it takes part in what the others still run, with the identity, until all have
/// joined. Returns the last rank to join.
pub fn join() -> Result<Rank> {
    let outcome = call(&Request { collective: Collective::Join, ..Request::default() })?;
    Ok(outcome.last_joined.expect("a join ends with the last rank to join"))
}

/// Sends values to a rank, which receives them with the same tag. Returns when they may be overwritten.
pub fn send<T: Element>(values: &[T], to: Rank, tag: u32) -> Result<()> {
    let shape = [values.len() as u64];
    // SAFETY: as in `call`.
    let handle = unsafe { send_raw(EVERYBODY, to, tag, tensor(values, &shape), None, None) }?;
    wait(handle, None).result.map(drop)
}

/// Receives what a rank sends with this tag; it must be as many values as `values` has.
pub fn recv<T: Element>(values: &mut [T], from: Rank, tag: u32) -> Result<()> {
    let shape = [values.len() as u64];
    let argument = in_place(values, &shape);
    // SAFETY: as in `call`.
    let handle = unsafe { recv_raw(EVERYBODY, from, tag, argument, None, None) }?;
    wait(handle, None).result.map(drop)
}

/// Receives what any rank sends with this tag, as many values as `values` has. Returns the rank.
pub fn recv_any<T: Element>(values: &mut [T], tag: u32) -> Result<Rank> {
    let shape = [values.len() as u64];
    let argument = in_place(values, &shape);
    // SAFETY: as in `call`.
    let handle = unsafe { recv_any_raw(EVERYBODY, tag, argument, None, None) }?;
    let outcome = wait(handle, None).result?;
    Ok(outcome.source.expect("a receive ends with its source"))
}

/// An operation in flight that owns its buffer. Dropped, it finishes by itself.
#[derive(Debug)]
#[must_use = "the values come back from wait()"]
pub struct Pending<T> {
    handle: Option<Handle>,
    values: std::marker::PhantomData<Vec<T>>,
}

/// Starts an allreduce in place.
pub fn allreduce_async<T: Element>(name: &str, values: Vec<T>, op: ReduceOp) -> Result<Pending<T>> {
    in_place_async(name, values, Collective::Allreduce, op, Rank(0))
}

/// Starts a broadcast in place.
pub fn broadcast_async<T: Element>(name: &str, values: Vec<T>, root: Rank) -> Result<Pending<T>> {
    in_place_async(name, values, Collective::Broadcast, ReduceOp::Sum, root)
}

fn in_place_async<T: Element>(
    name: &str,
    mut values: Vec<T>,
    collective: Collective,
    op: ReduceOp,
    root: Rank,
) -> Result<Pending<T>> {
    let shape = [values.len() as u64];
    let tensors = [in_place(&mut values, &shape)];
    let request = Request { name: Some(name), collective, op, root, tensors: &tensors, ..Request::default() };
    let keep: Box<dyn Any + Send> = Box::new(values);
    // SAFETY: the vector's memory does not move with the vector; the operation keeps it until it has ended,
    // and nobody else can reach it before.
    let handle = unsafe { submit(&request, Some(keep)) }?;
    Ok(Pending { handle: Some(handle), values: std::marker::PhantomData })
}

impl<T: Element> Pending<T> {
    /// Whether it has ended.
    pub fn is_done(&self) -> Result<bool> {
        poll(self.handle.expect("there until the wait"))
    }
    /// Waits and gives the values back.
    pub fn wait(mut self) -> Result<Vec<T>> {
        let handle = self.handle.take().expect("there until the wait");
        let Completion { result, keep } = wait(handle, None);
        result?;
        let values = keep.and_then(|keep| keep.downcast::<Vec<T>>().ok());
        values
            .map(|v| *v)
            .ok_or_else(|| Error::usage("another thread has taken the result of this operation"))
    }
}

impl<T> Drop for Pending<T> {
    fn drop(&mut self) {
        if let Some(handle) = self.handle.take() {
            abandon(handle);
        }
    }
}

/// The first output as a vector.
fn first<T: Element>(outcome: Outcome) -> Vec<T> {
    let memory: Option<OwnedBytes> = outcome.tensors.into_iter().next().and_then(|t| t.memory);
    // The engine's memory is aligned to 64 bytes, more than any element needs.
    memory.map_or(Vec::new(), |m| bytemuck::cast_slice(m.as_slice()).to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::{Options, init, shutdown};

    /// One test, for init is of the process.
    #[test]
    fn a_job_of_one_rank() {
        init(&Options::default()).unwrap();
        let mut values = [1.5f32, -2.0];
        allreduce("a", &mut values, ReduceOp::Average).unwrap();
        assert_eq!(values, [1.5, -2.0]);
        assert_eq!(allgather("b", &[1u8, 2]).unwrap(), [1, 2]);
        assert_eq!(alltoall("c", &[7i64, 8], &[2]).unwrap(), (vec![7, 8], vec![2]));
        assert_eq!(reducescatter("d", &[1i32, 2, 3], ReduceOp::Max).unwrap(), [1, 2, 3]);
        assert_eq!(reduce("e", &[4u16], ReduceOp::Product, Rank(0)).unwrap(), Some(vec![4]));
        assert_eq!(gather("f", &[Bf16(0x3F80)], Rank(0)).unwrap(), Some(vec![Bf16(0x3F80)]));
        assert_eq!(scatter("g", &[1.0f64], Rank(0)).unwrap(), [1.0]);
        barrier("h").unwrap();
        assert_eq!(join().unwrap(), Rank(0));
        let pending = allreduce_async("i", vec![3i8; 5], ReduceOp::Sum).unwrap();
        assert_eq!(pending.wait().unwrap(), [3; 5]);
        drop(broadcast_async("j", vec![1u8], Rank(0)).unwrap());
        let wrong = broadcast("k", &mut [0u8], Rank(9)).unwrap_err();
        assert!(matches!(&wrong, Error::Usage(words) if words.contains("rank 9")), "{wrong}");
        assert!(matches!(send(&[1u8], Rank(0), 1), Err(Error::Usage(_))), "nobody sends to itself");
        shutdown().unwrap();
        let after = barrier("l").unwrap_err();
        assert!(matches!(&after, Error::Usage(words) if words.contains("init()")), "{after}");
    }
}
