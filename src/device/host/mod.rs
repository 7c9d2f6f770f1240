//! Copies and reductions in ordinary memory.
//!
//! What a value becomes is in `number` and `half`, loops in `kernel` and `adasum`, which element carries out which
//! operation in `table`, and the reference that all of it is checked against in [`oracle`].
//!
//! # Numbers
//! - Integers wrap. Integer Average is floor division, exact for every value; with a postscale it is
//!   `floor(x as f64 * post / divisor)`. Integer scale is `floor(x as f64 * factor)`. What does not fit after
//!   scaling saturates (NaN becomes 0).
//! - f16, bf16, f32 and complex64 are combined and scaled in f32, f64 and complex128 in f64; factors are
//!   computed in f64 and rounded once to that width. 16-bit results are rounded once per order.
//! - A NaN that an order produces or passes on is the one canonical quiet NaN of its type, so its bits do not
//!   depend on the order of operands or on the instructions. Copies, and scales by 1, keep every bit.
//! - Min and Max: NaN propagates, -0 < +0.
//! - bool: any byte but 0 is true; results are 0 or 1. Sum and Max are *or*, Product and Min *and*; scaled by
//!   0 it is false, by anything else it stays.
//! - The identity of Sum is -0.0, which changes no value (+0.0 would turn -0.0 into +0.0).
//! - Prescaled integers are floored one by one before they are combined, so that a reduction over several
//!   steps and one in a single step agree.
//! - On x86-64 a thread that flushes subnormals or rounds otherwise than to nearest gets the same bits:
//!   kernels put its floating-point mode aside (`mode`).

mod adasum;
mod half;
mod kernel;
mod level;
mod mode;
mod number;
pub mod oracle;
mod stream;
mod table;
#[cfg(test)]
mod tests;
pub(super) mod walk;

use super::{Device, DeviceOrder, Finish, Reduction, Token};
use crate::error::Cause;
use crate::memory::Memory;
use crate::types::DType;
pub use level::{Level, available, level, set_level};
pub use stream::copy_streaming;
#[cfg(test)]
pub(super) use table::{elements, reals, reductions};
use walk::Position;

/// The device of ordinary memory. Every order is complete when [`Device::post`] returns.
#[derive(Default)]
pub struct HostDevice {
    /// Where in each source a reduction of many stands; kept for its capacity.
    positions: Vec<Position>,
    /// The addresses of one common run of all sources; empty between orders.
    sources: Vec<*const u8>,
}

// SAFETY: the addresses are only a buffer that is empty whenever nobody is inside `post`.
unsafe impl Send for HostDevice {}

impl HostDevice {
    /// A device.
    #[must_use]
    pub fn new() -> HostDevice {
        HostDevice::default()
    }

    /// [`DeviceOrder::ReduceMany`].
    fn reduce_many(&mut self, token: Token, order: &DeviceOrder, memory: &Memory) {
        let DeviceOrder::ReduceMany { dst, srcs, reduction, pre, finish } = order else { return };
        let run = token.run;
        self.positions.clear();
        self.positions.resize(srcs.len(), Position::default());
        let mut at = Position::default();
        let pieces = dst.pieces();
        while let Some(left) = at.left(pieces) {
            let mut len = left;
            for (src, position) in srcs.iter().zip(&self.positions) {
                let left = position.left(src.pieces()).expect("operands hold equally many bytes");
                len = len.min(left);
            }
            self.sources.clear();
            for (src, position) in srcs.iter().zip(&mut self.positions) {
                self.sources.push(position.take(src.pieces(), len, memory, run).cast_const());
            }
            let dst = at.take(pieces, len, memory, run);
            // SAFETY: `Memory` vouches for `len` bytes at each address; the schedule makes `dst` one of the
            // sources or disjoint from them.
            unsafe { reduce_many(*reduction, dst, &self.sources, len as usize, *pre, *finish) };
        }
        self.sources.clear();
        let finished = srcs.iter().zip(&self.positions).all(|(src, p)| p.left(src.pieces()).is_none());
        assert!(finished, "operands hold equally many bytes");
    }
}

