//! Operations submitted here and not yet returned: their memory, and what becomes of them.
#![forbid(unsafe_code)]

use super::channel::Channel;
use super::passage::OnDevice;
use crate::coordinator::{Agreed, CallTable};
use crate::device::accelerator::{DeviceBuffer, Mark};
use crate::error::Result;
use crate::layout::dealt_rows;
use crate::memory::{OwnedBytes, Region};
use crate::transport::board::Block;
use crate::types::{Collective, DType, Rank, SetId, Signature};
use std::sync::Arc;

/// One output.
#[derive(Debug)]
pub struct OutputTensor {
    /// Element type.
    pub dtype: DType,
    /// Dimensions of the output.
    pub shape: Vec<u64>,
    /// The bytes, where the engine allocated them; `None` where the caller's `output` was used.
    pub memory: Option<OwnedBytes>,
    /// The bytes on the inputs' device, where they were allocated there.
    pub on_device: Option<DeviceBuffer>,
    /// Whether the devices have exchanged it among themselves, so that nothing is left to be sent back.
    pub direct: bool,
}

/// What an operation produced.
#[derive(Debug, Default)]
pub struct Outcome {
    /// The outputs, one per tensor. Empty for barrier and join, and on members that get no result.
    pub tensors: Vec<OutputTensor>,
    /// Alltoall: the rows received from each member, for each tensor one after another.
    pub received_splits: Vec<u64>,
    /// A message that was received: the rank that has sent it.
    pub source: Option<Rank>,
    /// Join: the last rank to join.
    pub last_joined: Option<Rank>,
    /// AddSet: the new set. RemoveSet: the set that is no more; none if there was none. Join: the set that was
    /// joined.
    pub set: Option<SetId>,
    /// When the outputs will be where they belong, if they are still on their way to a device.
    pub arrives: Option<Mark>,
    /// A plan: its number.
    pub plan: Option<u64>,
    /// A plan: what its starts go through, if all members have memory for it.
    pub channel: Option<Arc<Channel>>,
    /// Join of the global set: all sets there are, for who has not seen them come.
    pub sets: Vec<(SetId, Arc<[Rank]>)>,
    /// Join of the global set: the numbers given to sets so far are below this one.
    pub sets_made: u32,
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
    /// Where its tensors are on a device, if they are.
    pub on_device: Option<Arc<OnDevice>>,
    /// Outputs that the algorithm needs and the caller does not get.
    pub stand_ins: Vec<OwnedBytes>,
    /// Whether all members have agreed to run it.
    pub agreed: bool,
    /// Its place in the log of its set, where completion is uniform.
    pub place: Option<u64>,
    /// Tensors whose batches are not finished.
    pub remaining: usize,
    /// A plan: the memory that this member has taken for it.
    pub block: Option<Block>,
    /// A receive: whether it has not met its sender yet, and waits among [`super::any_source::Unmatched`].
    pub unmatched: bool,
    /// What to call it in messages.
    pub name: String,
}

/// The sizes of one tensor of an agreed operation, as this member sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Bytes of the input here.
    pub input: u64,
    /// Bytes of the output here.
    pub output: u64,
    /// The shape of the output here; `None` when this member gets none.
    pub shape: Option<OutputShape>,
}

/// The shape of an output, relative to the tensor's signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputShape {
    /// The same.
    Same,
    /// Another first dimension.
    Rows(u64),
}

impl Default for OutputTensor {
    fn default() -> OutputTensor {
        OutputTensor { dtype: DType::U8, shape: Vec::new(), memory: None, on_device: None, direct: false }
    }
}

impl Outcome {
    /// Forgets everything but the memory of its lists.
    pub(super) fn reset(&mut self) {
        self.tensors.iter_mut().for_each(|tensor| (tensor.memory, tensor.on_device) = (None, None));
        self.arrives = None;
        (self.plan, self.channel) = (None, None);
        self.received_splits.clear();
        (self.source, self.last_joined, self.set) = (None, None, None);
        self.sets.clear();
        self.sets_made = 0;
    }
}

impl OutputShape {
    /// Writes the dimensions into `shape`, whose memory is used again.
    pub fn write(self, signature: &[u64], shape: &mut Vec<u64>) {
        shape.clear();
        shape.extend_from_slice(signature);
        if let (OutputShape::Rows(rows), Some(first)) = (self, shape.first_mut()) {
            *first = rows;
        }
    }
}

/// The sizes of tensor `t` of an agreed operation for member `me` of `size`, whose root is member `root`.
#[must_use]
pub fn sizes(agreed: &Agreed, t: usize, me: u32, size: u32, root: u32) -> Sizes {
    let signature: &Signature = &agreed.signature;
    let tensor = &signature.tensors[t];
    let row_bytes = tensor.row_elements() * tensor.dtype.size() as u64;
    let all = tensor.elements() * tensor.dtype.size() as u64;
    let with = |input: u64, shape: Option<OutputShape>| {
        let output = match shape {
            None => 0,
            Some(OutputShape::Same) => all,
            Some(OutputShape::Rows(rows)) => rows * row_bytes,
        };
        Sizes { input, output, shape }
    };
    let same = Some(OutputShape::Same);
    match signature.collective {
        Collective::Allreduce => with(all, same),
        Collective::Broadcast => with(if me == root { all } else { 0 }, same),
        Collective::Reduce => with(all, same.filter(|_| me == root)),
        Collective::Allgather | Collective::Gather => {
            let rows: u64 = (0..size).map(|m| gathered_rows(&agreed.call, m, t)).sum();
            let mine = gathered_rows(&agreed.call, me, t);
            let gets = signature.collective == Collective::Allgather || me == root;
            with(mine * row_bytes, gets.then_some(OutputShape::Rows(rows)))
        }
        Collective::Reducescatter | Collective::Scatter => {
            let rows = dealt_rows(tensor.shape[0], u64::from(me), u64::from(size));
            let has_input = signature.collective == Collective::Reducescatter || me == root;
            with(if has_input { all } else { 0 }, Some(OutputShape::Rows(rows.end - rows.start)))
        }
        Collective::Alltoall => {
            let sent: u64 = (0..size).map(|to| split(&agreed.call, me, to, t, size)).sum();
            let received: u64 = (0..size).map(|from| split(&agreed.call, from, me, t, size)).sum();
            with(sent * row_bytes, Some(OutputShape::Rows(received)))
        }
        Collective::Barrier | Collective::Join | Collective::AddSet | Collective::RemoveSet => with(0, None),
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
