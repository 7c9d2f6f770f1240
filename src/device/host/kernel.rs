//! Loops over many values. Each is generic over the element, the operation and the instructions, always
//! inlined, and compiled once per SIMD level by [`super::table`].
//!
//! Pointers may be unaligned. Operands either are the very same memory or do not overlap, which is why every
//! loop over two operands has a form in place: the compiler tests at run time for overlap before it uses
//! vectors, and finds it in `dst == a` unless both have one name.

use super::half::{BF16, F16, Isa, LANES, VectorF16};
use super::number::{Bool, Complex, Element, Op, Wide};
use crate::limits::RANKS_MAX;
use std::mem::MaybeUninit;

/// The loops that a type of element may carry out in its own way.
///
/// # Safety
/// Of every method: `count` elements must lie at each pointer, `dst` may be written, and `dst` is either
/// exactly one of the sources or overlaps none. The processor must have the
/// instructions of the element, where it names any.
pub(super) trait Loops: Element {
    /// `dst[i] = back[i] = f(a[i], b[i])`, where `f` commutes.
    #[inline(always)]
    unsafe fn zip(
        (dst, back): (*mut Self, *mut Self),
        a: *const Self,
        b: *const Self,
        count: usize,
        f: impl Fn(Self::Wide, Self::Wide) -> Self::Wide,
    ) {
        // SAFETY: the caller's promise; `i` stays below `count`.
        unsafe {
            zip_raw((dst, back), a, b, count, |x: Self, y: Self| Self::narrow(f(x.widen(), y.widen())));
        }
    }

