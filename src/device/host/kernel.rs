//! Loops over many values. Each is generic over the element, the operation and the instructions, always
//! inlined, and compiled once per SIMD level by [`super::table`].
//!
//! Pointers may be unaligned. Operands either are the very same memory or do not overlap, which is why every
//! loop over two operands has a form in place: the compiler tests at run time for overlap before it uses
//! vectors, and finds it in `dst == a` unless both have one name.

use super::half::{BF16, F16, Isa, LANES};
use super::number::{Bool, Complex, Element, Op, Real, Wide};
use crate::limits::RANKS_MAX;
use std::mem::MaybeUninit;

/// The loops that a type of element may carry out in its own way.
///
/// # Safety
/// Of every method: `count` elements must lie at each pointer, `dst` may be written, and `dst` is either
/// exactly one of the sources or overlaps none. The processor must have the instructions of `I`.
pub(super) trait Loops: Element {
    /// `dst[i] = f(a[i], b[i])`, where `f` commutes.
    #[inline(always)]
    unsafe fn zip<I: Isa>(
        dst: *mut Self,
        a: *const Self,
        b: *const Self,
        count: usize,
        f: impl Fn(Self::Wide, Self::Wide) -> Self::Wide,
    ) {
        // SAFETY: the caller's promise; `i` stays below `count`.
        unsafe {
            zip_raw(dst, a, b, count, |x: Self, y: Self| Self::narrow(f(x.widen(), y.widen())));
        }
    }

    /// `dst[i] = f(src[i])`.
    #[inline(always)]
    unsafe fn map<I: Isa>(
        dst: *mut Self,
        src: *const Self,
        count: usize,
        f: impl Fn(Self::Wide) -> Self::Wide,
    ) {
        let g = |x: Self| Self::narrow(f(x.widen()));
        // SAFETY: the caller's promise; `i` stays below `count`.
        unsafe {
            if dst.cast_const() == src {
                for i in 0..count {
                    dst.add(i).write_unaligned(g(dst.add(i).read_unaligned()));
                }
            } else {
                for i in 0..count {
                    dst.add(i).write_unaligned(g(src.add(i).read_unaligned()));
                }
            }
        }
    }

    /// `acc[i] = f(src[i])`, for the first operand of an accumulation.
    #[inline(always)]
    unsafe fn widen_into<I: Isa>(
        acc: *mut Self::Wide,
        src: *const Self,
        count: usize,
        f: impl Fn(Self::Wide) -> Self::Wide,
    ) {
        // SAFETY: the caller's promise; accumulators never overlap what is outside.
        unsafe {
            for i in 0..count {
                acc.add(i).write(f(src.add(i).read_unaligned().widen()));
            }
        }
    }

    /// `acc[i] = f(acc[i], src[i])`.
    #[inline(always)]
    unsafe fn fold_into<I: Isa>(
        acc: *mut Self::Wide,
        src: *const Self,
        count: usize,
        f: impl Fn(Self::Wide, Self::Wide) -> Self::Wide,
    ) {
        // SAFETY: as in `widen_into`.
        unsafe {
            for i in 0..count {
                acc.add(i).write(f(acc.add(i).read(), src.add(i).read_unaligned().widen()));
            }
        }
    }

    /// `dst[i] = f(acc[i])`, rounded.
    #[inline(always)]
    unsafe fn narrow_from<I: Isa>(
        dst: *mut Self,
        acc: *const Self::Wide,
        count: usize,
        f: impl Fn(Self::Wide) -> Self::Wide,
    ) {
        // SAFETY: as in `widen_into`.
        unsafe {
            for i in 0..count {
                dst.add(i).write_unaligned(Self::narrow(f(acc.add(i).read())));
            }
        }
    }
}

macro_rules! plain_loops {
    ($($t:ty),*) => { $(impl Loops for $t {})* };
}

plain_loops!(u8, i8, u16, i16, u32, i32, u64, i64, f32, f64, Bool, Complex<f32>, Complex<f64>);

/// `dst[i] = f(a[i], b[i])` where `f` commutes; a form in place and one that is not.
///
/// # Safety
/// As for [`Loops`].
#[inline(always)]
unsafe fn zip_raw<T: Copy>(dst: *mut T, a: *const T, b: *const T, count: usize, f: impl Fn(T, T) -> T) {
    let (a, b) = if dst.cast_const() == b { (b, a) } else { (a, b) };
    // SAFETY: the caller's promise; `i` stays below `count`.
    unsafe {
        if dst.cast_const() == a {
            for i in 0..count {
                dst.add(i).write_unaligned(f(dst.add(i).read_unaligned(), b.add(i).read_unaligned()));
            }
        } else {
            for i in 0..count {
                dst.add(i).write_unaligned(f(a.add(i).read_unaligned(), b.add(i).read_unaligned()));
            }
        }
    }
}

