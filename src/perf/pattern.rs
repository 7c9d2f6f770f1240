//! Inputs whose results are known beforehand and exact in every element type, in whatever order they are
//! combined: whole numbers so small that neither a sum nor a product leaves the 8 bits of bfloat16's fraction.
//!
//! A pattern repeats every [`PERIOD`] elements, so that an expectation is one small table however large the
//! tensor; the period is a prime, so that a misplaced chunk does not fall on the same values again.
#![forbid(unsafe_code)]

use crate::types::{DType, ReduceOp};

/// Elements after which a pattern repeats.
pub(super) const PERIOD: u64 = 251;

/// How the ranks' values are made: for a reduction with this operation, or to be moved as they are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pattern {
    /// The reduction; `None` where values are only moved.
    pub op: Option<ReduceOp>,
    /// Element type.
    pub dtype: DType,
    /// Ranks that take part.
    pub size: u32,
}

impl Pattern {
    /// The value that `rank` gives at index `i`.
    fn value(self, rank: u32, i: u64) -> i64 {
        let (i, rank64) = ((i % PERIOD) as i64, i64::from(rank));
        if self.dtype == DType::Bool {
            // Mostly true under "and", mostly false under "or", so that both results occur.
            let and = matches!(self.op, Some(ReduceOp::Product | ReduceOp::Min | ReduceOp::BitAnd));
            let hit = (i * 5 + rank64 * 3) % (2 * i64::from(self.size) + 1) == 0;
            return i64::from(hit != and);
        }
        match self.op {
            // At most 100 in all: within i8, and exact in bfloat16. Ranks beyond the hundredth give 0.
            Some(ReduceOp::Sum) if rank >= 100 => 0,
            Some(ReduceOp::Sum) => (i * 7 + rank64 * 3) % (i64::from(100 / self.size).clamp(1, 7) + 1),
            // Neighbours differ by one up and one down, so the mean is the common part.
            Some(ReduceOp::Average) => mean(i) + deviation(rank, self.size),
            // Equal vectors are parallel: Adasum gives back the vector.
            Some(ReduceOp::Adasum) => 1 + i % 50,
            // At most six factors of two.
            Some(ReduceOp::Product) => 1 + i64::from(rank < 6 && (i + rank64) % 2 == 0),
            // Each bit is set on about one rank, so that the union is neither full nor empty however many ranks
            // there are; the intersection is its mirror.
            Some(ReduceOp::BitOr) => self.sparse(rank64, i),
            Some(ReduceOp::BitAnd) => 127 ^ self.sparse(rank64, i),
            Some(ReduceOp::Min | ReduceOp::Max) | None => (i * 7 + rank64 * 13) % 101,
        }
    }

    fn sparse(self, rank: i64, i: i64) -> i64 {
        let hit = |bit: &i64| (i * (2 * bit + 3) + rank * (bit + 5)) % (i64::from(self.size) + 1) == 0;
        (0..7).filter(hit).map(|bit| 1 << bit).sum()
    }

    /// The imaginary part of a complex value. Sums keep the parts apart; products would mix them.
    fn imaginary(self, rank: u32, i: u64) -> i64 {
        if self.op == Some(ReduceOp::Product) { 0 } else { self.value(rank, i + 1) }
    }

    fn combine(self, part: fn(Pattern, u32, u64) -> i64, i: u64) -> i64 {
        let values = (0..self.size).map(|rank| part(self, rank, i));
        let op = self.op.expect("a pattern that is moved is not combined");
        if self.dtype == DType::Bool {
            return match op {
                ReduceOp::Product | ReduceOp::Min | ReduceOp::BitAnd => values.min().unwrap_or(1),
                _ => values.max().unwrap_or(0),
            };
        }
        match op {
            ReduceOp::Sum => values.sum(),
            ReduceOp::Average => values.sum::<i64>() / i64::from(self.size),
            ReduceOp::Adasum => part(self, 0, i),
            ReduceOp::Min => values.min().unwrap_or(0),
            ReduceOp::Max => values.max().unwrap_or(0),
            ReduceOp::Product => values.product(),
            ReduceOp::BitAnd => values.fold(-1, |a, b| a & b),
            ReduceOp::BitOr => values.fold(0, |a, b| a | b),
        }
    }

    /// One period of what `rank` gives, as bytes.
    pub(super) fn given(self, rank: u32) -> Vec<u8> {
        self.table(|i| (self.value(rank, i), self.imaginary(rank, i)), false)
    }

    /// One period of the reduction of all ranks, as bytes.
    pub(super) fn reduced(self) -> Vec<u8> {
        let rounded = self.op == Some(ReduceOp::Average) && !self.dtype.is_integer();
        self.table(|i| (self.combine(Pattern::value, i), self.combine(Pattern::imaginary, i)), rounded)
    }

    /// What the product of a sum and 1 / size is in the accumulator of the type, for Average of floats: not always
    /// the whole number that it would be without rounding.
    fn rounded(self, value: i64) -> f64 {
        let (sum, factor) = (value as f64 * f64::from(self.size), 1.0 / f64::from(self.size));
        match self.dtype {
            DType::F64 | DType::C128 => sum * factor,
            _ => f64::from(sum as f32 * factor as f32),
        }
    }

