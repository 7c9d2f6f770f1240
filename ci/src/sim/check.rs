//! What each rank must get: the reference on the inputs of those that submitted.
#![forbid(unsafe_code)]

use super::program::{Planned, Random};
use carole::device::host::oracle;
use carole::layout::dealt_rows;
use carole::types::{Collective, DType, JoinAverage, ReduceOp};
use half::{bf16, f16};

/// A rank's input of tensor `t`. `member` is its position in the set.
pub fn input(planned: &Planned, members: &[u32], rank: u32, t: usize) -> Vec<u8> {
    let member = members.iter().position(|&m| m == rank).expect("only members have inputs");
    let (row, rows) = &planned.tensors[t];
    let elements = row * rows[member];
    if planned.rough {
        let mut random = Random(u64::from(rank) << 32 ^ (t as u64) << 16 ^ planned.salt);
        return encode(planned.dtype, (0..elements).map(|_| random.below(20_001) as f64 / 977.0 - 10.0));
    }
    let value = |i: u64| (u64::from(rank) * 7 + t as u64 * 3 + i * 5 + planned.salt) % 13;
    let exact = |i: u64| match (planned.op, planned.dtype) {
        // Powers of two: the product is exact in every order.
        (ReduceOp::Product, dtype) if !dtype.is_integer() => (1 + value(i) % 2) as f64,
        // Sums stay below what the type holds exactly.
        (_, dtype) if dtype.is_half() && members.len() > 9 => (value(i) % 4) as f64,
        _ => value(i) as f64,
    };
    let mut bytes = encode(planned.dtype, (0..elements).map(exact));
    if planned.dtype.is_complex() && planned.op == ReduceOp::Product {
        // Real factors: other products are soon rounded.
        let width = planned.dtype.size();
        bytes.chunks_exact_mut(width).for_each(|element| element[width / 2..].fill(0));
    }
    bytes
}

/// Numbers as elements of a type.
fn encode(dtype: DType, values: impl Iterator<Item = f64>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for v in values {
        match dtype {
            DType::Bool => bytes.push(u8::from(v as i64 % 2 != 0)),
            DType::U8 | DType::I8 => bytes.push(v as i64 as u8),
            DType::U16 | DType::I16 => bytes.extend((v as i64 as u16).to_le_bytes()),
            DType::U32 | DType::I32 => bytes.extend((v as i64 as u32).to_le_bytes()),
            DType::U64 | DType::I64 => bytes.extend((v as i64).to_le_bytes()),
            DType::F16 => bytes.extend(f16::from_f64(v).to_le_bytes()),
            DType::BF16 => bytes.extend(bf16::from_f64(v).to_le_bytes()),
            DType::F32 => bytes.extend((v as f32).to_le_bytes()),
            DType::F64 => bytes.extend(v.to_le_bytes()),
            DType::C64 => bytes.extend([v as f32, 1.0].map(f32::to_le_bytes).concat()),
            DType::C128 => bytes.extend([v, 1.0].map(f64::to_le_bytes).concat()),
        }
    }
    bytes
}

/// What an operation must give; what all ranks get alike is computed once.
pub struct Reference<'a> {
    planned: &'a Planned,
    members: &'a [u32],
    reduced: Vec<Option<Vec<u8>>>,
}

impl<'a> Reference<'a> {
    pub fn new(planned: &'a Planned, members: &'a [u32]) -> Reference<'a> {
        Reference { planned, members, reduced: vec![None; planned.tensors.len()] }
    }

    /// What `rank` must get of tensor `t`; `None` where it gets nothing.
    pub fn of(&mut self, rank: u32, t: usize) -> Option<Vec<u8>> {
        let (planned, members) = (self.planned, self.members);
        let mut reduced = || self.reduced[t].get_or_insert_with(|| reduced(planned, members, t)).clone();
        expected(planned, members, rank, t, &mut reduced)
    }
}

fn expected(
    planned: &Planned,
    members: &[u32],
    rank: u32,
    t: usize,
    reduced: &mut dyn FnMut() -> Vec<u8>,
) -> Option<Vec<u8>> {
    let size = members.len();
    let me = members.iter().position(|&m| m == rank).expect("only members get results");
    let present = |member: usize| planned.present[members[member] as usize];
    let row_bytes = planned.tensors[t].0 as usize * planned.dtype.size();
    let of = |member: usize| input(planned, members, members[member], t);
    let gathered = || (0..size).filter(|&m| present(m)).flat_map(of).collect::<Vec<u8>>();
    let root = members.iter().position(|&m| m == planned.root.0);
    let from_root = || of(root.expect("a root is a member"));
    let mine = |all: &[u8]| {
        let range = dealt_rows(planned.tensors[t].1[0], me as u64, size as u64);
        all[range.start as usize * row_bytes..range.end as usize * row_bytes].to_vec()
    };
    match planned.collective {
        Collective::Allreduce => Some(reduced()),
        Collective::Reduce => (rank == planned.root.0).then(reduced),
        Collective::Reducescatter => Some(mine(&reduced())),
        Collective::Scatter => Some(mine(&from_root())),
        Collective::Broadcast => Some(from_root()),
        Collective::Allgather => Some(gathered()),
        Collective::Gather => (rank == planned.root.0).then(gathered),
        Collective::Alltoall => {
            let splits = &planned.splits[t];
            let mut all = Vec::new();
            for from in (0..size).filter(|&m| present(m)) {
                let before: u64 = splits[from][..me].iter().sum();
                let (start, len) = (before as usize * row_bytes, splits[from][me] as usize * row_bytes);
                all.extend_from_slice(&of(from)[start..start + len]);
            }
            Some(all)
        }
        _ => None,
    }
}

fn reduced(planned: &Planned, members: &[u32], t: usize) -> Vec<u8> {
    let present = members.iter().filter(|&&m| planned.present[m as usize]).count();
    let divisor = match (planned.op, planned.join_average) {
        (ReduceOp::Average, JoinAverage::Size) => members.len(),
        (ReduceOp::Average, JoinAverage::Present) => present,
        _ => 1,
    };
    let elements = (planned.tensors[t].0 * planned.tensors[t].1[0]) as usize;
    let inputs: Vec<Vec<u8>> = members
        .iter()
        .map(|&rank| match planned.present[rank as usize] {
            true => input(planned, members, rank, t),
            false => oracle::identity(planned.op, planned.dtype).repeat(elements),
        })
        .collect();
    let (pre, post) = (planned.scale.pre, planned.scale.post);
    oracle::reduce_all(planned.op, planned.dtype, &inputs, pre, post, divisor as u32, oracle::Order::Tree)
}

/// Whether a result is the expected one. Products of complex numbers may differ in the signs of zeros, which
/// depend on the order of multiplication; all else is compared bit by bit.
pub fn same(planned: &Planned, got: &[u8], expected: &[u8]) -> bool {
    let signless = |bytes: &[u8]| -> Vec<u8> {
        let width = planned.dtype.size() / 2;
        let mut bytes = bytes.to_vec();
        for part in bytes.chunks_exact_mut(width) {
            if part[..width - 1].iter().all(|b| *b == 0) && part[width - 1] == 0x80 {
                part[width - 1] = 0;
            }
        }
        bytes
    };
    match planned.dtype.is_complex() && planned.op == ReduceOp::Product {
        true => signless(got) == signless(expected),
        false => got == expected,
    }
}
