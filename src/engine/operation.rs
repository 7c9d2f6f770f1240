//! Operations submitted here and not yet returned: their memory, and what becomes of them.
#![forbid(unsafe_code)]

use crate::coordinator::{Agreed, CallTable};
use crate::error::Result;
use crate::layout::dealt_rows;
use crate::memory::{OwnedBytes, Region};
use crate::types::{Collective, DType, Rank, SetId, Signature};

/// One output.
#[derive(Debug)]
pub struct OutputTensor {
    /// Element type.
    pub dtype: DType,
    /// Dimensions of the output.
    pub shape: Vec<u64>,
    /// The bytes, where the engine allocated them; `None` where the caller's `output` was used.
    pub memory: Option<OwnedBytes>,
}

/// What an operation produced.
#[derive(Debug, Default)]
pub struct Outcome {
    /// The outputs, one per tensor. Empty for barrier and join, and on members that get no result.
    pub tensors: Vec<OutputTensor>,
    /// Alltoall: the rows received from each member, for each tensor one after another.
    pub received_splits: Vec<u64>,
    /// Join: the last rank to join.
    pub last_joined: Option<Rank>,
    /// AddSet: the new set.
    pub set: Option<SetId>,
}

/// Where one tensor of an operation lies.
#[derive(Clone, Copy, Debug)]
pub struct TensorMemory {
    /// The input; empty where this member has none.
    pub input: Region,
    /// The output that the caller supplies; `None` to have the engine allocate it.
    pub output: Option<Region>,
}

/// An operation between submit and completion.
#[derive(Debug, Default)]
pub struct Operation {
    /// The process set.
    pub set: SetId,
    /// The memory of its tensors.
    pub tensors: Vec<TensorMemory>,
    /// What it will produce.
    pub outcome: Outcome,
    /// Outputs that the algorithm needs and the caller does not get.
    pub stand_ins: Vec<OwnedBytes>,
    /// Tensors whose batches are not finished.
    pub remaining: usize,
    /// What to call it in messages.
    pub name: String,
}

/// The sizes of one tensor of an agreed operation, as this member sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Bytes of the input here.
    pub input: u64,
    /// Dimensions of the output here; `None` when this member gets none.
    pub output: Option<Vec<u64>>,
}

impl Sizes {
    /// Bytes of the output here.
    #[must_use]
    pub fn output_bytes(&self, dtype: DType) -> u64 {
        self.output.as_ref().map_or(0, |shape| shape.iter().product::<u64>() * dtype.size() as u64)
    }
}

/// The sizes of tensor `t` of an agreed operation for member `me` of `size`, whose root is member `root`.
#[must_use]
pub fn sizes(agreed: &Agreed, t: usize, me: u32, size: u32, root: u32) -> Sizes {
    let signature: &Signature = &agreed.signature;
    let tensor = &signature.tensors[t];
    let row_bytes = tensor.row_elements() * tensor.dtype.size() as u64;
    let all = tensor.elements() * tensor.dtype.size() as u64;
    let with_rows = |rows: u64| {
        let mut shape = tensor.shape.clone();
        shape[0] = rows;
        shape
    };
    match signature.collective {
        Collective::Allreduce => Sizes { input: all, output: Some(tensor.shape.clone()) },
        Collective::Broadcast => {
            Sizes { input: if me == root { all } else { 0 }, output: Some(tensor.shape.clone()) }
        }
        Collective::Reduce => Sizes { input: all, output: (me == root).then(|| tensor.shape.clone()) },
        Collective::Allgather | Collective::Gather => {
            let rows: u64 = (0..size).map(|m| gathered_rows(&agreed.call, m, t)).sum();
            let mine = gathered_rows(&agreed.call, me, t);
            let gets = signature.collective == Collective::Allgather || me == root;
            Sizes { input: mine * row_bytes, output: gets.then(|| with_rows(rows)) }
        }
        Collective::Reducescatter | Collective::Scatter => {
            let rows = dealt_rows(tensor.shape[0], u64::from(me), u64::from(size));
            let has_input = signature.collective == Collective::Reducescatter || me == root;
            Sizes { input: if has_input { all } else { 0 }, output: Some(with_rows(rows.end - rows.start)) }
        }
        Collective::Alltoall => {
            let sent: u64 = (0..size).map(|to| split(&agreed.call, me, to, t, size)).sum();
            let received: u64 = (0..size).map(|from| split(&agreed.call, from, me, t, size)).sum();
            Sizes { input: sent * row_bytes, output: Some(with_rows(received)) }
        }
        Collective::Barrier | Collective::Join | Collective::AddSet | Collective::RemoveSet => {
            Sizes { input: 0, output: None }
        }
    }
}

/// Rows that a member puts into tensor `t` of an allgather or gather.
#[must_use]
pub fn gathered_rows(call: &CallTable, member: u32, t: usize) -> u64 {
    call.of(crate::types::Member(member))[t]
}

/// Rows of tensor `t` that `from` sends to `to` in an alltoall.
#[must_use]
pub fn split(call: &CallTable, from: u32, to: u32, t: usize, size: u32) -> u64 {
    call.of(crate::types::Member(from))[t * size as usize + to as usize]
}

/// What the engine reports of an operation that has ended.
#[derive(Debug)]
pub struct Ended {
    /// Which.
    pub op: crate::coordinator::OpId,
    /// How.
    pub result: Result<Outcome>,
}
