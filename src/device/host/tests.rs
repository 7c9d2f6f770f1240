//! Kernels against the oracle: every operation × type × level, edge values and random bits, all
//! misalignments, all short lengths, all ways in which operands may be the same memory.

use super::oracle::{self, Order};
use super::*;
use crate::memory::{Piece, PieceRange, Region, RunId};
use crate::types::ReduceOp;
use proptest::prelude::*;
use std::sync::Arc;

fn levels() -> impl Iterator<Item = Level> {
    Level::ALL.iter().copied().filter(|level| level.is_available())
}

/// Every operation that reduces element by element.
fn reductions() -> impl Iterator<Item = Reduction> {
    let all =
        DType::ALL.iter().flat_map(|&dtype| ReduceOp::ALL.iter().map(move |&op| Reduction { dtype, op }));
    all.filter(|r| r.op != ReduceOp::Adasum && r.op.accepts(r.dtype).is_ok())
}

const REALS: [DType; 4] = [DType::F16, DType::BF16, DType::F32, DType::F64];

/// Values at which something changes, as bytes of one element (of one part, for complex types).
fn edges(dtype: DType) -> Vec<Vec<u8>> {
    let f32s = [
        0.0f32,
        -0.0,
        1.0,
        -1.0,
        1.5,
        3.0,
        1e-40,
        -1e-40,
        f32::MIN_POSITIVE,
        f32::MAX,
        f32::MIN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::EPSILON,
        16_777_217.0,
        f32::from_bits(1),
        f32::from_bits(0x7f80_0001),
        f32::from_bits(0xffc1_2345),
        f32::from_bits(0x7fff_ffff),
    ];
    match dtype {
        DType::F16 => [
            0u16, 0x8000, 1, 0x8001, 0x3ff, 0x400, 0x401, 0x3c00, 0xbc00, 0x3c01, 0x7bff, 0xfbff, 0x7c00,
            0xfc00, 0x7c01, 0xfe12, 0x7e00, 0x6800, 0x1400, 0x13ff, 0x0c00,
        ]
        .map(|x| x.to_ne_bytes().to_vec())
        .to_vec(),
        DType::BF16 => f32s.map(|x| ((x.to_bits() >> 16) as u16).to_ne_bytes().to_vec()).to_vec(),
        DType::F32 | DType::C64 => f32s.map(|x| x.to_ne_bytes().to_vec()).to_vec(),
        DType::F64 | DType::C128 => {
            let mut values = f32s.map(f64::from).to_vec();
            values.extend([
                f64::MAX,
                f64::MIN_POSITIVE,
                5e-324,
                -5e-324,
                f64::from_bits(0xfff8_0000_0000_1234),
            ]);
            values.into_iter().map(|x| x.to_ne_bytes().to_vec()).collect()
        }
        DType::Bool => [0u8, 1, 2, 128, 255].map(|x| vec![x]).to_vec(),
        _ => [0i64, 1, -1, 2, 3, -7, 127, 128, 255, i64::MAX, i64::MIN, 1 << 53, (1 << 53) + 1, 0x7fff_ffff]
            .map(|x| x.to_ne_bytes()[..dtype.size()].to_vec())
            .to_vec(),
    }
}

/// Two operands that hold every pair of edge values.
fn edge_pairs(dtype: DType) -> (Vec<u8>, Vec<u8>) {
    let (mut a, mut b) = (Vec::new(), Vec::new());
    let edges = edges(dtype);
    for x in &edges {
        for y in &edges {
            a.extend(x);
            b.extend(y);
        }
    }
    if dtype.is_complex() && !a.len().is_multiple_of(dtype.size()) {
        a.extend(&edges[2]);
        b.extend(&edges[3]);
    }
    (a, b)
}

