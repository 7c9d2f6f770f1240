//! The reference that every kernel, transport and binding is checked against: one value at a time, as the
//! contract says it, without pointers, vectors or blocks. Slow, and shares no code with the kernels.
#![forbid(unsafe_code)]

use crate::types::{DType, ReduceOp};
use ::half::{bf16, f16};

/// In which order operands are combined, and when 16-bit results are rounded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// From the first to the last, every step rounded to the type: a chain, or one chunk of a ring (give the
    /// inputs in the order in which the ring visits them).
    Sequence,
    /// The canonical tree (split at the largest power of two below the number of operands), every step
    /// rounded to the type, as when each step is a message.
    RoundedTree,
    /// The canonical tree in accumulators, prescale and finish included, rounded once.
    Tree,
}

/// What an allreduce of `inputs` gives: bytes of `dtype`, equally many in each, in the order of members.
/// `divisor` is 1 but for Average.
///
/// # Panics
/// When the operation is not defined for the type, or inputs are missing or of unequal length.
#[must_use]
pub fn reduce_all(
    op: ReduceOp,
    dtype: DType,
    inputs: &[Vec<u8>],
    pre: f64,
    post: f64,
    divisor: u32,
    order: Order,
) -> Vec<u8> {
    assert!(op.accepts(dtype).is_ok(), "{op} of {dtype} is not defined");
    assert!(!inputs.is_empty() && inputs.iter().all(|input| input.len() == inputs[0].len()));
    if op == ReduceOp::Adasum {
        let scaled: Vec<Vec<u8>> = inputs.iter().map(|input| scale(dtype, input, pre)).collect();
        return finish(dtype, &adasum_tree(dtype, &scaled), post, divisor);
    }
    if order == Order::Tree {
        let operands: Vec<Vec<Value>> = inputs.iter().map(|input| decode_all(dtype, input)).collect();
        let elements = operands[0].len();
        let result = (0..elements).map(|i| {
            let column: Vec<Value> =
                operands.iter().map(|operand| scale_value(dtype, operand[i], pre)).collect();
            finish_value(dtype, tree(op, dtype, &column), post, divisor)
        });
        return encode_all(dtype, result);
    }
    let scaled: Vec<Vec<u8>> = inputs.iter().map(|input| scale(dtype, input, pre)).collect();
    let combined = match order {
        Order::Sequence => {
            scaled[1..].iter().fold(scaled[0].clone(), |sum, next| reduce(op, dtype, &sum, next))
        }
        _ => rounded_tree(op, dtype, &scaled),
    };
    finish(dtype, &combined, post, divisor)
}

/// `a ⊕ b`, rounded to the type.
#[must_use]
pub fn reduce(op: ReduceOp, dtype: DType, a: &[u8], b: &[u8]) -> Vec<u8> {
    let pairs = decode_all(dtype, a).into_iter().zip(decode_all(dtype, b));
    encode_all(dtype, pairs.map(|(x, y)| combine_values(op, dtype, x, y)))
}

/// Every element times a factor, rounded once; the same bytes where the factor is 1.
#[must_use]
pub fn scale(dtype: DType, src: &[u8], factor: f64) -> Vec<u8> {
    if factor == 1.0 {
        return src.to_vec();
    }
    encode_all(dtype, decode_all(dtype, src).into_iter().map(|x| scale_value(dtype, x, factor)))
}

/// Every element times `post / divisor`, rounded once; the same bytes where both are 1.
#[must_use]
pub fn finish(dtype: DType, src: &[u8], post: f64, divisor: u32) -> Vec<u8> {
    if post == 1.0 && divisor == 1 {
        return src.to_vec();
    }
    encode_all(dtype, decode_all(dtype, src).into_iter().map(|x| finish_value(dtype, x, post, divisor)))
}

