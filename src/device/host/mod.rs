//! (under construction)

use crate::device::Reduction;
use crate::types::{DType, ReduceOp};

/// `dst = a + b`.
///
/// # Safety
/// `bytes` bytes are behind all three addresses; `dst` is `a` or `b` or apart from them.
pub unsafe fn reduce(reduction: Reduction, dst: *mut u8, a: *const u8, b: *const u8, bytes: usize) {
    assert_eq!(reduction.op, ReduceOp::Sum, "only sums are there yet");
    for i in 0..bytes / 4 {
        // SAFETY: 4 * i + 4 <= bytes.
        unsafe {
            let (a, b) = (a.add(4 * i), b.add(4 * i));
            match reduction.dtype {
                DType::F32 => {
                    let sum = a.cast::<f32>().read_unaligned() + b.cast::<f32>().read_unaligned();
                    dst.add(4 * i).cast::<f32>().write_unaligned(sum);
                }
                DType::I32 => {
                    let sum = a.cast::<i32>().read_unaligned().wrapping_add(b.cast::<i32>().read_unaligned());
                    dst.add(4 * i).cast::<i32>().write_unaligned(sum);
                }
                other => panic!("{other} is not there yet"),
            }
        }
    }
}