/// Random bytes; for floats one element in four is small enough for sums not to swamp one another.
fn random(seed: u64, dtype: DType, elements: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    };
    let mut bytes: Vec<u8> = (0..elements * dtype.size()).map(|_| (next() >> 56) as u8).collect();
    let part = if dtype.is_complex() { dtype.size() / 2 } else { dtype.size() };
    if dtype.is_float() || dtype.is_complex() {
        for element in bytes.chunks_exact_mut(part) {
            if next() % 4 != 0 {
                let x = (next() >> 40) as f32 / 1e6 - 8.0;
                match part {
                    2 if dtype == DType::F16 => {
                        element.copy_from_slice(&::half::f16::from_f32(x).to_ne_bytes())
                    }
                    2 => element.copy_from_slice(&::half::bf16::from_f32(x).to_ne_bytes()),
                    4 => element.copy_from_slice(&x.to_ne_bytes()),
                    _ => element.copy_from_slice(&(f64::from(x) * 1.000_000_001).to_ne_bytes()),
                }
            }
        }
    }
    bytes
}

/// Runs `f` with `dst` and the operands at the misalignments given, and returns what it wrote to `dst`.
/// Bytes around `dst` and the operands themselves must not change.
fn placed(
    bytes: usize,
    operands: &[&[u8]],
    shifts: &[usize],
    f: impl FnOnce(*mut u8, &[*const u8]),
) -> Vec<u8> {
    const GUARD: usize = 64;
    let mut buffers: Vec<Vec<u8>> = Vec::new();
    for (i, operand) in operands.iter().enumerate() {
        let mut buffer = vec![0xa5; GUARD + 16];
        // From an aligned start, so that the shift is the misalignment.
        let start = buffer.as_ptr().align_offset(16) + shifts[(i + 1) % shifts.len()];
        buffer.resize(start, 0xa5);
        buffer.reserve(operand.len() + GUARD);
        buffer.extend(*operand);
        buffers.push(buffer);
    }
    let sources: Vec<*const u8> =
        buffers.iter().zip(operands).map(|(buffer, o)| buffer[buffer.len() - o.len()..].as_ptr()).collect();
    let mut out = vec![0x5a; bytes + 2 * GUARD + 16];
    let start = GUARD + out.as_ptr().align_offset(16).min(15) + shifts[0];
    // SAFETY: the buffer has GUARD bytes beyond `start + bytes`.
    f(unsafe { out.as_mut_ptr().add(start) }, &sources);
    assert!(out[..start].iter().chain(&out[start + bytes..]).all(|&x| x == 0x5a), "wrote outside dst");
    for (buffer, operand) in buffers.iter().zip(operands) {
        assert!(buffer.ends_with(operand), "an operand was written");
    }
    out[start..start + bytes].to_vec()
}

#[track_caller]
fn assert_same(dtype: DType, got: &[u8], want: &[u8], what: impl Fn() -> String) {
    if got != want {
        let size = dtype.size();
        let i = got.chunks(size).zip(want.chunks(size)).position(|(g, w)| g != w).unwrap_or(usize::MAX);
        let at = i * size..(i + 1) * size;
        panic!("{}: element {i} is {:x?}, not {:x?}", what(), &got[at.clone()], &want[at]);
    }
}

/// `reduce` at one level, at these misalignments.
fn reduce_at(level: Level, reduction: Reduction, a: &[u8], b: &[u8], shifts: &[usize]) -> Vec<u8> {
    placed(a.len(), &[a, b], shifts, |dst, srcs| {
        // SAFETY: all three hold `a.len()` bytes and are disjoint.
        unsafe { table::reduce(level, reduction, (dst, dst), srcs[0], srcs[1], a.len(), Finish::NOTHING) }
    })
}

fn reduce_many_at(
    level: Level,
    reduction: Reduction,
    inputs: &[Vec<u8>],
    pre: f64,
    finish: Finish,
    shifts: &[usize],
) -> Vec<u8> {
    let operands: Vec<&[u8]> = inputs.iter().map(Vec::as_slice).collect();
    placed(inputs[0].len(), &operands, shifts, |dst, srcs| {
        // SAFETY: all hold as many bytes as the first and are disjoint.
        unsafe { table::reduce_many(level, reduction, dst, srcs, inputs[0].len(), pre, finish) }
    })
}

