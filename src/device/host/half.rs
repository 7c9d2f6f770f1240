//! The two 16-bit floating-point types. Both are kept in f32 while they are combined and rounded once to
//! nearest, ties to even. Subnormals are kept at every level; for that reason the instructions of
//! avx512_bf16, which flush them, are not used.

use super::number::{Element, Real, Wide};
use std::marker::PhantomData;

/// IEEE half precision.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct F16(pub(super) u16);

/// Half precision that the processor converts itself, with the instructions of `I`.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct VectorF16<I: Isa>(F16, PhantomData<I>);

/// The upper half of an f32.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct BF16(pub(super) u16);

impl Element for F16 {
    type Wide = f32;

    #[inline(always)]
    fn widen(self) -> f32 {
        let bits = u32::from(self.0);
        // The exponent moves from bias 15 to 127 by an exact multiplication, which also makes subnormals normal.
        let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((254 - 15) << 23);
        let special = if magnitude >= 65536.0 { 0x7f80_0000 } else { 0 };
        f32::from_bits(magnitude.to_bits() | special | (bits & 0x8000) << 16)
    }

    #[inline(always)]
    fn narrow(wide: f32) -> F16 {
        /// Added to a value below the smallest normal, its last place is the last place of a subnormal.
        const SUBNORMAL: u32 = (127 - 15 + 23 - 10 + 1) << 23;
        let bits = wide.to_bits();
        let magnitude = bits & 0x7fff_ffff;
        let subnormal =
            (f32::from_bits(magnitude) + f32::from_bits(SUBNORMAL)).to_bits().wrapping_sub(SUBNORMAL);
        // Rebiased, and rounded to even by adding just below one half, and the last bit that is kept.
        let rounded =
            magnitude.wrapping_sub((127 - 15) << 23).wrapping_add(0xfff + (magnitude >> 13 & 1)) >> 13;
        let finite = if magnitude < 113 << 23 { subnormal } else { rounded };
        let bounded = if magnitude >= 143 << 23 { 0x7c00 } else { finite };
        let signed = bounded | bits >> 16 & 0x8000;
        F16(if magnitude > 0x7f80_0000 { 0x7e00 } else { signed as u16 })
    }
}

impl<I: Isa> Element for VectorF16<I> {
    type Wide = f32;

    #[inline(always)]
    fn widen(self) -> f32 {
        self.0.widen()
    }

    #[inline(always)]
    fn narrow(wide: f32) -> VectorF16<I> {
        VectorF16(F16::narrow(wide), PhantomData)
    }
}

impl BF16 {
    /// The bits of `wide` rounded to a bf16, which stands in the upper half; the lower half is arbitrary.
    #[inline(always)]
    pub(super) fn round(wide: f32) -> u32 {
        let bits = wide.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
        if wide.is_nan() { 0x7fc0_0000 } else { rounded }
    }
}

impl Element for BF16 {
    type Wide = f32;

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }

    #[inline(always)]
    fn narrow(wide: f32) -> BF16 {
        BF16((BF16::round(wide) >> 16) as u16)
    }
}

macro_rules! real {
    ($([$($generic:tt)*] $t:ty),*) => {$(
        impl<$($generic)*> Real for $t {
            #[inline(always)]
            fn as_f64(wide: f32) -> f64 { f64::from(wide) }
            #[inline(always)]
            fn blend(x: f32, by_x: f64, y: f32, by_y: f64) -> f32 { x.scale(by_x) + y.scale(by_y) }
        }
    )*};
}

real!([] F16, [] BF16, [I: Isa] VectorF16<I>);

/// How many halves are converted by one call of an [`Isa`].
pub(super) const LANES: usize = 16;

/// What the compiler cannot vectorise by itself: the conversions of f16 that processors have.
pub(super) trait Isa: Copy {
    /// Sixteen halves as f32.
    ///
    /// # Safety
    /// The processor must have the instructions.
    unsafe fn widen(halves: [u16; LANES]) -> [f32; LANES];
    /// Sixteen f32 rounded to halves, NaN canonical.
    ///
    /// # Safety
    /// The processor must have the instructions.
    unsafe fn narrow(wide: [f32; LANES]) -> [u16; LANES];
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Isa, LANES};
    use std::arch::x86_64::*;
    use std::mem::transmute;

    /// AVX2 and F16C.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx2;

    impl Isa for Avx2 {
        #[inline(always)]
        unsafe fn widen(halves: [u16; LANES]) -> [f32; LANES] {
            // SAFETY: the caller has the instructions; the arrays and the registers have the same bytes.
            unsafe {
                let [low, high]: [__m128i; 2] = transmute(halves);
                transmute([_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)])
            }
        }
        #[inline(always)]
        unsafe fn narrow(wide: [f32; LANES]) -> [u16; LANES] {
            // SAFETY: as above.
            unsafe {
                let [low, high]: [__m256; 2] = transmute(wide);
                let nan = _mm256_set1_ps(f32::from_bits(0x7fc0_0000));
                let low = _mm256_blendv_ps(low, nan, _mm256_cmp_ps::<_CMP_UNORD_Q>(low, low));
                let high = _mm256_blendv_ps(high, nan, _mm256_cmp_ps::<_CMP_UNORD_Q>(high, high));
                transmute([
                    _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(low),
                    _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(high),
                ])
            }
        }
    }

    /// AVX-512.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx512;

    impl Isa for Avx512 {
        #[inline(always)]
        unsafe fn widen(halves: [u16; LANES]) -> [f32; LANES] {
            // SAFETY: the caller has the instructions; the arrays and the registers have the same bytes.
            unsafe { transmute(_mm512_cvtph_ps(transmute::<[u16; LANES], __m256i>(halves))) }
        }
        #[inline(always)]
        unsafe fn narrow(wide: [f32; LANES]) -> [u16; LANES] {
            // SAFETY: as above.
            unsafe {
                let wide: __m512 = transmute(wide);
                let nan = _mm512_set1_ps(f32::from_bits(0x7fc0_0000));
                let wide = _mm512_mask_mov_ps(wide, _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(wide, wide), nan);
                transmute(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(wide))
            }
        }
    }
}