    /// `dst[i] = f(src[i])`.
    #[inline(always)]
    unsafe fn map(dst: *mut Self, src: *const Self, count: usize, f: impl Fn(Self::Wide) -> Self::Wide) {
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
    unsafe fn widen_into(
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
    unsafe fn fold_into(
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
    unsafe fn narrow_from(
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

plain_loops!(u8, i8, u16, i16, u32, i32, u64, i64, f32, f64, Bool, Complex<f32>, Complex<f64>, F16);

/// `dst[i] = back[i] = f(a[i], b[i])` where `f` commutes. `back` is `dst` where the result goes nowhere else. Forms for a
/// `dst` that is an operand and for one that is not, each with and without a `back` that is the other operand: two ranks
/// leave the result where both operands lay, and a pass for that alone would cost half as much again.
///
/// # Safety
/// As for [`Loops`]; `back` is `dst`, or an operand that `dst` is not, or overlaps nothing.
#[inline(always)]
unsafe fn zip_raw<T: Copy>(
    (dst, back): (*mut T, *mut T),
    a: *const T,
    b: *const T,
    count: usize,
    f: impl Fn(T, T) -> T,
) {
    let is = |to: *mut T, operand: *const T| to.cast_const() == operand;
    let (a, b) = if is(dst, b) || back != dst && is(back, a) { (b, a) } else { (a, b) };
    // SAFETY: the caller's promise; `i` stays below `count`.
    unsafe {
        match (is(dst, a), back != dst && is(back, b)) {
            (true, true) => {
                for i in 0..count {
                    let value = f(dst.add(i).read_unaligned(), back.add(i).read_unaligned());
                    dst.add(i).write_unaligned(value);
                    back.add(i).write_unaligned(value);
                }
            }
            (false, true) => {
                for i in 0..count {
                    let value = f(a.add(i).read_unaligned(), back.add(i).read_unaligned());
                    dst.add(i).write_unaligned(value);
                    back.add(i).write_unaligned(value);
                }
            }
            (true, false) => {
                for i in 0..count {
                    dst.add(i).write_unaligned(f(dst.add(i).read_unaligned(), b.add(i).read_unaligned()));
                }
            }
            (false, false) => {
                for i in 0..count {
                    dst.add(i).write_unaligned(f(a.add(i).read_unaligned(), b.add(i).read_unaligned()));
                }
            }
        }
        if back != dst && !is(back, b) {
            back.copy_from_nonoverlapping(dst, count);
        }
    }
}

impl Loops for BF16 {
    /// Two at a time in one 32-bit word, each in its own half: no value changes its lane, which is twice as
    /// fast as widening 16-bit lanes to 32 bits and back.
    #[inline(always)]
    unsafe fn zip(
        (dst, back): (*mut BF16, *mut BF16),
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
            zip_raw((dst.cast::<u32>(), back.cast()), a.cast(), b.cast(), count / 2, pair);
            if count % 2 == 1 {
                let i = count - 1;
                let x = a.add(i).read_unaligned().widen();
                let y = b.add(i).read_unaligned().widen();
                let value = BF16::narrow(f(x, y));
                dst.add(i).write_unaligned(value);
                back.add(i).write_unaligned(value);
            }
        }
    }
}

/// [`LANES`] halves as f32; those beyond `some` are 0.
///
/// # Safety
/// `some` halves (at most [`LANES`]) must lie at `src`, and the processor must have the instructions.
#[inline(always)]
unsafe fn load<I: Isa>(src: *const VectorF16<I>, some: usize) -> [f32; LANES] {
    // SAFETY: the caller's promise; the array is ours.
    unsafe {
        if some == LANES {
            return I::widen(src.cast::<[u16; LANES]>().read_unaligned());
        }
        let mut halves = [0; LANES];
        src.cast::<u8>().copy_to_nonoverlapping(halves.as_mut_ptr().cast(), 2 * some);
        I::widen(halves)
    }
}

/// Rounds and writes the first `some` of [`LANES`] values.
///
/// # Safety
/// `some` halves (at most [`LANES`]) may be written at `dst`, and the processor must have the instructions.
#[inline(always)]
unsafe fn store<I: Isa>(dst: *mut VectorF16<I>, wide: [f32; LANES], some: usize) {
    // SAFETY: the caller's promise; the array is ours.
    unsafe {
        let halves = I::narrow(wide);
        if some == LANES {
            return dst.cast::<[u16; LANES]>().write_unaligned(halves);
        }
        dst.cast::<u8>().copy_from_nonoverlapping(halves.as_ptr().cast(), 2 * some);
    }
}

/// Runs the body for each whole group of [`LANES`] and then for what remains, with the group's start and
/// length. A macro and not a function of a closure, because a closure has no target features of its own: the
/// intrinsics in it would stay calls.
macro_rules! by_lanes {
    ($count:expr, |$i:ident, $some:ident| $body:expr) => {
        let whole = $count - $count % LANES;
        let mut $i = 0;
        while $i < whole {
            let $some = LANES;
            $body
            $i += LANES;
        }
        if $i < $count {
            let $some = $count - $i;
            $body
        }
    };
}

/// In groups of [`LANES`], each read wholly before it is written, so that overlap does not matter.
impl<I: Isa> Loops for VectorF16<I> {
    #[inline(always)]
    unsafe fn zip(
        (dst, back): (*mut VectorF16<I>, *mut VectorF16<I>),
        a: *const VectorF16<I>,
        b: *const VectorF16<I>,
        count: usize,
        f: impl Fn(f32, f32) -> f32,
    ) {
        // SAFETY: the caller's promise; each group lies within `count`.
        by_lanes!(count, |i, some| unsafe {
            let (x, y) = (load::<I>(a.add(i), some), load::<I>(b.add(i), some));
            let mut sums = [0.0; LANES];
            for lane in 0..LANES {
                sums[lane] = f(x[lane], y[lane]);
            }
            store::<I>(dst.add(i), sums, some);
            if back != dst {
                store::<I>(back.add(i), sums, some);
            }
        });
    }

    #[inline(always)]
    unsafe fn map(dst: *mut VectorF16<I>, src: *const VectorF16<I>, count: usize, f: impl Fn(f32) -> f32) {
        // SAFETY: the caller's promise; each group lies within `count`.
        by_lanes!(count, |i, some| unsafe {
            let mut x = load::<I>(src.add(i), some);
            for value in &mut x {
                *value = f(*value);
            }
            store::<I>(dst.add(i), x, some);
        });
    }

    #[inline(always)]
    unsafe fn widen_into(acc: *mut f32, src: *const VectorF16<I>, count: usize, f: impl Fn(f32) -> f32) {
        // SAFETY: the caller's promise; each group lies within `count`.
        by_lanes!(count, |i, some| unsafe {
            let mut x = load::<I>(src.add(i), some);
            for value in &mut x {
                *value = f(*value);
            }
            x.as_ptr().copy_to_nonoverlapping(acc.add(i), some);
        });
    }

    #[inline(always)]
    unsafe fn fold_into(acc: *mut f32, src: *const VectorF16<I>, count: usize, f: impl Fn(f32, f32) -> f32) {
        // SAFETY: the caller's promise; each group lies within `count`.
        by_lanes!(count, |i, some| unsafe {
            let x = load::<I>(src.add(i), some);
            for (lane, &value) in x.iter().enumerate().take(some) {
                acc.add(i + lane).write(f(acc.add(i + lane).read(), value));
            }
        });
    }

    #[inline(always)]
    unsafe fn narrow_from(dst: *mut VectorF16<I>, acc: *const f32, count: usize, f: impl Fn(f32) -> f32) {
        // SAFETY: the caller's promise; each group lies within `count`.
        by_lanes!(count, |i, some| unsafe {
            let mut x = [0.0; LANES];
            acc.add(i).copy_to_nonoverlapping(x.as_mut_ptr(), some);
            for value in &mut x {
                *value = f(*value);
            }
            store::<I>(dst.add(i), x, some);
        });
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

/// `dst = back = finish(a ⊕ b)`; `back` is `dst` where the result goes nowhere else.
///
/// # Safety
/// As for [`zip_raw`].
#[inline(always)]
pub(super) unsafe fn reduce<E: Loops, O: Op<E::Wide>>(
    to: (*mut E, *mut E),
    a: *const E,
    b: *const E,
    count: usize,
    finish: crate::device::Finish,
) {
    // SAFETY: the caller's promise. Every operation of the table commutes.
    unsafe {
        match Last::new::<E::Wide>(finish) {
            Last::Nothing => E::zip(to, a, b, count, |x, y| O::combine(x, y)),
            Last::Multiply(factor) => E::zip(to, a, b, count, |x, y| O::combine(x, y).scale(factor)),
            _ => unreachable!("integers are divided by reduce_many"),
        }
    }
}

/// `dst = src * factor`.
///
/// # Safety
/// As for [`Loops`].
#[inline(always)]
pub(super) unsafe fn scale<E: Loops>(dst: *mut E, src: *const E, count: usize, factor: f64) {
    // SAFETY: the caller's promise.
    unsafe { E::map(dst, src, count, |x| x.scale(factor)) };
}

/// `dst = dst * post / divisor`.
///
/// # Safety
/// As for [`Loops`].
#[inline(always)]
pub(super) unsafe fn finish<E: Loops>(dst: *mut E, count: usize, finish: crate::device::Finish) {
    // SAFETY: the caller's promise.
    unsafe {
        match Last::new::<E::Wide>(finish) {
            Last::Nothing => {}
            Last::Multiply(factor) => E::map(dst, dst, count, |x| x.scale(factor)),
            Last::Divide(divisor) => E::map(dst, dst, count, |x| x.divide(divisor)),
            Last::Shift(bits) => E::map(dst, dst, count, |x| x.shift(bits)),
            Last::MultiplyDivide(post, divisor) => {
                E::map(dst, dst, count, |x| x.multiply_divide(post, divisor));
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
pub(super) const BLOCK: usize = 256;
/// Accumulators in use at one time: one per level of the tree.
const DEPTH: usize = RANKS_MAX.ilog2() as usize + 1;

/// The canonical tree over `srcs`, prescaled, finished and rounded once.
///
/// # Safety
/// As for [`Loops`], for each of `srcs`.
#[inline(always)]
pub(super) unsafe fn reduce_many<E: Loops, O: Op<E::Wide>>(
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
            reduce_block::<E, O>(dst.add(start), srcs, start, some, pre, last);
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
unsafe fn reduce_block<E: Loops, O: Op<E::Wide>>(
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
                    E::widen_into(acc, src, some, |x| x);
                } else {
                    E::widen_into(acc, src, some, |x| x.scale(pre));
                }
                continue;
            }
            let acc = stack[top - 1].as_mut_ptr().cast();
            if pre == 1.0 {
                E::fold_into(acc, src, some, |x, y| O::combine(x, y));
            } else {
                E::fold_into(acc, src, some, |x, y| O::combine(x, y.scale(pre)));
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
            Last::Nothing => E::narrow_from(dst, acc, some, |x| x),
            Last::Multiply(factor) => E::narrow_from(dst, acc, some, |x| x.scale(factor)),
            Last::Divide(divisor) => E::narrow_from(dst, acc, some, |x| x.divide(divisor)),
            Last::Shift(bits) => E::narrow_from(dst, acc, some, |x| x.shift(bits)),
            Last::MultiplyDivide(post, divisor) => {
                E::narrow_from(dst, acc, some, |x| x.multiply_divide(post, divisor));
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
