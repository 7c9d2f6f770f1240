//! What results must be, computed element by element in the plainest way, from nothing of the runtime's but
//! its enumerations. Inputs are made so that results do not depend on the order of combination: integers over
//! their whole range (they wrap), floats that are small whole numbers or powers of two.
#![forbid(unsafe_code)]

use crate::random::{Random, mix};
use carole::types::{DType, ReduceOp};

/// One element.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Element {
    /// Of an integer type, by value.
    Int(i128),
    /// Of a floating-point type.
    Real(f64),
    /// Real and imaginary part.
    Complex(f64, f64),
    /// The byte of a bool.
    Bool(u8),
}

/// How the elements of an operation are made.
#[derive(Clone, Copy, Debug)]
pub struct Recipe {
    /// The reduction; `None` where values are only moved.
    pub op: Option<ReduceOp>,
    pub dtype: DType,
    /// Factors before and after (powers of two; 1 where nothing is reduced).
    pub pre: f64,
    pub post: f64,
    pub seed: u64,
}

fn signed(dtype: DType) -> bool {
    matches!(dtype, DType::I8 | DType::I16 | DType::I32 | DType::I64)
}

/// The value of the lowest bits, as the type holds it.
fn wrap(dtype: DType, value: i128) -> i128 {
    let bits = dtype.size() as u32 * 8;
    let low = value & ((1i128 << bits) - 1);
    if signed(dtype) && low >> (bits - 1) & 1 == 1 { low - (1i128 << bits) } else { low }
}

impl Recipe {
    /// What the member at `position` of `members` gives at index `i`.
    pub fn given(&self, position: u32, members: u32, i: u64) -> Element {
        let word = mix(self.seed ^ mix(i ^ u64::from(position) << 40));
        match self.dtype {
            // Any byte but 0 counts as true. Moved bytes stay as they are only when they are 0 or 1.
            DType::Bool if self.op.is_some() => {
                Element::Bool([0, 1, 1, 1, 2, 255, 0, 1][(word % 8) as usize])
            }
            DType::Bool => Element::Bool((word % 2) as u8),
            dtype if dtype.is_integer() => Element::Int(self.integer(word)),
            dtype if dtype.is_complex() => self.complex(word, position, members, i),
            _ => Element::Real(self.real(word, position, members, i)),
        }
    }

    fn integer(&self, word: u64) -> i128 {
        let small = self.op == Some(ReduceOp::Average) || self.pre != 1.0 || self.post != 1.0;
        if !small {
            return wrap(self.dtype, i128::from(word));
        }
        // Eight of them, doubled, stay within i8. Multiples of four, so that halving is exact.
        let quarter = if signed(self.dtype) { i128::from(word % 3) - 1 } else { i128::from(word % 3) };
        4 * quarter + i128::from(self.op == Some(ReduceOp::Average) && self.pre == 1.0 && word & 64 != 0)
    }

    fn complex(&self, word: u64, position: u32, members: u32, i: u64) -> Element {
        if self.op == Some(ReduceOp::Product) {
            // Units, whose products are units again.
            let (re, im) = [(1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0)][(word % 4) as usize];
            return Element::Complex(re, im);
        }
        if self.op == Some(ReduceOp::Average) {
            let part = |i: u64| self.real(word, position, members, i);
            return Element::Complex(part(2 * i), part(2 * i + 1));
        }
        Element::Complex((word % 17) as f64 - 8.0, (word >> 8 & 15) as f64 - 7.0)
    }

    fn real(&self, word: u64, position: u32, members: u32, i: u64) -> f64 {
        match self.op {
            Some(ReduceOp::Sum) => (word % 17) as f64 - 8.0,
            // Neighbours differ by as much upwards as downwards.
            Some(ReduceOp::Average) => {
                let common = (mix(self.seed ^ mix(i)) % 33) as f64 - 16.0;
                let unpaired = members % 2 == 1 && position == members - 1;
                common
                    + if unpaired {
                        0.0
                    } else if position.is_multiple_of(2) {
                        2.0
                    } else {
                        -2.0
                    }
            }
            // Orthogonal vectors: each index belongs to one member, so that they add.
            Some(ReduceOp::Adasum) => {
                if i % u64::from(members) == u64::from(position) {
                    (word % 17) as f64 - 8.0
                } else {
                    0.0
                }
            }
            Some(ReduceOp::Product) => [1.0, -1.0, 2.0, 0.5][(word % 4) as usize],
            Some(ReduceOp::Min | ReduceOp::Max) => match word % 64 {
                0 => f64::NAN,
                1 => -0.0,
                2 => 0.0,
                3 => f64::INFINITY,
                4 => f64::NEG_INFINITY,
                _ => (word >> 8 & 255) as f64 / 4.0 - 32.0,
            },
            Some(ReduceOp::BitAnd | ReduceOp::BitOr) => unreachable!("the runtime refuses them on floats"),
            None => (word % 2001) as f64 / 8.0 - 125.0,
        }
    }