    fn table(self, value: impl Fn(u64) -> (i64, i64), rounded: bool) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(PERIOD as usize * self.dtype.size());
        let number = |value: i64| if rounded { self.rounded(value) } else { value as f64 };
        for i in 0..PERIOD {
            let (real, imaginary) = value(i);
            encode(self.dtype, number(real), number(imaginary), &mut bytes);
        }
        bytes
    }
}

fn mean(i: i64) -> i64 {
    1 + i % 60
}

fn deviation(rank: u32, size: u32) -> i64 {
    match rank {
        unpaired if unpaired == size - 1 && size % 2 == 1 => 0,
        even if even % 2 == 0 => 1,
        _ => -1,
    }
}

fn encode(dtype: DType, real: f64, imaginary: f64, out: &mut Vec<u8>) {
    match dtype {
        DType::U8 | DType::I8 | DType::Bool => out.push(real as u8),
        DType::U16 | DType::I16 => out.extend((real as u16).to_le_bytes()),
        DType::U32 | DType::I32 => out.extend((real as u32).to_le_bytes()),
        DType::U64 | DType::I64 => out.extend((real as i64).to_le_bytes()),
        DType::F16 => out.extend(half::f16::from_f64(real).to_le_bytes()),
        DType::BF16 => out.extend(half::bf16::from_f64(real).to_le_bytes()),
        DType::F32 => out.extend((real as f32).to_le_bytes()),
        DType::F64 => out.extend(real.to_le_bytes()),
        DType::C64 => {
            out.extend((real as f32).to_le_bytes());
            out.extend((imaginary as f32).to_le_bytes());
        }
        DType::C128 => {
            out.extend(real.to_le_bytes());
            out.extend(imaginary.to_le_bytes());
        }
    }
}

/// Fills `out` with the period in `table`, beginning at element `first`.
pub(super) fn fill(out: &mut [u8], table: &[u8], first: u64, dtype: DType) {
    for (piece, expected) in walk(out.len(), table, first, dtype) {
        out[piece].copy_from_slice(expected);
    }
}

/// How many elements of `bytes` differ from the period in `table`, beginning at element `first`. Elements
/// that are missing are the caller's to count.
pub(super) fn wrong(bytes: &[u8], table: &[u8], first: u64, dtype: DType) -> u64 {
    let mut wrong = 0;
    for (piece, expected) in walk(bytes.len(), table, first, dtype) {
        let got = &bytes[piece];
        if got != expected {
            let pairs = got.chunks_exact(dtype.size()).zip(expected.chunks_exact(dtype.size()));
            wrong += pairs.filter(|(got, expected)| got != expected).count() as u64;
        }
    }
    wrong
}

/// Cuts `len` bytes into pieces that each lie within one period, with the part of the table that belongs there.
fn walk(
    len: usize,
    table: &[u8],
    first: u64,
    dtype: DType,
) -> impl Iterator<Item = (std::ops::Range<usize>, &[u8])> {
    let mut at = 0;
    let mut phase = (first % PERIOD) as usize * dtype.size();
    std::iter::from_fn(move || {
        if at >= len {
            return None;
        }
        let piece = (table.len() - phase).min(len - at);
        let next = (at..at + piece, &table[phase..phase + piece]);
        at += piece;
        phase = 0;
        Some(next)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_partial_result_is_exact_in_every_type() {
        for size in [1, 2, 3, 5, 8, 64, 300] {
            for &op in ReduceOp::ALL {
                for &dtype in DType::ALL.iter().filter(|&&dtype| op.accepts(dtype).is_ok()) {
                    let pattern = Pattern { op: Some(op), dtype, size };
                    for i in 0..PERIOD {
                        let result = pattern.combine(Pattern::value, i);
                        assert!((0..=127).contains(&result), "{op} {dtype} {size}: {result}");
                        let magnitude: i64 = (0..size).map(|rank| pattern.value(rank, i)).sum();
                        let summed = matches!(op, ReduceOp::Sum) && dtype != DType::Bool;
                        assert!(!summed || magnitude <= 127, "{op} {dtype} {size}: {magnitude}");
                    }
                }
            }
        }
    }

    #[test]
    fn patterns_tell_ranks_and_places_apart() {
        for &op in [ReduceOp::Sum, ReduceOp::Max, ReduceOp::BitOr, ReduceOp::BitAnd].iter() {
            let pattern = Pattern { op: Some(op), dtype: DType::I32, size: 4 };
            assert_ne!(pattern.given(0), pattern.given(1), "{op}");
            let table = pattern.reduced();
            let mut bytes = vec![0; 1000 * 4];
            fill(&mut bytes, &table, 17, DType::I32);
            assert_eq!(wrong(&bytes, &table, 17, DType::I32), 0);
            assert!(wrong(&bytes, &table, 18, DType::I32) > 200, "{op}");
            bytes[4 * 300] ^= 1;
            assert_eq!(wrong(&bytes, &table, 17, DType::I32), 1);
        }
    }
}
