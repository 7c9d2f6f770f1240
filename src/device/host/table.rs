//! The table: which element carries out which operation of which type, and the kernels of all levels made
//! from it. A new type or operation is a row here, its bodies in [`super::number`], and the oracle.

use super::adasum;
use super::half::{self, BF16};
#[cfg(target_arch = "x86_64")]
use super::half::{Avx2, Avx512, VectorF16};
use super::kernel::{self, Loops};
use super::level::Level;
use super::mode::DefaultMode;
use super::number::{self, Bool, Complex, Op, Real};
use crate::device::{Finish, Reduction};
use crate::types::{DType, ReduceOp};

/// Calls `reductions!`-like macros with the table. Complex sums treat the parts as two elements.
macro_rules! with_reductions {
    ($use:ident! $arguments:tt) => {
        $use! { $arguments
            U8 => u8 { Sum, Product, Min, Max, BitAnd, BitOr }
            I8 => i8 { Sum, Product, Min, Max, BitAnd, BitOr }
            U16 => u16 { Sum, Product, Min, Max, BitAnd, BitOr }
            I16 => i16 { Sum, Product, Min, Max, BitAnd, BitOr }
            U32 => u32 { Sum, Product, Min, Max, BitAnd, BitOr }
            I32 => i32 { Sum, Product, Min, Max, BitAnd, BitOr }
            U64 => u64 { Sum, Product, Min, Max, BitAnd, BitOr }
            I64 => i64 { Sum, Product, Min, Max, BitAnd, BitOr }
            F16 => F16 { Sum, Product, Min, Max }
            BF16 => BF16 { Sum, Product, Min, Max }
            F32 => f32 { Sum, Product, Min, Max }
            F64 => f64 { Sum, Product, Min, Max }
            Bool => Bool { Sum, Product, Min, Max, BitAnd, BitOr }
            C64 => f32 { Sum }
            C64 => Complex<f32> { Product }
            C128 => f64 { Sum }
            C128 => Complex<f64> { Product }
        }
    };
}

/// Which element scales which type.
macro_rules! with_elements {
    ($use:ident! $arguments:tt) => {
        $use! { $arguments
            U8 => u8, I8 => i8, U16 => u16, I16 => i16, U32 => u32, I32 => i32, U64 => u64, I64 => i64,
            F16 => F16, BF16 => BF16, F32 => f32, F64 => f64, Bool => Bool, C64 => f32, C128 => f64,
        }
    };
}

/// Which element carries out Adasum of which type.
macro_rules! with_reals {
    ($use:ident! $arguments:tt) => {
        $use! { $arguments F16 => F16, BF16 => BF16, F32 => f32, F64 => f64, }
    };
}

macro_rules! match_reduction {
    (($reduction:expr, $call:ident $arguments:tt)
     $($dtype:ident => $element:ty { $($op:ident),* })*) => {
        match ($reduction.dtype, combining($reduction)) {
            $($((DType::$dtype, ReduceOp::$op) => match_reduction!(@ $call $element, $op, $arguments),)*)*
            _ => refused($reduction),
        }
    };
    (@ $call:ident $element:ty, $op:ident, ($($argument:expr),*)) => {
        $call::<$element, number::$op>($($argument),*)
    };
}

macro_rules! match_element {
    (($dtype:expr, $call:ident $arguments:tt) $($variant:ident => $element:ty,)*) => {
        match $dtype {
            $(DType::$variant => match_element!(@ $call $element, $arguments),)*
            #[allow(unreachable_patterns)]
            dtype => refused(Reduction { dtype, op: ReduceOp::Adasum }),
        }
    };
    (@ $call:ident $element:ty, ($($argument:expr),*)) => { $call::<$element>($($argument),*) };
}

/// Average combines as Sum; its division is the finish. (The table has no Average of bool.)
fn combining(reduction: Reduction) -> ReduceOp {
    match reduction.op {
        ReduceOp::Average if reduction.dtype != DType::Bool => ReduceOp::Sum,
        op => op,
    }
}

