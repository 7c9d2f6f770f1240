//! Adasum of one tensor: scalar products first, then the weighted sum.

use super::kernel::{BLOCK, Loops};
use super::number::Real;
use std::mem::MaybeUninit;

/// Elements whose products are summed before they enter the tree.
const CHUNK: usize = 4 * BLOCK;
/// Partial sums of a chunk: element `i` always goes to sum `i % 8`, whatever the vectors' width.
const PARTS: usize = 8;
/// Levels of the tree over all chunks of the longest tensor.
const LEVELS: usize = 64;

/// Adasum of two whole tensors (Maleki et al., MLSys 2021):
/// `(1 - a·b / 2|a|²) a + (1 - a·b / 2|b|²) b`.
///
/// # Safety
/// As for [`Loops`].
#[inline(always)]
pub(super) unsafe fn combine<E: Loops + Real>(dst: *mut E, a: *const E, b: *const E, count: usize) {
    // Here, because the factors must change places with the tensors: `zip` would exchange only the latter.
    let (a, b) = if dst.cast_const() == b { (b, a) } else { (a, b) };
    // SAFETY: the caller's promise.
    unsafe {
        let [dot, a_norm, b_norm] = products::<E>(a, b, count);
        let by_a = share(dot, a_norm);
        let by_b = share(dot, b_norm);
        E::zip((dst, dst), a, b, count, |x, y| E::blend(x, by_a, y, by_b));
    }
}

/// A tensor's factor. One whose norm is (almost) nothing is added as it is.
fn share(dot: f64, norm: f64) -> f64 {
    if norm >= f64::MIN_POSITIVE.sqrt() { 1.0 - dot / norm * 0.5 } else { 1.0 }
}

/// `a·b`, `a·a` and `b·b`, in f64 and in an order that depends on nothing but `count`: the partial sums of all
/// chunks are the leaves of one canonical tree, so that a device with thousands of threads can keep to the
/// same order (`kernels/adasum.cu`).
///
/// # Safety
/// As for [`Loops`].
#[inline(always)]
unsafe fn products<E: Loops + Real>(a: *const E, b: *const E, count: usize) -> [f64; 3] {
    // By binary counting: after chunk `i` as many sums are merged as `i` ends in ones.
    let mut levels = [[0.0f64; 3]; LEVELS];
    let mut top = 0;
    for (i, start) in (0..count).step_by(CHUNK).enumerate() {
        // SAFETY: the caller's promise; the chunk lies within `count`.
        let mut sum = unsafe { chunk::<E>(a.add(start), b.add(start), CHUNK.min(count - start)) };
        for _ in 0..i.trailing_ones() {
            top -= 1;
            sum = add(levels[top], sum);
        }
        levels[top] = sum;
        top += 1;
    }
    levels[..top].iter().copied().rev().reduce(|right, left| add(left, right)).unwrap_or_default()
}

#[inline(always)]
fn add(a: [f64; 3], b: [f64; 3]) -> [f64; 3] {
    [a[0] + b[0], a[1] + b[1], a[2] + b[2]]
}

/// The products of one chunk.
///
/// # Safety
/// As for [`Loops`].
#[inline(always)]
unsafe fn chunk<E: Loops + Real>(a: *const E, b: *const E, count: usize) -> [f64; 3] {
    let mut x = [const { MaybeUninit::<E::Wide>::uninit() }; BLOCK];
    let mut y = [const { MaybeUninit::<E::Wide>::uninit() }; BLOCK];
    let mut parts = [[0.0f64; PARTS]; 3];
    let mut start = 0;
    while start < count {
        let some = BLOCK.min(count - start);
        // SAFETY: the caller's promise; `some` values of each buffer are written, and then read.
        unsafe {
            E::widen_into(x.as_mut_ptr().cast(), a.add(start), some, |x| x);
            E::widen_into(y.as_mut_ptr().cast(), b.add(start), some, |x| x);
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
    parts.map(|p| ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7])))
}