/// Adasum of two whole tensors. Scalar products in f64, in chunks of 1024 elements with eight partial sums each
/// (element `i` goes to sum `i % 8`); the canonical tree over the partial sums of all chunks, in their order.
#[must_use]
pub fn adasum(dtype: DType, a: &[u8], b: &[u8]) -> Vec<u8> {
    let real = |value: &Value| match *value {
        Value::F32(x) => f64::from(x),
        Value::F64(x) => x,
        _ => panic!("Adasum takes floating-point tensors"),
    };
    let (x, y) = (decode_all(dtype, a), decode_all(dtype, b));
    let product = |x: &[Value], y: &[Value]| {
        let mut sums = vec![0.0f64; x.len().div_ceil(1024) * 8];
        for (i, (x, y)) in x.iter().zip(y).enumerate() {
            sums[i / 1024 * 8 + i % 8] += real(x) * real(y);
        }
        fn total(sums: &[f64]) -> f64 {
            match sums {
                [] => 0.0,
                [one] => *one,
                _ => total(&sums[..split(sums.len())]) + total(&sums[split(sums.len())..]),
            }
        }
        total(&sums)
    };
    let dot = product(&x, &y);
    let share = |norm: f64| {
        if norm >= f64::MIN_POSITIVE.sqrt() { 1.0 - dot / norm * 0.5 } else { 1.0 }
    };
    let (by_x, by_y) = (share(product(&x, &x)), share(product(&y, &y)));
    let sums = x.iter().zip(&y).map(|(x, y)| match (dtype, *x, *y) {
        (DType::F16 | DType::BF16, Value::F32(x), Value::F32(y)) => {
            Value::F32(x * by_x as f32 + y * by_y as f32)
        }
        (DType::F32, Value::F32(x), Value::F32(y)) => {
            Value::F32((f64::from(x) * by_x + f64::from(y) * by_y) as f32)
        }
        (_, x, y) => Value::F64(real(&x) * by_x + real(&y) * by_y),
    });
    encode_all(dtype, sums)
}

/// One element that changes nothing when combined.
#[must_use]
pub fn identity(op: ReduceOp, dtype: DType) -> Vec<u8> {
    let (smallest, largest) = integer_range(dtype);
    let value = match (op, dtype) {
        (ReduceOp::Sum | ReduceOp::Average | ReduceOp::Adasum | ReduceOp::BitOr, _) => number(dtype, -0.0),
        (ReduceOp::Product, _) => number(dtype, 1.0),
        (ReduceOp::Min, DType::Bool) | (ReduceOp::BitAnd, DType::Bool) => Value::Bool(true),
        (ReduceOp::Max, DType::Bool) => Value::Bool(false),
        (ReduceOp::BitAnd, _) => Value::Integer(wrap(dtype, -1)),
        (ReduceOp::Min, _) if dtype.is_integer() => Value::Integer(largest),
        (ReduceOp::Max, _) if dtype.is_integer() => Value::Integer(smallest),
        (ReduceOp::Min, _) => number(dtype, f64::INFINITY),
        (ReduceOp::Max, _) => number(dtype, f64::NEG_INFINITY),
    };
    encode_all(dtype, [value].into_iter())
}

/// An element in its accumulator.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Value {
    Integer(i128),
    Bool(bool),
    F32(f32),
    F64(f64),
    C64(f32, f32),
    C128(f64, f64),
}

fn number(dtype: DType, x: f64) -> Value {
    match dtype {
        DType::Bool => Value::Bool(x != 0.0),
        DType::F16 | DType::BF16 | DType::F32 => Value::F32(x as f32),
        DType::F64 => Value::F64(x),
        // The identity of a sum has -0 in both parts, that of a product is 1 + 0i.
        DType::C64 => Value::C64(x as f32, if x == 0.0 { -0.0 } else { 0.0 }),
        DType::C128 => Value::C128(x, if x == 0.0 { -0.0 } else { 0.0 }),
        _ => Value::Integer(x as i128),
    }
}

/// The largest power of two below `n`.
fn split(n: usize) -> usize {
    let mut half = 1;
    while half * 2 < n {
        half *= 2;
    }
    half
}