impl Loops for BF16 {
    /// Two at a time in one 32-bit word, each in its own half: no value changes its lane, which is twice as
    /// fast as widening 16-bit lanes to 32 bits and back.
    #[inline(always)]
    unsafe fn zip<I: Isa>(
        dst: *mut BF16,
        a: *const BF16,
        b: *const BF16,
        count: usize,
        f: impl Fn(f32, f32) -> f32,
    ) {
        const HIGH: u32 = 0xffff_0000;
        let pair = |x: u32, y: u32| {
            let low = BF16::round(f(f32::from_bits(x << 16), f32::from_bits(y << 16)));
            let high = BF16::round(f(f32::from_bits(x & HIGH), f32::from_bits(y & HIGH)));
            low >> 16 | high & HIGH
        };
        // SAFETY: the caller's promise; `count / 2` words and the odd element cover `count` elements.
        unsafe {
            zip_raw(dst.cast::<u32>(), a.cast(), b.cast(), count / 2, pair);
            if count % 2 == 1 {
                let i = count - 1;
                let x = a.add(i).read_unaligned().widen();
                let y = b.add(i).read_unaligned().widen();
                dst.add(i).write_unaligned(BF16::narrow(f(x, y)));
            }
        }
    }
}

/// Reads up to [`LANES`] halves; those beyond `count` are 0.
///
/// # Safety
/// `count` halves must lie at `src`.
#[inline(always)]
unsafe fn load_some(src: *const F16, count: usize) -> [u16; LANES] {
    let mut halves = [0; LANES];
    // SAFETY: `count` is at most LANES, and the array is ours.
    unsafe { src.cast::<u8>().copy_to_nonoverlapping(halves.as_mut_ptr().cast(), 2 * count.min(LANES)) };
    halves
}

/// Writes the first `count` of [`LANES`] halves.
///
/// # Safety
/// `count` halves may be written at `dst`.
#[inline(always)]
unsafe fn store_some(dst: *mut F16, halves: [u16; LANES], count: usize) {
    // SAFETY: `count` is at most LANES, and the array is ours.
    unsafe { dst.cast::<u8>().copy_from_nonoverlapping(halves.as_ptr().cast(), 2 * count.min(LANES)) };
}

/// Calls `full` with the index of each whole group of [`LANES`] and `rest` with what remains.
#[inline(always)]
fn by_lanes(count: usize, full: impl Fn(usize), rest: impl Fn(usize, usize)) {
    let whole = count - count % LANES;
    let mut i = 0;
    while i < whole {
        full(i);
        i += LANES;
    }
    if whole < count {
        rest(whole, count - whole);
    }
}

/// In groups of [`LANES`], each read wholly before it is written, so that overlap does not matter.
impl Loops for F16 {
    #[inline(always)]
    unsafe fn zip<I: Isa>(
        dst: *mut F16,
        a: *const F16,
        b: *const F16,
        count: usize,
        f: impl Fn(f32, f32) -> f32,
    ) {
        // SAFETY: the caller has the instructions of `I`.
        let group = |x, y| unsafe {
            let (mut x, y) = (I::widen(x), I::widen(y));
            for lane in 0..LANES {
                x[lane] = f(x[lane], y[lane]);
            }
            I::narrow(x)
        };
        by_lanes(
            count,
            // SAFETY: the caller's promise; a whole group lies at `i`.
            |i| unsafe {
                let x = a.add(i).cast::<[u16; LANES]>().read_unaligned();
                let y = b.add(i).cast::<[u16; LANES]>().read_unaligned();
                dst.add(i).cast::<[u16; LANES]>().write_unaligned(group(x, y));
            },
            // SAFETY: the caller's promise; `some` elements lie at `i`.
            |i, some| unsafe {
                let halves = group(load_some(a.add(i), some), load_some(b.add(i), some));
                store_some(dst.add(i), halves, some);
            },
        );
    }