#[test]
fn edge_values_of_every_reduction_and_level() {
    for reduction in reductions() {
        let (a, b) = edge_pairs(reduction.dtype);
        let want = oracle::reduce(reduction.op, reduction.dtype, &a, &b);
        for level in levels() {
            for (a, b) in [(&a, &b), (&b, &a)] {
                let got = reduce_at(level, reduction, a, b, &[0, 0, 0]);
                assert_same(reduction.dtype, &got, &want, || format!("{reduction:?} at {level}"));
            }
        }
    }
}

#[test]
fn every_half_survives_widening_and_rounding() {
    for dtype in [DType::F16, DType::BF16] {
        let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_ne_bytes).collect();
        let reduction = Reduction { dtype, op: ReduceOp::Max };
        let want = oracle::reduce(ReduceOp::Max, dtype, &all, &all);
        // Rounding: sums with a constant hit every tie; products by 1/3 and 1e-3 every subnormal.
        let ulp: Vec<u8> =
            all.chunks(2).flat_map(|_| edges(dtype)[15 % edges(dtype).len()].clone()).collect();
        let sum = Reduction { dtype, op: ReduceOp::Sum };
        let want_sum = oracle::reduce(ReduceOp::Sum, dtype, &all, &ulp);
        for level in levels() {
            let got = reduce_at(level, reduction, &all, &all, &[0, 0, 0]);
            assert_same(dtype, &got, &want, || format!("{dtype} at {level}"));
            let got = reduce_at(level, sum, &all, &ulp, &[0, 0, 0]);
            assert_same(dtype, &got, &want_sum, || format!("sum of {dtype} at {level}"));
            for factor in [1.0 / 3.0, 1e-3, 1e-36, 0.5, 3.0, f64::NAN, f64::INFINITY] {
                let got = placed(all.len(), &[&all], &[0, 0], |dst, srcs| {
                    // SAFETY: both hold `all.len()` bytes and are disjoint.
                    unsafe { table::scale(level, dtype, dst, srcs[0], all.len(), factor) }
                });
                let want = oracle::scale(dtype, &all, factor);
                assert_same(dtype, &got, &want, || format!("{dtype} times {factor} at {level}"));
            }
        }
    }
}

#[test]
fn every_misalignment_and_short_length() {
    for reduction in reductions() {
        let size = reduction.dtype.size();
        let a = random(1, reduction.dtype, 200);
        let b = random(2, reduction.dtype, 200);
        let want = oracle::reduce(reduction.op, reduction.dtype, &a, &b);
        for level in levels() {
            for elements in 0..=200 {
                let shifts = [elements % 16, (elements / 3) % 16, (elements * 7 + 1) % 16];
                let bytes = elements * size;
                let got = reduce_at(level, reduction, &a[..bytes], &b[..bytes], &shifts);
                assert_same(reduction.dtype, &got, &want[..bytes], || {
                    format!("{reduction:?} at {level}, {elements} elements, shifts {shifts:?}")
                });
            }
            for shift in 0..16 {
                for shifts in [[shift, 0, 0], [0, shift, 0], [0, 0, shift], [shift, shift, shift]] {
                    let got = reduce_at(level, reduction, &a, &b, &shifts);
                    assert_same(reduction.dtype, &got, &want, || {
                        format!("{reduction:?} at {level}, shifts {shifts:?}")
                    });
                }
            }
        }
    }
}