fn tree(op: ReduceOp, dtype: DType, column: &[Value]) -> Value {
    if let [one] = column {
        return *one;
    }
    let (left, right) = column.split_at(split(column.len()));
    combine_values(op, dtype, tree(op, dtype, left), tree(op, dtype, right))
}

fn rounded_tree(op: ReduceOp, dtype: DType, inputs: &[Vec<u8>]) -> Vec<u8> {
    if let [one] = inputs {
        return one.clone();
    }
    let (left, right) = inputs.split_at(split(inputs.len()));
    reduce(op, dtype, &rounded_tree(op, dtype, left), &rounded_tree(op, dtype, right))
}

fn adasum_tree(dtype: DType, inputs: &[Vec<u8>]) -> Vec<u8> {
    if let [one] = inputs {
        return one.clone();
    }
    let (left, right) = inputs.split_at(split(inputs.len()));
    adasum(dtype, &adasum_tree(dtype, left), &adasum_tree(dtype, right))
}

/// Smallest and largest value of an integer type.
fn integer_range(dtype: DType) -> (i128, i128) {
    let bits = 8 * dtype.size() as u32;
    match dtype {
        DType::I8 | DType::I16 | DType::I32 | DType::I64 => (-(1 << (bits - 1)), (1 << (bits - 1)) - 1),
        _ => (0, (1 << bits.min(64)) - 1),
    }
}

/// What remains of an integer in the type's bits.
fn wrap(dtype: DType, x: i128) -> i128 {
    let (smallest, largest) = integer_range(dtype);
    (x - smallest).rem_euclid(largest - smallest + 1) + smallest
}

fn combine_values(op: ReduceOp, dtype: DType, a: Value, b: Value) -> Value {
    match (a, b) {
        (Value::Integer(x), Value::Integer(y)) => Value::Integer(match op {
            ReduceOp::Sum | ReduceOp::Average => wrap(dtype, x + y),
            // Two u64 may overflow i128, whose own wrapping keeps the low 64 bits.
            ReduceOp::Product => wrap(dtype, x.wrapping_mul(y)),
            ReduceOp::Min => x.min(y),
            ReduceOp::Max => x.max(y),
            ReduceOp::BitAnd => x & y,
            ReduceOp::BitOr => x | y,
            ReduceOp::Adasum => panic!("Adasum takes whole tensors"),
        }),
        (Value::Bool(x), Value::Bool(y)) => Value::Bool(match op {
            ReduceOp::Sum | ReduceOp::Max | ReduceOp::BitOr => x || y,
            _ => x && y,
        }),
        (Value::F32(x), Value::F32(y)) => Value::F32(match op {
            ReduceOp::Sum | ReduceOp::Average => x + y,
            ReduceOp::Product => x * y,
            // Exact in f64, so one body serves both widths.
            _ => extreme(op, f64::from(x), f64::from(y)) as f32,
        }),
        (Value::F64(x), Value::F64(y)) => Value::F64(match op {
            ReduceOp::Sum | ReduceOp::Average => x + y,
            ReduceOp::Product => x * y,
            _ => extreme(op, x, y),
        }),
        (Value::C64(a, b), Value::C64(c, d)) => match op {
            ReduceOp::Product => Value::C64(a * c - b * d, a * d + b * c),
            _ => Value::C64(a + c, b + d),
        },
        (Value::C128(a, b), Value::C128(c, d)) => match op {
            ReduceOp::Product => Value::C128(a * c - b * d, a * d + b * c),
            _ => Value::C128(a + c, b + d),
        },
        _ => unreachable!("both values were decoded as {dtype}"),
    }
}

fn extreme(op: ReduceOp, x: f64, y: f64) -> f64 {
    if x.is_nan() || y.is_nan() {
        return f64::NAN;
    }
    // total_cmp orders -0 before +0, as the contract asks.
    let x_is_less = x.total_cmp(&y).is_lt();
    if (op == ReduceOp::Min) == x_is_less { x } else { y }
}