    #[inline(always)]
    unsafe fn map<I: Isa>(dst: *mut F16, src: *const F16, count: usize, f: impl Fn(f32) -> f32) {
        by_lanes(
            count,
            // SAFETY: the caller's promise; a whole group lies at `i`.
            |i| unsafe {
                let mut x = I::widen(src.add(i).cast::<[u16; LANES]>().read_unaligned());
                for value in &mut x {
                    *value = f(*value);
                }
                dst.add(i).cast::<[u16; LANES]>().write_unaligned(I::narrow(x));
            },
            // SAFETY: the caller's promise; `some` elements lie at `i`.
            |i, some| unsafe {
                let mut x = I::widen(load_some(src.add(i), some));
                for value in &mut x {
                    *value = f(*value);
                }
                store_some(dst.add(i), I::narrow(x), some);
            },
        );
    }

    #[inline(always)]
    unsafe fn widen_into<I: Isa>(acc: *mut f32, src: *const F16, count: usize, f: impl Fn(f32) -> f32) {
        by_lanes(
            count,
            // SAFETY: the caller's promise; a whole group lies at `i`.
            |i| unsafe {
                let x = I::widen(src.add(i).cast::<[u16; LANES]>().read_unaligned());
                for (lane, &value) in x.iter().enumerate() {
                    acc.add(i + lane).write(f(value));
                }
            },
            // SAFETY: the caller's promise; `some` elements lie at `i`.
            |i, some| unsafe {
                let x = I::widen(load_some(src.add(i), some));
                for (lane, &value) in x.iter().take(some).enumerate() {
                    acc.add(i + lane).write(f(value));
                }
            },
        );
    }

    #[inline(always)]
    unsafe fn fold_into<I: Isa>(acc: *mut f32, src: *const F16, count: usize, f: impl Fn(f32, f32) -> f32) {
        by_lanes(
            count,
            // SAFETY: the caller's promise; a whole group lies at `i`.
            |i| unsafe {
                let x = I::widen(src.add(i).cast::<[u16; LANES]>().read_unaligned());
                for (lane, &value) in x.iter().enumerate() {
                    acc.add(i + lane).write(f(acc.add(i + lane).read(), value));
                }
            },
            // SAFETY: the caller's promise; `some` elements lie at `i`.
            |i, some| unsafe {
                let x = I::widen(load_some(src.add(i), some));
                for (lane, &value) in x.iter().take(some).enumerate() {
                    acc.add(i + lane).write(f(acc.add(i + lane).read(), value));
                }
            },
        );
    }

    #[inline(always)]
    unsafe fn narrow_from<I: Isa>(dst: *mut F16, acc: *const f32, count: usize, f: impl Fn(f32) -> f32) {
        by_lanes(
            count,
            // SAFETY: the caller's promise; a whole group lies at `i`.
            |i| unsafe {
                let x: [f32; LANES] = std::array::from_fn(|lane| f(acc.add(i + lane).read()));
                dst.add(i).cast::<[u16; LANES]>().write_unaligned(I::narrow(x));
            },
            // SAFETY: the caller's promise; `some` elements lie at `i`.
            |i, some| unsafe {
                let mut x = [0.0; LANES];
                for (lane, value) in x.iter_mut().take(some).enumerate() {
                    *value = f(acc.add(i + lane).read());
                }
                store_some(dst.add(i), I::narrow(x), some);
            },
        );
    }
}

/// The last multiplication, made ready for the loops.
#[derive(Clone, Copy)]
enum Last {
    Nothing,
    Multiply(f64),
    Divide(u32),
    Shift(u32),
    MultiplyDivide(f64, f64),
}

impl Last {
    #[inline(always)]
    fn new<W: Wide>(finish: crate::device::Finish) -> Last {
        let crate::device::Finish { divisor, post } = finish;
        assert!(divisor > 0, "a reduction has at least one operand");
        if finish.is_identity() {
            Last::Nothing
        } else if !W::DIVIDES {
            Last::Multiply(post / f64::from(divisor))
        } else if post != 1.0 {
            Last::MultiplyDivide(post, f64::from(divisor))
        } else if divisor.is_power_of_two() {
            Last::Shift(divisor.ilog2())
        } else {
            Last::Divide(divisor)
        }
    }
}

/// `dst = a ⊕ b`.
///
/// # Safety
/// As for [`Loops`].
#[inline(always)]
pub(super) unsafe fn reduce<I: Isa, E: Loops, O: Op<E::Wide>>(
    dst: *mut E,
    a: *const E,
    b: *const E,
    count: usize,
) {
    // SAFETY: the caller's promise. Every operation of the table commutes.
    unsafe { E::zip::<I>(dst, a, b, count, |x, y| O::combine(x, y)) };
}

/// `dst = src * factor`.
///
/// # Safety
/// As for [`Loops`].
#[inline(always)]
pub(super) unsafe fn scale<I: Isa, E: Loops>(dst: *mut E, src: *const E, count: usize, factor: f64) {
    // SAFETY: the caller's promise.
    unsafe { E::map::<I>(dst, src, count, |x| x.scale(factor)) };
}