#[cold]
fn refused(reduction: Reduction) -> ! {
    panic!("{} of {} is refused before it comes to a device", reduction.op, reduction.dtype)
}

/// Bytes as a number of elements (complex numbers in parts are two).
#[inline(always)]
fn count<E>(bytes: usize) -> usize {
    assert!(bytes.is_multiple_of(size_of::<E>()), "a piece holds whole elements");
    bytes / size_of::<E>()
}

macro_rules! kernels {
    ($(#[$meta:meta])* $module:ident, $f16:ty, $(#[$feature:meta])*) => {
        $(#[$meta])*
        mod $module {
            use super::*;

            /// The element that stands for half precision in the table.
            type F16 = $f16;

            // SAFETY (of every function here): the caller's promise, which includes that the processor has
            // the features; the functions of `kernel` ask for no more.

            $(#[$feature])*
            unsafe fn reduce_as<E: Loops, O: Op<E::Wide>>(
                (dst, back): (*mut u8, *mut u8), a: *const u8, b: *const u8, n: usize, finish: Finish,
            ) {
                let to = (dst.cast(), back.cast());
                // SAFETY: see above.
                unsafe { kernel::reduce::<E, O>(to, a.cast(), b.cast(), count::<E>(n), finish) }
            }
            $(#[$feature])*
            unsafe fn scale_as<E: Loops>(dst: *mut u8, src: *const u8, n: usize, factor: f64) {
                // SAFETY: see above.
                unsafe { kernel::scale::<E>(dst.cast(), src.cast(), count::<E>(n), factor) }
            }
            $(#[$feature])*
            unsafe fn finish_as<E: Loops>(dst: *mut u8, n: usize, finish: Finish) {
                // SAFETY: see above.
                unsafe { kernel::finish::<E>(dst.cast(), count::<E>(n), finish) }
            }
            $(#[$feature])*
            unsafe fn reduce_many_as<E: Loops, O: Op<E::Wide>>(
                dst: *mut u8, srcs: &[*const u8], n: usize, pre: f64, finish: Finish,
            ) {
                // SAFETY: see above.
                unsafe { kernel::reduce_many::<E, O>(dst.cast(), srcs, count::<E>(n), pre, finish) }
            }
            $(#[$feature])*
            unsafe fn combine_as<E: Loops + Real>(dst: *mut u8, a: *const u8, b: *const u8, n: usize) {
                // SAFETY: see above.
                unsafe { adasum::combine::<E>(dst.cast(), a.cast(), b.cast(), count::<E>(n)) }
            }

            pub(super) unsafe fn reduce(
                reduction: Reduction, to: (*mut u8, *mut u8), a: *const u8, b: *const u8, n: usize, finish: Finish,
            ) {
                // SAFETY: see above.
                unsafe { with_reductions!(match_reduction!(reduction, reduce_as (to, a, b, n, finish))) }
            }
            pub(super) unsafe fn scale(dtype: DType, dst: *mut u8, src: *const u8, n: usize, factor: f64) {
                // SAFETY: see above.
                unsafe { with_elements!(match_element!(dtype, scale_as (dst, src, n, factor))) }
            }
            pub(super) unsafe fn finish(dtype: DType, dst: *mut u8, n: usize, finish: Finish) {
                // SAFETY: see above.
                unsafe { with_elements!(match_element!(dtype, finish_as (dst, n, finish))) }
            }
            pub(super) unsafe fn reduce_many(
                reduction: Reduction, dst: *mut u8, srcs: &[*const u8], n: usize, pre: f64, finish: Finish,
            ) {
                // SAFETY: see above.
                unsafe {
                    with_reductions!(
                        match_reduction!(reduction, reduce_many_as (dst, srcs, n, pre, finish))
                    )
                }
            }
            pub(super) unsafe fn combine(dtype: DType, dst: *mut u8, a: *const u8, b: *const u8, n: usize) {
                // SAFETY: see above.
                unsafe { with_reals!(match_element!(dtype, combine_as (dst, a, b, n))) }
            }
        }
    };
}

kernels!(baseline, half::F16,);
kernels!(
    #[cfg(target_arch = "x86_64")]
    avx2, VectorF16<Avx2>, #[target_feature(enable = "avx2,f16c")]
);
kernels!(
    #[cfg(target_arch = "x86_64")]
    avx512, VectorF16<Avx512>, #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
);

macro_rules! by_level {
    ($(#[$doc:meta])* fn $name:ident($($argument:ident: $t:ty),*)) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// The processor must have `level`. `bytes` bytes must lie at every pointer; those at `dst` may be
        /// written, and `dst` either is exactly one of the sources or overlaps none.
        pub(super) unsafe fn $name(level: Level, $($argument: $t),*) {
            let _mode = DefaultMode::enter();
            // SAFETY: the caller's promise.
            unsafe {
                match level {
                    #[cfg(target_arch = "x86_64")]
                    Level::Avx512 => avx512::$name($($argument),*),
                    #[cfg(target_arch = "x86_64")]
                    Level::Avx2 => avx2::$name($($argument),*),
                    _ => baseline::$name($($argument),*),
                }
            }
        }
    };
}

by_level! {
    /// `to.0 = to.1 = finish(a ⊕ b)`, of integers without a finish. Both may be the same, and each may be an operand.
    fn reduce(
        reduction: Reduction, to: (*mut u8, *mut u8), a: *const u8, b: *const u8, bytes: usize, finish: Finish
    )
}
by_level! {
    /// `dst = src * factor`.
    fn scale(dtype: DType, dst: *mut u8, src: *const u8, bytes: usize, factor: f64)
}
by_level! {
    /// `dst = dst * post / divisor`.
    fn finish(dtype: DType, dst: *mut u8, bytes: usize, finish: Finish)
}
by_level! {
    /// The canonical tree over `srcs`.
    fn reduce_many(
        reduction: Reduction, dst: *mut u8, srcs: &[*const u8], bytes: usize, pre: f64, finish: Finish
    )
}
by_level! {
    /// Adasum of two whole tensors.
    fn combine(dtype: DType, dst: *mut u8, a: *const u8, b: *const u8, bytes: usize)
}

/// `dst` = the identity of the operation (Adasum's is Sum's).
///
/// # Safety
/// `bytes` bytes at `dst` may be written.
pub(super) unsafe fn identity(reduction: Reduction, dst: *mut u8, bytes: usize) {
    use half::F16;
    unsafe fn identity_as<E: Loops, O: Op<E::Wide>>(dst: *mut u8, bytes: usize) {
        // SAFETY: the caller's promise.
        unsafe { kernel::identity::<E, O>(dst.cast(), count::<E>(bytes)) }
    }
    let op = if reduction.op == ReduceOp::Adasum { ReduceOp::Sum } else { reduction.op };
    let reduction = Reduction { op, ..reduction };
    // SAFETY: the caller's promise.
    unsafe { with_reductions!(match_reduction!(reduction, identity_as(dst, bytes))) }
}

#[cfg(test)]
macro_rules! list_reductions {
    (() $($dtype:ident => $element:ty { $($op:ident),* })*) => {
        vec![$($((DType::$dtype, ReduceOp::$op, stringify!($element).replace(' ', "")),)*)*]
    };
}

#[cfg(test)]
macro_rules! list_elements {
    (() $($dtype:ident => $element:ty,)*) => {
        vec![$((DType::$dtype, stringify!($element).replace(' ', "")),)*]
    };
}

/// The rows of the table, for tests that hold other tables against it.
#[cfg(test)]
pub(in crate::device) fn reductions() -> Vec<(DType, ReduceOp, String)> {
    with_reductions!(list_reductions!())
}

/// Which element scales which type.
#[cfg(test)]
pub(in crate::device) fn elements() -> Vec<(DType, String)> {
    with_elements!(list_elements!())
}

/// Which element carries out Adasum of which type.
#[cfg(test)]
pub(in crate::device) fn reals() -> Vec<(DType, String)> {
    with_reals!(list_elements!())
}