fn to_integer(dtype: DType, x: f64) -> Value {
    let (smallest, largest) = integer_range(dtype);
    Value::Integer((x.floor() as i128).clamp(smallest, largest))
}

fn scale_value(dtype: DType, value: Value, factor: f64) -> Value {
    if factor == 1.0 {
        return value;
    }
    let narrow = factor as f32;
    match value {
        Value::Integer(x) => to_integer(dtype, x as f64 * factor),
        Value::Bool(x) => Value::Bool(x && factor != 0.0),
        Value::F32(x) => Value::F32(x * narrow),
        Value::F64(x) => Value::F64(x * factor),
        Value::C64(re, im) => Value::C64(re * narrow, im * narrow),
        Value::C128(re, im) => Value::C128(re * factor, im * factor),
    }
}

fn finish_value(dtype: DType, value: Value, post: f64, divisor: u32) -> Value {
    match value {
        Value::Integer(x) if post == 1.0 => Value::Integer(x.div_euclid(i128::from(divisor))),
        Value::Integer(x) => to_integer(dtype, x as f64 * post / f64::from(divisor)),
        _ => scale_value(dtype, value, post / f64::from(divisor)),
    }
}

fn decode_all(dtype: DType, bytes: &[u8]) -> Vec<Value> {
    assert_eq!(bytes.len() % dtype.size(), 0, "whole elements");
    bytes.chunks_exact(dtype.size()).map(|element| decode(dtype, element)).collect()
}

fn decode(dtype: DType, bytes: &[u8]) -> Value {
    fn of<const N: usize>(bytes: &[u8]) -> [u8; N] {
        bytes.try_into().expect("an element's bytes")
    }
    match dtype {
        DType::U8 => Value::Integer(i128::from(bytes[0])),
        DType::I8 => Value::Integer(i128::from(bytes[0] as i8)),
        DType::U16 => Value::Integer(i128::from(u16::from_ne_bytes(of(bytes)))),
        DType::I16 => Value::Integer(i128::from(i16::from_ne_bytes(of(bytes)))),
        DType::U32 => Value::Integer(i128::from(u32::from_ne_bytes(of(bytes)))),
        DType::I32 => Value::Integer(i128::from(i32::from_ne_bytes(of(bytes)))),
        DType::U64 => Value::Integer(i128::from(u64::from_ne_bytes(of(bytes)))),
        DType::I64 => Value::Integer(i128::from(i64::from_ne_bytes(of(bytes)))),
        DType::Bool => Value::Bool(bytes[0] != 0),
        DType::F16 => Value::F32(f16::from_ne_bytes(of(bytes)).to_f32()),
        DType::BF16 => Value::F32(bf16::from_ne_bytes(of(bytes)).to_f32()),
        DType::F32 => Value::F32(f32::from_ne_bytes(of(bytes))),
        DType::F64 => Value::F64(f64::from_ne_bytes(of(bytes))),
        DType::C64 => Value::C64(f32::from_ne_bytes(of(&bytes[..4])), f32::from_ne_bytes(of(&bytes[4..]))),
        DType::C128 => Value::C128(f64::from_ne_bytes(of(&bytes[..8])), f64::from_ne_bytes(of(&bytes[8..]))),
    }
}

fn encode_all(dtype: DType, values: impl Iterator<Item = Value>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for value in values {
        encode(dtype, value, &mut bytes);
    }
    bytes
}