/// `dst = dst * post / divisor`.
///
/// # Safety
/// As for [`Loops`].
#[inline(always)]
pub(super) unsafe fn finish<I: Isa, E: Loops>(dst: *mut E, count: usize, finish: crate::device::Finish) {
    // SAFETY: the caller's promise.
    unsafe {
        match Last::new::<E::Wide>(finish) {
            Last::Nothing => {}
            Last::Multiply(factor) => E::map::<I>(dst, dst, count, |x| x.scale(factor)),
            Last::Divide(divisor) => E::map::<I>(dst, dst, count, |x| x.divide(divisor)),
            Last::Shift(bits) => E::map::<I>(dst, dst, count, |x| x.shift(bits)),
            Last::MultiplyDivide(post, divisor) => {
                E::map::<I>(dst, dst, count, |x| x.multiply_divide(post, divisor));
            }
        }
    }
}

/// `dst` = the identity of the operation.
///
/// # Safety
/// As for [`Loops`].
#[inline(always)]
pub(super) unsafe fn identity<E: Loops, O: Op<E::Wide>>(dst: *mut E, count: usize) {
    let identity = E::narrow(O::IDENTITY);
    for i in 0..count {
        // SAFETY: the caller's promise.
        unsafe { dst.add(i).write_unaligned(identity) };
    }
}

/// Elements that are accumulated together: small enough that the accumulators of several levels of the tree
/// stay in the first-level cache, large enough to hide the tree's bookkeeping.
const BLOCK: usize = 256;
/// Accumulators in use at one time: one per level of the tree.
const DEPTH: usize = RANKS_MAX.ilog2() as usize + 1;

/// The canonical tree over `srcs`, prescaled, finished and rounded once.
///
/// # Safety
/// As for [`Loops`], for each of `srcs`.
#[inline(always)]
pub(super) unsafe fn reduce_many<I: Isa, E: Loops, O: Op<E::Wide>>(
    dst: *mut E,
    srcs: &[*const u8],
    count: usize,
    pre: f64,
    finish: crate::device::Finish,
) {
    assert!(!srcs.is_empty() && srcs.len() <= RANKS_MAX, "a reduction has 1 to RANKS_MAX operands");
    let last = Last::new::<E::Wide>(finish);
    let mut start = 0;
    while start < count {
        let some = BLOCK.min(count - start);
        // SAFETY: the caller's promise; the block lies within `count`. A block is written after it has been
        // read from every source, so `dst` may be one of them.
        unsafe {
            reduce_block::<I, E, O>(dst.add(start), srcs, start, some, pre, last);
        }
        start += some;
    }
}

/// One block of [`reduce_many`], by binary counting: after operand `i` (odd), as many pairs of accumulators
/// are merged as `i` ends in ones. What remains at the end is merged from the right, which makes the tree
/// that splits at the largest power of two below the number of operands.
///
/// # Safety
/// As for [`reduce_many`].
#[inline(always)]
unsafe fn reduce_block<I: Isa, E: Loops, O: Op<E::Wide>>(
    dst: *mut E,
    srcs: &[*const u8],
    start: usize,
    some: usize,
    pre: f64,
    last: Last,
) {
    let mut stack = [const { MaybeUninit::<[E::Wide; BLOCK]>::uninit() }; DEPTH];
    let mut top = 0;
    for (i, src) in srcs.iter().enumerate() {
        // SAFETY: the caller's promise. The accumulators are ours, `some` of each up to `top` are initialised,
        // and `top` stays at most the number of ones in `i + 1`, which is at most DEPTH.
        unsafe {
            let src = src.cast::<E>().add(start);
            if i % 2 == 0 {
                let acc = stack[top].as_mut_ptr().cast();
                top += 1;
                if pre == 1.0 {
                    E::widen_into::<I>(acc, src, some, |x| x);
                } else {
                    E::widen_into::<I>(acc, src, some, |x| x.scale(pre));
                }
                continue;
            }
            let acc = stack[top - 1].as_mut_ptr().cast();
            if pre == 1.0 {
                E::fold_into::<I>(acc, src, some, |x, y| O::combine(x, y));
            } else {
                E::fold_into::<I>(acc, src, some, |x, y| O::combine(x, y.scale(pre)));
            }
            for _ in 1..i.trailing_ones() {
                merge::<E, O>(&mut stack, &mut top, some);
            }
        }
    }
    // SAFETY: as above.
    unsafe {
        while top > 1 {
            merge::<E, O>(&mut stack, &mut top, some);
        }
        let acc = stack[0].as_ptr().cast::<E::Wide>();
        match last {
            Last::Nothing => E::narrow_from::<I>(dst, acc, some, |x| x),
            Last::Multiply(factor) => E::narrow_from::<I>(dst, acc, some, |x| x.scale(factor)),
            Last::Divide(divisor) => E::narrow_from::<I>(dst, acc, some, |x| x.divide(divisor)),
            Last::Shift(bits) => E::narrow_from::<I>(dst, acc, some, |x| x.shift(bits)),
            Last::MultiplyDivide(post, divisor) => {
                E::narrow_from::<I>(dst, acc, some, |x| x.multiply_divide(post, divisor));
            }
        }
    }
}