impl Device for HostDevice {
    fn post(&mut self, token: Token, order: &DeviceOrder, memory: &Memory) -> Result<bool, Cause> {
        let run = token.run;
        // SAFETY (of every block below): `Memory` vouches for `len` bytes at each address that a walk gives;
        // the schedule makes spans that are written either equal to spans that are read or disjoint from them.
        match order {
            DeviceOrder::Copy { dst, src } => {
                walk::walk(memory, run, [dst, src], |[dst, src], len| {
                    // SAFETY: see above.
                    unsafe { copy(dst, src, len) }
                });
            }
            DeviceOrder::Scale { dst, src, dtype, factor } => {
                walk::walk(memory, run, [dst, src], |[dst, src], len| {
                    // SAFETY: see above.
                    unsafe { scale(*dtype, dst, src, len, *factor) }
                });
            }
            DeviceOrder::Reduce { dst, a, b, reduction } => {
                walk::walk(memory, run, [dst, a, b], |[dst, a, b], len| {
                    // SAFETY: see above.
                    unsafe { reduce(*reduction, dst, a, b, len) }
                });
            }
            DeviceOrder::ReduceMany { .. } => self.reduce_many(token, order, memory),
            DeviceOrder::Combine { dst, a, b, dtype } => {
                let tensors = [dst, a, b].map(|range| range.pieces().len());
                assert!(
                    tensors[0] == tensors[1] && tensors[0] == tensors[2],
                    "Adasum's operands are the same tensors"
                );
                for ((dst, a), b) in dst.pieces().iter().zip(a.pieces()).zip(b.pieces()) {
                    assert!(dst.len == a.len && dst.len == b.len, "Adasum's operands are whole tensors");
                    let [to, a, b] = [dst, a, b].map(|piece| memory.address(run, piece));
                    // SAFETY: see above.
                    unsafe { combine(*dtype, to, a, b, dst.len as usize) }
                }
            }
            DeviceOrder::Finish { dst, dtype, finish: last } => {
                walk::walk(memory, run, [dst], |[dst], len| {
                    // SAFETY: see above.
                    unsafe { finish(*dtype, dst, len, *last) }
                });
            }
            DeviceOrder::Identity { dst, reduction } => {
                walk::walk(memory, run, [dst], |[dst], len| {
                    // SAFETY: see above.
                    unsafe { identity(*reduction, dst, len) }
                });
            }
        }
        Ok(true)
    }

    fn progress(&mut self, _done: &mut Vec<Token>) -> Result<(), Cause> {
        Ok(())
    }
}

/// Copies `bytes` bytes; nothing is done where both are the same memory.
///
/// # Safety
/// `bytes` bytes must lie at both pointers, and those at `dst` may be written.
pub unsafe fn copy(dst: *mut u8, src: *const u8, bytes: usize) {
    if dst.cast_const() != src {
        // SAFETY: the caller's promise.
        unsafe { src.copy_to(dst, bytes) };
    }
}

/// `dst = a ⊕ b` by the level in use. Average combines as Sum.
///
/// # Safety
/// `bytes` bytes must lie at each pointer (unaligned is allowed), and those at `dst` may be written. `dst`
/// is exactly `a`, exactly `b`, or overlaps neither.
///
/// # Panics
/// When the operation is not defined for the type ([`crate::types::ReduceOp::accepts`]), is Adasum, or
/// `bytes` is no multiple of the element's size: submission has checked all that.
pub unsafe fn reduce(reduction: Reduction, dst: *mut u8, a: *const u8, b: *const u8, bytes: usize) {
    // SAFETY: the caller's promise; the level in use is one that the processor has.
    unsafe { table::reduce(level(), reduction, (dst, dst), a, b, bytes, Finish::NOTHING) };
}