/// Rounds to the type; a NaN becomes the canonical one.
fn encode(dtype: DType, value: Value, out: &mut Vec<u8>) {
    let single = |x: f32| if x.is_nan() { 0x7fc0_0000u32 } else { x.to_bits() }.to_ne_bytes();
    let double = |x: f64| if x.is_nan() { 0x7ff8_0000_0000_0000u64 } else { x.to_bits() }.to_ne_bytes();
    match value {
        Value::Integer(x) => match dtype.size() {
            1 => out.push(x as u8),
            2 => out.extend((x as u16).to_ne_bytes()),
            4 => out.extend((x as u32).to_ne_bytes()),
            _ => out.extend((x as u64).to_ne_bytes()),
        },
        Value::Bool(x) => out.push(u8::from(x)),
        Value::F32(x) if dtype == DType::F16 => {
            out.extend(if x.is_nan() { 0x7e00 } else { f16::from_f32(x).to_bits() }.to_ne_bytes());
        }
        Value::F32(x) if dtype == DType::BF16 => {
            out.extend(if x.is_nan() { 0x7fc0 } else { bf16::from_f32(x).to_bits() }.to_ne_bytes());
        }
        Value::F32(x) => out.extend(single(x)),
        Value::F64(x) => out.extend(double(x)),
        Value::C64(re, im) => {
            out.extend(single(re));
            out.extend(single(im));
        }
        Value::C128(re, im) => {
            out.extend(double(re));
            out.extend(double(im));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn i32s(values: &[i32]) -> Vec<u8> {
        values.iter().flat_map(|x| x.to_ne_bytes()).collect()
    }

    fn f32s(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|x| x.to_ne_bytes()).collect()
    }

    fn bf16s(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|&x| bf16::from_f32(x).to_ne_bytes()).collect()
    }

    // The oracle itself is held against numbers worked out by hand.
    #[test]
    fn integers_by_hand() {
        let inputs = [i32s(&[-7, i32::MAX]), i32s(&[0, 1])];
        let average = |order| reduce_all(ReduceOp::Average, DType::I32, &inputs, 1.0, 1.0, 2, order);
        assert_eq!(average(Order::Tree), i32s(&[-4, i32::MIN / 2]));
        assert_eq!(average(Order::Sequence), average(Order::Tree));
        assert_eq!(scale(DType::I32, &i32s(&[-3, 3, i32::MAX]), 0.5), i32s(&[-2, 1, 1_073_741_823]));
        assert_eq!(scale(DType::I32, &i32s(&[i32::MAX, i32::MIN]), 2.0), i32s(&[i32::MAX, i32::MIN]));
        let big = u64::MAX.to_ne_bytes().to_vec();
        assert_eq!(finish(DType::U64, &big, 1.0, 3), (u64::MAX / 3).to_ne_bytes());
        assert_eq!(reduce(ReduceOp::Product, DType::U64, &big, &big), 1u64.to_ne_bytes());
    }

    #[test]
    fn floats_by_hand() {
        let one = bf16s(&[256.0]);
        let small = bf16s(&[1.0]);
        let inputs = [one, small.clone(), small];
        let sum = |order| reduce_all(ReduceOp::Sum, DType::BF16, &inputs, 1.0, 1.0, 1, order);
        // 257 is a tie and goes to 256 each time; 258 can be written.
        assert_eq!(sum(Order::Sequence), bf16s(&[256.0]));
        assert_eq!(sum(Order::Tree), bf16s(&[258.0]));
        let min = |a: f32, b: f32| reduce(ReduceOp::Min, DType::F32, &f32s(&[a]), &f32s(&[b]));
        assert_eq!(min(0.0, -0.0), f32s(&[-0.0]));
        assert_eq!(min(-0.0, 0.0), f32s(&[-0.0]));
        assert_eq!(min(1.0, -f32::NAN), 0x7fc0_0000u32.to_ne_bytes());
        // Parallel gradients average, orthogonal ones add.
        assert_eq!(adasum(DType::F32, &f32s(&[2.0, 4.0]), &f32s(&[2.0, 4.0])), f32s(&[2.0, 4.0]));
        assert_eq!(adasum(DType::F32, &f32s(&[3.0, 0.0]), &f32s(&[0.0, 5.0])), f32s(&[3.0, 5.0]));
        assert_eq!(adasum(DType::F32, &f32s(&[0.0, 0.0]), &f32s(&[0.0, 5.0])), f32s(&[0.0, 5.0]));
    }

    #[test]
    fn trees_split_at_the_largest_power_of_two_below() {
        assert_eq!([2, 3, 4, 5, 7, 8, 9].map(split), [1, 2, 2, 4, 4, 4, 8]);
    }
}