/// Combines the two topmost accumulators.
///
/// # Safety
/// `some` values of each must be initialised.
#[inline(always)]
unsafe fn merge<E: Element, O: Op<E::Wide>>(
    stack: &mut [MaybeUninit<[E::Wide; BLOCK]>; DEPTH],
    top: &mut usize,
    some: usize,
) {
    *top -= 1;
    let (lower, upper) = stack.split_at_mut(*top);
    let acc = lower[*top - 1].as_mut_ptr().cast::<E::Wide>();
    let other = upper[0].as_ptr().cast::<E::Wide>();
    for i in 0..some.min(BLOCK) {
        // SAFETY: the caller's promise; two distinct arrays of BLOCK values.
        unsafe { acc.add(i).write(O::combine(acc.add(i).read(), other.add(i).read())) };
    }
}

/// Partial sums of a scalar product: element `i` always goes to sum `i % 8`, whatever the vectors' width.
const PARTS: usize = 8;

/// Adasum of two whole tensors (Maleki et al., MLSys 2021):
/// `(1 - a·b / 2|a|²) a + (1 - a·b / 2|b|²) b`.
///
/// # Safety
/// As for [`Loops`].
#[inline(always)]
pub(super) unsafe fn combine<I: Isa, E: Loops + Real>(dst: *mut E, a: *const E, b: *const E, count: usize) {
    // Here, because the factors must change places with the tensors: `zip` would exchange only the latter.
    let (a, b) = if dst.cast_const() == b { (b, a) } else { (a, b) };
    // SAFETY: the caller's promise.
    unsafe {
        let [dot, a_norm, b_norm] = products::<I, E>(a, b, count);
        let by_a = share(dot, a_norm);
        let by_b = share(dot, b_norm);
        E::zip::<I>(dst, a, b, count, |x, y| E::blend(x, by_a, y, by_b));
    }
}

/// A tensor's factor. One whose norm is (almost) nothing is added as it is.
fn share(dot: f64, norm: f64) -> f64 {
    if norm >= f64::MIN_POSITIVE.sqrt() { 1.0 - dot / norm * 0.5 } else { 1.0 }
}

/// `a·b`, `a·a` and `b·b`, in f64 and in an order that depends on nothing but `count`.
///
/// # Safety
/// As for [`Loops`].
#[inline(always)]
unsafe fn products<I: Isa, E: Loops + Real>(a: *const E, b: *const E, count: usize) -> [f64; 3] {
    let mut x = [const { MaybeUninit::<E::Wide>::uninit() }; BLOCK];
    let mut y = [const { MaybeUninit::<E::Wide>::uninit() }; BLOCK];
    let mut parts = [[0.0f64; PARTS]; 3];
    let mut start = 0;
    while start < count {
        let some = BLOCK.min(count - start);
        // SAFETY: the caller's promise; `some` values of each buffer are written, and then read.
        unsafe {
            E::widen_into::<I>(x.as_mut_ptr().cast(), a.add(start), some, |x| x);
            E::widen_into::<I>(y.as_mut_ptr().cast(), b.add(start), some, |x| x);
            let mut add = |i: usize, part: usize| {
                let (x, y) = (E::as_f64(x[i].assume_init()), E::as_f64(y[i].assume_init()));
                parts[0][part] += x * y;
                parts[1][part] += x * x;
                parts[2][part] += y * y;
            };
            let whole = some - some % PARTS;
            for i in (0..whole).step_by(PARTS) {
                for part in 0..PARTS {
                    add(i + part, part);
                }
            }
            for i in whole..some {
                add(i, i % PARTS);
            }
        }
        start += some;
    }
    parts.map(|p| ((p[0] + p[4]) + (p[2] + p[6])) + ((p[1] + p[5]) + (p[3] + p[7])))
}