#[test]
fn operands_may_be_the_result() {
    for reduction in reductions() {
        let Reduction { dtype, op } = reduction;
        let a = random(3, dtype, 333);
        let b = random(4, dtype, 333);
        let c = random(5, dtype, 333);
        let bytes = a.len();
        let want = oracle::reduce(op, dtype, &a, &b);
        let double = oracle::reduce(op, dtype, &a, &a);
        let inputs = [a.clone(), b.clone(), c.clone()];
        let many = oracle::reduce_all(op, dtype, &inputs, 1.0, 1.0, 3, Order::Tree);
        let finish = Finish { divisor: 3, post: 1.0 };
        for level in levels() {
            let (mut x, mut y, mut z) = (a.clone(), b.clone(), a.clone());
            let [px, py, pz] = [&mut x, &mut y, &mut z].map(|v| v.as_mut_ptr());
            // SAFETY: each vector holds `bytes` bytes; `dst` is exactly one operand or both.
            unsafe {
                table::reduce(level, reduction, (px, px), px, b.as_ptr(), bytes, Finish::NOTHING);
                table::reduce(level, reduction, (py, py), a.as_ptr(), py, bytes, Finish::NOTHING);
                table::reduce(level, reduction, (pz, pz), pz, pz, bytes, Finish::NOTHING);
            }
            assert_same(dtype, &x, &want, || format!("{reduction:?} at {level} into a"));
            assert_same(dtype, &y, &want, || format!("{reduction:?} at {level} into b"));
            assert_same(dtype, &z, &double, || format!("{reduction:?} at {level} into both"));
            for into in 0..3 {
                let mut copies = inputs.clone();
                let pointers = copies.each_mut().map(|v| v.as_mut_ptr());
                let srcs = pointers.map(<*mut u8>::cast_const);
                // SAFETY: each holds `bytes` bytes; `dst` is exactly one of them.
                unsafe { table::reduce_many(level, reduction, pointers[into], &srcs, bytes, 1.0, finish) };
                assert_same(dtype, &copies[into], &many, || format!("{reduction:?} at {level} into {into}"));
            }
        }
    }
}

#[test]
fn the_result_of_a_pair_may_go_where_both_operands_lay() {
    for reduction in reductions() {
        let Reduction { dtype, op } = reduction;
        let inputs = [random(3, dtype, 333), random(4, dtype, 333)];
        let bytes = inputs[0].len();
        for (post, divisor) in [(1.0, 1), (1.0, 2), (0.7, 3)] {
            let finish = Finish { divisor, post };
            let want = oracle::reduce_all(op, dtype, &inputs, 1.0, post, divisor, Order::Tree);
            for level in levels() {
                set_level(level).unwrap();
                // Places 0 and 1 are the operands.
                for (to, back) in
                    [(0, 0), (1, 1), (2, 2), (0, 1), (1, 0), (2, 0), (2, 1), (0, 2), (1, 2), (2, 3)]
                {
                    let [a, b] = inputs.clone();
                    let mut places = [a, b, vec![0; bytes], vec![0; bytes]];
                    let at = places.each_mut().map(|place| place.as_mut_ptr());
                    // SAFETY: each place has so many bytes, and is an operand or apart from both.
                    unsafe { reduce_pair(reduction, (at[to], at[back]), at[0], at[1], bytes, finish) };
                    for place in [to, back] {
                        let words = || format!("{reduction:?} at {level} into {to} and {back}, {finish:?}");
                        assert_same(dtype, &places[place], &want, words);
                    }
                }
            }
        }
    }
}

#[test]
fn reduce_many_is_the_canonical_tree() {
    for reduction in reductions() {
        let Reduction { dtype, op } = reduction;
        for n in [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 16, 23, 33] {
            // More than one block of accumulators, and a part of one.
            let inputs: Vec<Vec<u8>> = (0..n).map(|i| random(100 + i, dtype, 275)).collect();
            for (pre, post, divisor) in [(1.0, 1.0, 1), (1.0, 1.0, n as u32), (0.37, 1.7, n as u32)] {
                let finish = Finish { divisor, post };
                let want = oracle::reduce_all(op, dtype, &inputs, pre, post, divisor, Order::Tree);
                for level in levels() {
                    let got = reduce_many_at(level, reduction, &inputs, pre, finish, &[1, 0, 3]);
                    assert_same(dtype, &got, &want, || {
                        format!("{reduction:?} of {n} at {level}, {finish:?}")
                    });
                }
            }
        }
    }
}

#[test]
fn two_operands_without_scale_take_the_short_way_to_the_same_bits() {
    for reduction in reductions() {
        let (a, b) = edge_pairs(reduction.dtype);
        let none = Finish { divisor: 1, post: 1.0 };
        let long = reduce_many_at(level(), reduction, &[a.clone(), b.clone()], 1.0, none, &[0, 0]);
        let short = placed(a.len(), &[&a, &b], &[0, 0], |dst, srcs| {
            // SAFETY: all hold `a.len()` bytes and are disjoint.
            unsafe { reduce_many(reduction, dst, srcs, a.len(), 1.0, none) }
        });
        assert_same(reduction.dtype, &short, &long, || format!("{reduction:?}"));
    }
}