    /// The reduction of what all members give at index `i`.
    pub fn reduced(&self, members: u32, i: u64) -> Element {
        let given = (0..members).map(|position| self.given(position, members, i));
        let op = self.op.expect("values that are moved are not reduced");
        let folded = given.map(|e| self.scaled(e, self.pre)).reduce(|a, b| combine(op, self.dtype, a, b));
        let folded = folded.expect("a set has members");
        match (op, folded) {
            (ReduceOp::Average, Element::Int(sum)) => Element::Int(sum.div_euclid(i128::from(members))),
            (ReduceOp::Average, Element::Real(sum)) => Element::Real(self.average(sum, members)),
            (ReduceOp::Average, Element::Complex(re, im)) => {
                Element::Complex(self.average(re, members), self.average(im, members))
            }
            // Whatever was read, 0 or 1 is written.
            (_, Element::Bool(byte)) => Element::Bool(u8::from(byte != 0)),
            (_, other) => self.scaled(other, self.post),
        }
    }

    /// Average multiplies by postscale / size, in the accumulator of the type.
    fn average(&self, sum: f64, members: u32) -> f64 {
        let factor = self.post / f64::from(members);
        if matches!(self.dtype, DType::F64 | DType::C128) {
            sum * factor
        } else {
            f64::from(sum as f32 * factor as f32)
        }
    }

    fn scaled(&self, element: Element, factor: f64) -> Element {
        match element {
            Element::Int(value) if factor != 1.0 => Element::Int((value as f64 * factor) as i128),
            Element::Real(value) => Element::Real(value * factor),
            Element::Complex(re, im) => Element::Complex(re * factor, im * factor),
            other => other,
        }
    }

    /// `count` elements that a member gives, from index `first`, as bytes.
    pub fn bytes(&self, position: u32, members: u32, first: u64, count: u64) -> Vec<u8> {
        let mut out = Vec::with_capacity(count as usize * self.dtype.size());
        for i in first..first + count {
            encode(self.dtype, self.given(position, members, i), &mut out);
        }
        out
    }
}

fn combine(op: ReduceOp, dtype: DType, a: Element, b: Element) -> Element {
    match (a, b) {
        (Element::Int(a), Element::Int(b)) => Element::Int(match op {
            ReduceOp::Average => a + b,
            ReduceOp::Sum => wrap(dtype, a + b),
            ReduceOp::Product => wrap(dtype, a.wrapping_mul(b)),
            ReduceOp::Min => a.min(b),
            ReduceOp::Max => a.max(b),
            ReduceOp::BitAnd => a & b,
            ReduceOp::BitOr => a | b,
            ReduceOp::Adasum => unreachable!("the runtime refuses it on integers"),
        }),
        (Element::Real(a), Element::Real(b)) => Element::Real(match op {
            ReduceOp::Sum | ReduceOp::Average | ReduceOp::Adasum => a + b,
            ReduceOp::Product => a * b,
            ReduceOp::Min | ReduceOp::Max if a.is_nan() || b.is_nan() => f64::NAN,
            // total_cmp puts -0 below +0.
            ReduceOp::Min => {
                if a.total_cmp(&b).is_le() {
                    a
                } else {
                    b
                }
            }
            ReduceOp::Max => {
                if a.total_cmp(&b).is_ge() {
                    a
                } else {
                    b
                }
            }
            ReduceOp::BitAnd | ReduceOp::BitOr => unreachable!("the runtime refuses them on floats"),
        }),
        (Element::Complex(ar, ai), Element::Complex(br, bi)) => match op {
            ReduceOp::Product => Element::Complex(ar * br - ai * bi, ar * bi + ai * br),
            _ => Element::Complex(ar + br, ai + bi),
        },
        (Element::Bool(a), Element::Bool(b)) => {
            let (a, b) = (a != 0, b != 0);
            let and = matches!(op, ReduceOp::Product | ReduceOp::Min | ReduceOp::BitAnd);
            Element::Bool(u8::from(if and { a && b } else { a || b }))
        }
        _ => unreachable!("all members give the same type"),
    }
}

/// Appends an element as the type's bytes.
pub fn encode(dtype: DType, element: Element, out: &mut Vec<u8>) {
    match element {
        Element::Int(value) => out.extend(&value.to_le_bytes()[..dtype.size()]),
        Element::Bool(byte) => out.push(byte),
        Element::Complex(re, im) if dtype == DType::C64 => {
            out.extend((re as f32).to_le_bytes());
            out.extend((im as f32).to_le_bytes());
        }
        Element::Complex(re, im) => {
            out.extend(re.to_le_bytes());
            out.extend(im.to_le_bytes());
        }
        Element::Real(value) => match dtype {
            DType::F16 => out.extend(half::f16::from_f64(value).to_le_bytes()),
            DType::BF16 => out.extend(half::bf16::from_f64(value).to_le_bytes()),
            DType::F32 => out.extend((value as f32).to_le_bytes()),
            _ => out.extend(value.to_le_bytes()),
        },
    }
}