/// `dst = back = (a ⊕ b) * post / divisor`, rounded once: what [`reduce_many`] gives for two operands.
///
/// # Safety
/// As for [`reduce`]; `back` is `dst`, or the operand that `dst` is not, or overlaps nothing.
///
/// # Panics
/// As [`reduce`].
pub unsafe fn reduce_pair(
    reduction: Reduction,
    (dst, back): (*mut u8, *mut u8),
    a: *const u8,
    b: *const u8,
    bytes: usize,
    finish: Finish,
) {
    // Integers are divided with care, which has its own loops.
    let fits = finish.is_identity() || reduction.dtype.is_float() || reduction.dtype.is_complex();
    // SAFETY: the caller's promise; the level in use is one that the processor has.
    unsafe {
        if fits {
            return table::reduce(level(), reduction, (dst, back), a, b, bytes, finish);
        }
        table::reduce_many(level(), reduction, dst, &[a, b], bytes, 1.0, finish);
        if back != dst {
            back.copy_from_nonoverlapping(dst, bytes);
        }
    }
}

/// `dst = src * factor`, rounded once; a copy where the factor is 1.
///
/// # Safety
/// `bytes` bytes must lie at both pointers, and those at `dst` may be written. `dst` is exactly `src` or does
/// not overlap it.
pub unsafe fn scale(dtype: DType, dst: *mut u8, src: *const u8, bytes: usize, factor: f64) {
    // SAFETY: the caller's promise; the level in use is one that the processor has.
    unsafe {
        if factor == 1.0 {
            copy(dst, src, bytes);
        } else {
            table::scale(level(), dtype, dst, src, bytes, factor);
        }
    }
}

/// `dst = dst * post / divisor`, rounded once (integers: floor); nothing is done where both are 1.
///
/// # Safety
/// `bytes` bytes at `dst` may be read and written.
pub unsafe fn finish(dtype: DType, dst: *mut u8, bytes: usize, finish: Finish) {
    if !finish.is_identity() {
        // SAFETY: the caller's promise; the level in use is one that the processor has.
        unsafe { table::finish(level(), dtype, dst, bytes, finish) };
    }
}

/// Fills `dst` with what changes nothing when combined: what a rank that has joined contributes.
///
/// # Safety
/// `bytes` bytes at `dst` may be written.
pub unsafe fn identity(reduction: Reduction, dst: *mut u8, bytes: usize) {
    // SAFETY: the caller's promise.
    unsafe { table::identity(reduction, dst, bytes) };
}

/// Reduces `srcs`, in this order, in the canonical tree (split at the largest power of two below their
/// number), in accumulators (f32 for 16-bit types), each source times `pre`, the result times
/// `post / divisor`, rounded once.
///
/// # Safety
/// `bytes` bytes must lie at `dst` and at each of `srcs`, and those at `dst` may be written. `dst` is exactly
/// one of `srcs` or overlaps none.
///
/// # Panics
/// As [`reduce`], and when `srcs` is empty or longer than [`crate::limits::RANKS_MAX`].
pub unsafe fn reduce_many(
    reduction: Reduction,
    dst: *mut u8,
    srcs: &[*const u8],
    bytes: usize,
    pre: f64,
    finish: Finish,
) {
    // SAFETY: the caller's promise; the level in use is one that the processor has.
    unsafe {
        match *srcs {
            // Two operands need no accumulators beside the registers, and come to the same bits.
            [a, b] if pre == 1.0 => reduce_pair(reduction, (dst, dst), a, b, bytes, finish),
            _ => table::reduce_many(level(), reduction, dst, srcs, bytes, pre, finish),
        }
    }
}

/// Adasum of one whole tensor: `(1 - a·b / 2|a|²) a + (1 - a·b / 2|b|²) b`, with products in f64.
///
/// # Safety
/// As for [`reduce`].
pub unsafe fn combine(dtype: DType, dst: *mut u8, a: *const u8, b: *const u8, bytes: usize) {
    // SAFETY: the caller's promise; the level in use is one that the processor has.
    unsafe { table::combine(level(), dtype, dst, a, b, bytes) };
}