#[test]
fn scale_and_finish_of_every_type() {
    for &dtype in DType::ALL {
        let (mut values, _) = edge_pairs(dtype);
        values.extend(random(6, dtype, 300));
        for level in levels() {
            for factor in [0.5, -1.5, 0.0, 3.0, 1e30, -1e300, f64::NAN, f64::INFINITY, 1.0 / 3.0] {
                let want = oracle::scale(dtype, &values, factor);
                let got = placed(values.len(), &[&values], &[3, 5], |dst, srcs| {
                    // SAFETY: both hold as many bytes and are disjoint.
                    unsafe { table::scale(level, dtype, dst, srcs[0], values.len(), factor) }
                });
                assert_same(dtype, &got, &want, || format!("{dtype} times {factor} at {level}"));
                let mut inside = values.clone();
                let pointer = inside.as_mut_ptr();
                // SAFETY: one vector, in place.
                unsafe { table::scale(level, dtype, pointer, pointer, values.len(), factor) };
                assert_same(dtype, &inside, &want, || format!("{dtype} times {factor} in place at {level}"));
            }
            for (divisor, post) in [
                (1, 1.0),
                (2, 1.0),
                (3, 1.0),
                (7, 1.0),
                (256, 1.0),
                (65_536, 1.0),
                (u32::MAX, 1.0),
                (1 << 31, 1.0),
                (3, 0.7),
                (1, -2.5),
            ] {
                let last = Finish { divisor, post };
                let want = oracle::finish(dtype, &values, post, divisor);
                let mut got = values.clone();
                // SAFETY: one vector, in place.
                unsafe { table::finish(level, dtype, got.as_mut_ptr(), values.len(), last) };
                assert_same(dtype, &got, &want, || format!("{dtype} {last:?} at {level}"));
            }
        }
    }
}

#[test]
fn identities_change_nothing() {
    for reduction in reductions() {
        let Reduction { dtype, op } = reduction;
        let (x, _) = edge_pairs(dtype);
        let mut identities = vec![0xee; x.len()];
        // SAFETY: one vector.
        unsafe { identity(reduction, identities.as_mut_ptr(), x.len()) };
        let one = oracle::identity(op, dtype);
        assert!(identities.chunks(dtype.size()).all(|element| element == one), "{reduction:?}");
        // Infinities times 1 + 0i are NaN in one part; every other identity is exact.
        if dtype.is_complex() && op == ReduceOp::Product {
            continue;
        }
        // What it is combined with comes out unchanged, but for NaN bits and bool's bytes, which become canonical:
        // as from the smaller of a value and itself.
        let same = if dtype.is_complex() { DType::F64 } else { dtype };
        let same = if dtype == DType::C64 { DType::F32 } else { same };
        let want = oracle::reduce(ReduceOp::Min, same, &x, &x);
        let got = oracle::reduce(op, dtype, &x, &identities);
        assert_same(dtype, &got, &want, || format!("{reduction:?}"));
        for level in levels() {
            let kernel = reduce_at(level, reduction, &x, &identities, &[0, 0, 0]);
            assert_same(dtype, &kernel, &got, || format!("{reduction:?} at {level}"));
        }
    }
}

