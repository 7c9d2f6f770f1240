//! The floating-point mode. A caller's thread drives progress, and frameworks set flush-to-zero on their
//! threads (`torch.set_flush_denormal`, TensorFlow's pools); an application may round upward or trap. Kernels
//! put that aside, so that their bits do not depend on whose thread they run on.

/// While it lives, this thread computes in the default mode.
pub(super) struct DefaultMode {
    #[cfg(target_arch = "x86_64")]
    found: u32,
}

#[cfg(target_arch = "x86_64")]
mod register {
    use std::arch::asm;

    /// Nearest even, all traps masked, subnormals kept.
    pub(super) const DEFAULT: u32 = 0x1f80;
    /// Rounding, masks, flush-to-zero and denormals-are-zero; not the flags of what has happened.
    pub(super) const CONTROL: u32 = 0xffc0;

    pub(super) fn read() -> u32 {
        let mut mxcsr = 0u32;
        // SAFETY: stores the register to a variable of ours.
        unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut mxcsr, options(nostack, preserves_flags)) };
        mxcsr
    }

    /// # Safety
    /// `mxcsr` must be the default or have been read on this thread; no code that presumes the default mode
    /// may run under another one of ours.
    pub(super) unsafe fn write(mxcsr: u32) {
        // SAFETY: the caller's promise: the value sets no reserved bit.
        unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const mxcsr, options(nostack, preserves_flags)) };
    }
}

impl DefaultMode {
    /// Sets the default mode where another one is found.
    #[inline]
    pub(super) fn enter() -> DefaultMode {
        #[cfg(target_arch = "x86_64")]
        {
            let found = register::read();
            if found & register::CONTROL != register::DEFAULT {
                // SAFETY: the default is the mode that all Rust code presumes.
                unsafe { register::write(register::DEFAULT) };
            }
            DefaultMode { found }
        }
        #[cfg(not(target_arch = "x86_64"))]
        DefaultMode {}
    }
}

impl Drop for DefaultMode {
    #[inline]
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        if self.found & register::CONTROL != register::DEFAULT {
            // SAFETY: what the thread had chosen for itself, as it was found.
            unsafe { register::write(self.found) };
        }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::super::{DType, Finish, Reduction, oracle, reduce, reduce_many, scale};
    use super::*;
    use crate::types::ReduceOp;

    #[test]
    fn a_thread_that_flushes_subnormals_gets_the_same_bits() {
        let subnormals: Vec<u8> = (1..40u32).flat_map(|i| (i * 1000).to_ne_bytes()).collect();
        let reduction = Reduction { dtype: DType::F32, op: ReduceOp::Sum };
        let sum = oracle::reduce(ReduceOp::Sum, DType::F32, &subnormals, &subnormals);
        let half = oracle::scale(DType::F32, &subnormals, 0.5);
        let bytes = subnormals.len();
        let mut out = [vec![0; bytes], vec![0; bytes], vec![0; bytes]];
        let [a, b, c] = out.each_mut().map(|v| v.as_mut_ptr());
        let src = subnormals.as_ptr();
        // Flush-to-zero, denormals-are-zero, rounding toward zero.
        let strange = register::DEFAULT | 0x8040 | 0x6000;
        // SAFETY: the buffers hold `bytes` bytes; the mode is put back before anything else computes.
        let after = unsafe {
            register::write(strange);
            reduce(reduction, a, src, src, bytes);
            scale(DType::F32, b, src, bytes, 0.5);
            reduce_many(reduction, c, &[src, src], bytes, 1.0, Finish { divisor: 2, post: 2.0 });
            let after = register::read();
            register::write(register::DEFAULT);
            after
        };
        assert_eq!(after & register::CONTROL, strange, "the thread keeps the mode that it chose");
        assert_eq!(out, [sum.clone(), half, sum]);
    }
}
