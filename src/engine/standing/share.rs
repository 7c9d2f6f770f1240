//! What a member puts into each start of an operation that stands, and what it takes out: functions of what is agreed.
#![forbid(unsafe_code)]

use super::Repeat;
use crate::coordinator::Agreed;
use crate::device::{Finish, Reduction};
use crate::engine::batch::divisor;
use crate::engine::operation::{self, gathered_rows, split};
use crate::layout::dealt_rows;
use crate::memory::Region;
use crate::transport::board::{Niche, Shown};
use crate::types::{Collective, Member};

/// The share of one member.
#[derive(Debug)]
pub(super) struct Share {
    /// Row counts or splits, as this member submits them.
    pub call: Vec<u64>,
    /// What it shows the others: the first bytes of its input.
    pub input_bytes: usize,
    pub output_bytes: usize,
    /// Dimensions of the output; none where this member gets none.
    pub shape: Option<Vec<u64>>,
    /// Alltoall: the rows received from each member.
    pub received_splits: Vec<u64>,
    takes: Takes,
}

/// How an output is made of what all members have shown.
#[derive(Debug)]
enum Takes {
    Nothing,
    /// As many bytes as the output has, from this one on.
    Reduced(usize, Reduction, Finish),
    /// End to end.
    Pieces(Vec<Shown>),
}

/// The most that a member of `size` puts into an operation of one tensor, whose root is member `root`.
pub(super) fn slot_bytes(agreed: &Agreed, size: u32, root: u32) -> u64 {
    (0..size).map(|member| operation::sizes(agreed, 0, member, size, root).input).max().unwrap_or(0)
}

impl Share {
    /// The share of member `me` of `size`.
    pub fn new(agreed: &Agreed, me: u32, size: u32, root: u32) -> Share {
        let signature = &agreed.signature;
        let tensor = &signature.tensors[0];
        let sizes = operation::sizes(agreed, 0, me, size, root);
        let shape = sizes.shape.map(|shape| {
            let mut dimensions = Vec::new();
            shape.write(&tensor.shape, &mut dimensions);
            dimensions
        });
        let takes = match shape {
            Some(_) => takes(agreed, me, size, root, sizes.output as usize),
            None => Takes::Nothing,
        };
        let free = signature.collective.has_free_rows();
        Share {
            call: if free { agreed.call.of(Member(me)).to_vec() } else { Vec::new() },
            input_bytes: sizes.input as usize,
            output_bytes: sizes.output as usize,
            shape,
            received_splits: match signature.collective {
                Collective::Alltoall => {
                    (0..size).map(|from| split(&agreed.call, from, me, 0, size)).collect()
                }
                _ => Vec::new(),
            },
            takes,
        }
    }

    /// Whether a call, of the agreed type, has the agreed shape `known`, and the rows and splits of this member.
    pub fn fits(&self, known: &[u64], shape: &[u64], call: &Repeat<'_>) -> bool {
        // A scalar counts as one row where rows count.
        let shape = if shape.is_empty() && call.collective.has_rows() { &[1] } else { shape };
        if !call.collective.has_free_rows() {
            return shape == known;
        }
        let sends = |rows: u64| match call.collective {
            Collective::Alltoall if call.splits.is_empty() => {
                let members = self.call.len() as u64;
                self.call.iter().all(|split| split.checked_mul(members) == Some(rows))
            }
            Collective::Alltoall => call.splits == self.call && self.call.iter().sum::<u64>() <= rows,
            _ => self.call == [rows],
        };
        shape.len() == known.len() && shape[1..] == known[1..] && sends(shape[0])
    }

    /// Takes this member's part of a start that is complete. `pre` is what every input is multiplied by.
    pub fn take(&self, niche: &Niche, number: u64, pre: f64, (input, output): (Region, Region)) {
        match &self.takes {
            Takes::Nothing => {}
            Takes::Reduced(from, reduction, finish) => {
                niche.reduce(number, *from, *reduction, pre, *finish, (input, output));
            }
            Takes::Pieces(pieces) => niche.copy(number, pieces, output),
        }
    }
}

fn takes(agreed: &Agreed, me: u32, size: u32, root: u32, output_bytes: usize) -> Takes {
    let signature = &agreed.signature;
    let tensor = &signature.tensors[0];
    let row_bytes = tensor.row_elements() * tensor.dtype.size() as u64;
    let piece = |member: u32, from: u64, rows: u64| Shown {
        member: member as usize,
        from: (from * row_bytes) as usize,
        len: (rows * row_bytes) as usize,
    };
    let reduced = |from: u64| {
        let finish = Finish { divisor: divisor(agreed, size), post: signature.scale.post };
        let reduction = Reduction { dtype: tensor.dtype, op: signature.op };
        Takes::Reduced((from * row_bytes) as usize, reduction, finish)
    };
    match signature.collective {
        Collective::Broadcast => {
            Takes::Pieces(vec![Shown { member: root as usize, from: 0, len: output_bytes }])
        }
        Collective::Allgather => {
            Takes::Pieces((0..size).map(|m| piece(m, 0, gathered_rows(&agreed.call, m, 0))).collect())
        }
        Collective::Alltoall => {
            let before = |from| (0..me).map(|to| split(&agreed.call, from, to, 0, size)).sum();
            let of = |from| piece(from, before(from), split(&agreed.call, from, me, 0, size));
            Takes::Pieces((0..size).map(of).collect())
        }
        Collective::Reducescatter => {
            reduced(dealt_rows(tensor.shape[0], u64::from(me), u64::from(size)).start)
        }
        _ => reduced(0),
    }
}