/// Whether bytes hold this element. Any NaN will do for a NaN, and either zero of a complex number for the other
/// (the sign of a zero in a complex product depends on the order).
pub fn holds(dtype: DType, bytes: &[u8], element: Element) -> bool {
    let real = |bytes: &[u8]| match dtype {
        DType::F16 => half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f64(),
        DType::BF16 => half::bf16::from_le_bytes([bytes[0], bytes[1]]).to_f64(),
        _ if bytes.len() == 4 => f64::from(f32::from_le_bytes(bytes.try_into().expect("4 bytes"))),
        _ => f64::from_le_bytes(bytes.try_into().expect("8 bytes")),
    };
    match element {
        Element::Real(value) if value.is_nan() => real(bytes).is_nan(),
        Element::Complex(re, im) => {
            let (first, second) = bytes.split_at(bytes.len() / 2);
            real(first) == re && real(second) == im
        }
        other => {
            let mut expected = Vec::with_capacity(16);
            encode(dtype, other, &mut expected);
            bytes == expected
        }
    }
}

/// The sum in the canonical order of strict mode: a balanced binary tree over the members, split at the
/// largest power of two below their number; 16-bit types in f32 until the one rounding at the end.
pub fn strict_sum(dtype: DType, values: &[f64]) -> f64 {
    fn tree(narrow: bool, values: &[f64]) -> f64 {
        if let [one] = values {
            return *one;
        }
        let (left, right) = values.split_at(values.len().next_power_of_two() / 2);
        let sum = tree(narrow, left) + tree(narrow, right);
        if narrow { f64::from(sum as f32) } else { sum }
    }
    let sum = tree(dtype != DType::F64, values);
    match dtype {
        DType::F16 => half::f16::from_f32(sum as f32).to_f64(),
        DType::BF16 => half::bf16::from_f32(sum as f32).to_f64(),
        _ => sum,
    }
}

/// A random number with a full fraction, as a value of the type.
pub fn rough(dtype: DType, random: &mut Random) -> f64 {
    let exponent = random.below(24) as i32 - 12;
    let value = (random.next() as i64 as f64 / i64::MAX as f64) * 2f64.powi(exponent);
    match dtype {
        DType::F16 => half::f16::from_f64(value).to_f64(),
        DType::BF16 => half::bf16::from_f64(value).to_f64(),
        DType::F32 => f64::from(value as f32),
        _ => value,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_wrap_at_their_width() {
        assert_eq!(wrap(DType::I8, 128), -128);
        assert_eq!(wrap(DType::U8, -1), 255);
        assert_eq!(wrap(DType::I64, i128::from(i64::MAX) + 1), i128::from(i64::MIN));
        assert_eq!(wrap(DType::U64, -1), i128::from(u64::MAX));
    }

    #[test]
    fn order_does_not_matter_for_what_the_recipes_give() {
        for &op in ReduceOp::ALL {
            for &dtype in DType::ALL.iter().filter(|&&dtype| op.accepts(dtype).is_ok()) {
                let recipe = Recipe { op: Some(op), dtype, pre: 1.0, post: 1.0, seed: 5 };
                for i in 0..200 {
                    let given: Vec<Element> = (0..8).map(|m| recipe.given(m, 8, i)).collect();
                    let narrowed = |e: Element| {
                        let mut bytes = Vec::new();
                        encode(dtype, e, &mut bytes);
                        bytes
                    };
                    let forth = given.iter().copied().reduce(|a, b| combine(op, dtype, a, b)).expect("eight");
                    let back =
                        given.iter().rev().copied().reduce(|a, b| combine(op, dtype, a, b)).expect("eight");
                    assert!(holds(dtype, &narrowed(forth), back), "{op} {dtype} {i}: {forth:?} {back:?}");
                }
            }
        }
    }

    #[test]
    fn the_strict_tree_splits_at_the_largest_power_of_two() {
        let (big, one) = (f64::from(1u32 << 24), 1.0);
        // ((big + 1) + (1 + 1)) + 1 in f32: big + 1 rounds to big, then + 2, then + 1 rounds to even.
        assert_eq!(strict_sum(DType::F32, &[big, one, one, one, one]), big + 4.0);
        assert_eq!(strict_sum(DType::F64, &[big, one, one, one, one]), big + 4.0);
        assert_eq!(strict_sum(DType::F32, &[one, big, one]), big);
    }
}