#[test]
fn adasum_of_every_float() {
    for dtype in REALS {
        for elements in [0, 1, 2, 7, 8, 9, 255, 256, 257, 1000] {
            // Every bit pattern, and tame ones of which the norms are finite.
            let tame: Vec<u8> = oracle::reduce(
                ReduceOp::Min,
                dtype,
                &random(8, dtype, elements),
                &random(9, dtype, elements),
            );
            for (a, b) in [
                (random(8, dtype, elements), random(9, dtype, elements)),
                (tame.clone(), oracle::scale(dtype, &tame, -0.3)),
                (vec![0; elements * dtype.size()], tame.clone()),
                (edge_pairs(dtype).0, edge_pairs(dtype).1),
            ] {
                let want = oracle::adasum(dtype, &a, &b);
                for level in levels() {
                    let got = placed(a.len(), &[&a, &b], &[2, 1, 0], |dst, srcs| {
                        // SAFETY: all hold `a.len()` bytes and are disjoint.
                        unsafe { table::combine(level, dtype, dst, srcs[0], srcs[1], a.len()) }
                    });
                    assert_same(dtype, &got, &want, || format!("{dtype} × {elements} at {level}"));
                    let (mut x, mut y) = (a.clone(), b.clone());
                    // SAFETY: `dst` is exactly one of the operands.
                    unsafe {
                        table::combine(level, dtype, x.as_mut_ptr(), x.as_ptr(), b.as_ptr(), a.len());
                        table::combine(level, dtype, y.as_mut_ptr(), a.as_ptr(), y.as_ptr(), a.len());
                    }
                    assert_same(dtype, &x, &want, || format!("{dtype} × {elements} at {level} into a"));
                    assert_same(dtype, &y, &want, || format!("{dtype} × {elements} at {level} into b"));
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn random_bits_at_every_level(
        which in any::<prop::sample::Index>(),
        seed in any::<u64>(),
        operands in 1usize..10,
        elements in 0usize..600,
        shifts in prop::collection::vec(0usize..16, 1..4),
        pre in prop_oneof![Just(1.0), -4.0f64..4.0],
        post in prop_oneof![Just(1.0), -4.0f64..4.0],
        divisor in 1u32..20,
    ) {
        let all: Vec<Reduction> = reductions().collect();
        let reduction = all[which.index(all.len())];
        let Reduction { dtype, op } = reduction;
        let inputs: Vec<Vec<u8>> =
            (0..operands).map(|i| random(seed.wrapping_add(i as u64), dtype, elements)).collect();
        let want = oracle::reduce_all(op, dtype, &inputs, pre, post, divisor, Order::Tree);
        let pair = inputs.first().zip(inputs.last()).map(|(a, b)| (a, b, oracle::reduce(op, dtype, a, b)));
        for level in levels() {
            let got = reduce_many_at(level, reduction, &inputs, pre, Finish { divisor, post }, &shifts);
            prop_assert_eq!(&got, &want, "{:?} at {}", reduction, level);
            if let Some((a, b, want)) = &pair {
                prop_assert_eq!(&reduce_at(level, reduction, a, b, &shifts), want);
            }
        }
    }
}

/// Regions of bytes, registered as one run.
struct Arena {
    regions: Vec<Vec<u8>>,
    memory: Memory,
    token: Token,
}

impl Arena {
    fn new(mut regions: Vec<Vec<u8>>) -> Arena {
        let mut memory = Memory::default();
        // SAFETY: the vectors live as long as the table, and are never resized.
        let run: RunId = memory
            .register(regions.iter_mut().map(|r| unsafe { Region::new(r.as_mut_ptr(), r.len() as u64) }));
        Arena { regions, memory, token: Token { run, window: 0, step: 0 } }
    }
    fn post(&self, order: &DeviceOrder) {
        let mut device = HostDevice::new();
        assert_eq!(device.post(self.token, order, &self.memory), Ok(true));
        let mut done = Vec::new();
        device.progress(&mut done).unwrap();
        assert!(done.is_empty(), "completed at once");
    }
}

fn range(pieces: &[(u32, u64, u64)]) -> PieceRange {
    let list: Arc<[Piece]> =
        pieces.iter().map(|&(region, offset, len)| Piece { region, offset, len }).collect();
    PieceRange { start: 0, end: list.len() as u32, list }
}

#[test]
fn orders_walk_pieces_cut_at_different_places() {
    let f32s = |seed| random(seed, DType::F32, 30);
    let (a, b, c) = (f32s(1), f32s(2), f32s(3));
    let arena = Arena::new(vec![vec![0; 120], a.clone(), b.clone(), c.clone(), vec![0; 60]]);
    let dst = range(&[(0, 40, 80), (0, 0, 40)]);
    let result = |arena: &Arena| [&arena.regions[0][40..], &arena.regions[0][..40]].concat();
    let whole = |region| range(&[(region, 0, 120)]);
    let cut = range(&[(2, 0, 4), (2, 4, 60), (2, 64, 56)]);
    let reduction = Reduction { dtype: DType::F32, op: ReduceOp::Sum };

    arena.post(&DeviceOrder::Copy { dst: dst.clone(), src: cut.clone() });
    assert_eq!(result(&arena), b);
    arena.post(&DeviceOrder::Scale { dst: dst.clone(), src: cut.clone(), dtype: DType::F32, factor: 0.1 });
    assert_eq!(result(&arena), oracle::scale(DType::F32, &b, 0.1));
    arena.post(&DeviceOrder::Reduce { dst: dst.clone(), a: whole(1), b: cut.clone(), reduction });
    assert_eq!(result(&arena), oracle::reduce(ReduceOp::Sum, DType::F32, &a, &b));
    let finish = Finish { divisor: 3, post: 1.0 };
    arena.post(&DeviceOrder::Finish { dst: dst.clone(), dtype: DType::F32, finish });
    let sum = oracle::reduce(ReduceOp::Sum, DType::F32, &a, &b);
    assert_eq!(result(&arena), oracle::finish(DType::F32, &sum, 1.0, 3));
    let srcs = vec![whole(1), cut.clone(), range(&[(3, 0, 44), (3, 44, 76)])];
    arena.post(&DeviceOrder::ReduceMany { dst: dst.clone(), srcs, reduction, pre: 0.3, finish });
    let inputs = [a.clone(), b.clone(), c];
    assert_eq!(
        result(&arena),
        oracle::reduce_all(ReduceOp::Average, DType::F32, &inputs, 0.3, 1.0, 3, Order::Tree)
    );
    arena.post(&DeviceOrder::Identity { dst, reduction });
    assert_eq!(result(&arena), (-0.0f32).to_ne_bytes().repeat(30));
    // Adasum: piece by piece, each a tensor of its own.
    let tensors = |region| range(&[(region, 0, 48), (region, 48, 72)]);
    arena.post(&DeviceOrder::Combine { dst: tensors(0), a: tensors(1), b: tensors(2), dtype: DType::F32 });
    let first = oracle::adasum(DType::F32, &a[..48], &b[..48]);
    let second = oracle::adasum(DType::F32, &a[48..], &b[48..]);
    assert_eq!(arena.regions[0], [first, second].concat());
    // An empty order is no order.
    arena.post(&DeviceOrder::Copy { dst: range(&[]), src: range(&[]) });
}

#[test]
#[should_panic(expected = "operands hold equally many bytes")]
fn operands_of_unequal_length_are_caught() {
    let arena = Arena::new(vec![vec![0; 16], vec![0; 16]]);
    arena.post(&DeviceOrder::Copy { dst: range(&[(0, 0, 8)]), src: range(&[(1, 0, 12)]) });
}

#[test]
#[should_panic(expected = "a piece holds whole elements")]
fn a_piece_of_a_part_of_an_element_is_caught() {
    let arena = Arena::new(vec![vec![0; 16], vec![0; 16]]);
    let (dst, src) = (range(&[(0, 0, 6)]), range(&[(1, 0, 6)]));
    arena.post(&DeviceOrder::Scale { dst, src, dtype: DType::F32, factor: 2.0 });
}

#[test]
fn what_types_refuse_the_table_has_not() {
    for &dtype in DType::ALL {
        for &op in ReduceOp::ALL {
            let reduction = Reduction { dtype, op };
            let mut bytes = [0u8; 16];
            let pointer = bytes.as_mut_ptr();
            // SAFETY: 16 bytes, in place.
            let run = || unsafe {
                table::reduce(
                    Level::Baseline,
                    reduction,
                    (pointer, pointer),
                    pointer,
                    pointer,
                    16,
                    Finish::NOTHING,
                )
            };
            let refused = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err();
            assert_eq!(refused, op == ReduceOp::Adasum || op.accepts(dtype).is_err(), "{reduction:?}");
        }
    }
}
