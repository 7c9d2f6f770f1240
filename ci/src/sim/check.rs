//! What must be true of every outcome: the oracle's bits, and the same verdict on all live ranks.
#![forbid(unsafe_code)]

use super::program::Planned;
use carole::device::host::oracle;
use carole::layout::dealt_rows;
use carole::types::{Collective, DType};

/// Element `i` of tensor `t` of a rank's input: small whole numbers, so that every order of summation is exact.
fn value(rank: u32, t: usize, i: u64) -> u64 {
    (u64::from(rank) * 7 + t as u64 * 3 + i * 5) % 13
}

/// A rank's input of tensor `t`: the bytes of `elements` values.
pub fn input(planned: &Planned, rank: u32, t: usize) -> Vec<u8> {
    let (row, rows) = &planned.tensors[t];
    encode(planned.dtype, (0..row * rows[rank as usize]).map(|i| value(rank, t, i)))
}

/// Small whole numbers as elements of a type.
pub fn encode(dtype: DType, values: impl Iterator<Item = u64>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for v in values {
        match dtype {
            DType::U8 => bytes.push(v as u8),
            DType::I32 => bytes.extend((v as i32).to_le_bytes()),
            DType::I64 => bytes.extend((v as i64).to_le_bytes()),
            DType::F32 => bytes.extend((v as f32).to_le_bytes()),
            DType::F64 => bytes.extend((v as f64).to_le_bytes()),
            DType::BF16 => bytes.extend(((v as f32).to_bits() >> 16).to_le_bytes()[..2].iter()),
            other => unreachable!("programs do not use {other}"),
        }
    }
    bytes
}

/// What rank `me` must get of tensor `t`; `None` where it gets nothing.
pub fn expected(planned: &Planned, me: u32, t: usize, size: u32) -> Option<Vec<u8>> {
    let inputs: Vec<Vec<u8>> = (0..size).map(|r| input(planned, r, t)).collect();
    let row_bytes = planned.tensors[t].0 as usize * planned.dtype.size();
    let reduced = || {
        let divisor = if planned.op == carole::types::ReduceOp::Average { size } else { 1 };
        let (pre, post) = (planned.scale.pre, planned.scale.post);
        oracle::reduce_all(planned.op, planned.dtype, &inputs, pre, post, divisor, oracle::Order::Tree)
    };
    let mine = |all: &[u8]| {
        let rows = planned.tensors[t].1[0];
        let range = dealt_rows(rows, u64::from(me), u64::from(size));
        all[range.start as usize * row_bytes..range.end as usize * row_bytes].to_vec()
    };
    let root = planned.root.0;
    match planned.collective {
        Collective::Allreduce => Some(reduced()),
        Collective::Reduce => (me == root).then(reduced),
        Collective::Reducescatter => Some(mine(&reduced())),
        Collective::Scatter => Some(mine(&inputs[root as usize])),
        Collective::Broadcast => Some(inputs[root as usize].clone()),
        Collective::Allgather => Some(inputs.concat()),
        Collective::Gather => (me == root).then(|| inputs.concat()),
        Collective::Alltoall => {
            let splits = &planned.splits[t];
            let mut all = Vec::new();
            for (from, bytes) in inputs.iter().enumerate() {
                let before: u64 = splits[from][..me as usize].iter().sum();
                let start = before as usize * row_bytes;
                all.extend_from_slice(&bytes[start..start + splits[from][me as usize] as usize * row_bytes]);
            }
            Some(all)
        }
        _ => None,
    }
}
