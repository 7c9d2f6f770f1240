//! What is done to one value: the accumulators, the operations on them, and the elements that are read
//! into them and rounded back. Plain scalar code, written so that the compiler can vectorise the loops of
//! [`super::kernel`] around it at every level.
#![forbid(unsafe_code)]

/// An accumulator: what an element is kept in between being read and being rounded.
pub(super) trait Wide: Copy {
    /// Whether the last step of an average is a floor division rather than a multiplication.
    const DIVIDES: bool;
    /// Times a factor.
    fn scale(self, factor: f64) -> Self;
    /// Floor division; only where [`Wide::DIVIDES`].
    fn divide(self, divisor: u32) -> Self;
    /// Floor division by a power of two; only where [`Wide::DIVIDES`].
    fn shift(self, bits: u32) -> Self;
    /// `floor(self * post / divisor)`; only where [`Wide::DIVIDES`].
    fn multiply_divide(self, post: f64, divisor: f64) -> Self;
}

/// A way to combine two accumulators. It must commute to the bit once the result has been narrowed: the
/// loops exchange the operands as memory demands.
pub(super) trait Op<W> {
    /// What changes nothing when combined with (complex products of infinities excepted).
    const IDENTITY: W;
    /// `a ⊕ b`.
    fn combine(a: W, b: W) -> W;
}

/// What lies in memory.
pub(super) trait Element: Copy {
    /// What it is accumulated in.
    type Wide: Wide;
    /// Exact.
    fn widen(self) -> Self::Wide;
    /// Rounded once, to nearest, ties to even; a NaN becomes the one canonical NaN. (Hardware would keep
    /// the bits of one operand, and which one depends on the order of the operands and on the instruction.)
    fn narrow(wide: Self::Wide) -> Self;
}

/// A real number that Adasum takes.
pub(super) trait Real: Element {
    /// For the scalar products; exact.
    fn as_f64(wide: Self::Wide) -> f64;
    /// `x * by_x + y * by_y`: f32 in f64, 16-bit types in f32, so that each is rounded to its own width once.
    fn blend(x: Self::Wide, by_x: f64, y: Self::Wide, by_y: f64) -> Self::Wide;
}

/// Addition.
pub(super) struct Sum;
/// Multiplication.
pub(super) struct Product;
/// The smaller.
pub(super) struct Min;
/// The larger.
pub(super) struct Max;
/// Bitwise and.
pub(super) struct BitAnd;
/// Bitwise or.
pub(super) struct BitOr;

macro_rules! op {
    ($op:ident of $wide:ty: $identity:expr, |$a:ident, $b:ident| $body:expr) => {
        impl Op<$wide> for $op {
            const IDENTITY: $wide = $identity;
            #[inline(always)]
            fn combine($a: $wide, $b: $wide) -> $wide {
                $body
            }
        }
    };
}

macro_rules! integer {
    ($($t:ty, $division:ty;)*) => {$(
        impl Wide for $t {
            const DIVIDES: bool = true;
            // `as` saturates, so that a scaled value that does not fit is the nearest that does.
            #[inline(always)]
            fn scale(self, factor: f64) -> $t { (self as f64 * factor).floor() as $t }
            // In a type that holds every value of both operands, so that the quotient is exact.
            #[inline(always)]
            fn divide(self, divisor: u32) -> $t {
                <$division>::from(self).div_euclid(<$division>::from(divisor)) as $t
            }
            #[inline(always)]
            fn shift(self, bits: u32) -> $t { (<$division>::from(self) >> bits) as $t }
            #[inline(always)]
            fn multiply_divide(self, post: f64, divisor: f64) -> $t {
                (self as f64 * post / divisor).floor() as $t
            }
        }
        impl Element for $t {
            type Wide = $t;
            #[inline(always)]
            fn widen(self) -> $t { self }
            #[inline(always)]
            fn narrow(wide: $t) -> $t { wide }
        }
        op!(Sum of $t: 0, |a, b| a.wrapping_add(b));
        op!(Product of $t: 1, |a, b| a.wrapping_mul(b));
        op!(Min of $t: <$t>::MAX, |a, b| if b < a { b } else { a });
        op!(Max of $t: <$t>::MIN, |a, b| if b > a { b } else { a });
        op!(BitAnd of $t: !0, |a, b| a & b);
        op!(BitOr of $t: 0, |a, b| a | b);
    )*};
}

integer! {
    u8, u32; i8, i64; u16, u32; i16, i64; u32, u32; i32, i64; u64, u64; i64, i64;
}

macro_rules! float {
    ($($t:ty, $nan:literal;)*) => {$(
        impl Wide for $t {
            const DIVIDES: bool = false;
            #[inline(always)]
            fn scale(self, factor: f64) -> $t { self * factor as $t }
            #[inline(always)]
            fn divide(self, divisor: u32) -> $t { self.scale(1.0 / f64::from(divisor)) }
            #[inline(always)]
            fn shift(self, bits: u32) -> $t { self.divide(1 << bits) }
            #[inline(always)]
            fn multiply_divide(self, post: f64, divisor: f64) -> $t { self.scale(post / divisor) }
        }
        impl Element for $t {
            type Wide = $t;
            #[inline(always)]
            fn widen(self) -> $t { self }
            #[inline(always)]
            fn narrow(wide: $t) -> $t {
                // Chosen among bits, not among floats, of which the compiler may take one NaN for another.
                <$t>::from_bits(if wide.is_nan() { $nan } else { wide.to_bits() })
            }
        }
        // The exact identity: +0 would turn -0 into +0.
        op!(Sum of $t: -0.0, |a, b| a + b);
        op!(Product of $t: 1.0, |a, b| a * b);
        op!(Min of $t: <$t>::INFINITY, |a, b| {
            let ordered = if a < b { a.to_bits() } else { b.to_bits() };
            // Equal values differ at most in the sign of a zero: either sign makes it the smaller zero.
            let least = if a == b { a.to_bits() | b.to_bits() } else { ordered };
            <$t>::from_bits(if a.is_nan() || b.is_nan() { $nan } else { least })
        });
        op!(Max of $t: <$t>::NEG_INFINITY, |a, b| {
            let ordered = if a > b { a.to_bits() } else { b.to_bits() };
            let greatest = if a == b { a.to_bits() & b.to_bits() } else { ordered };
            <$t>::from_bits(if a.is_nan() || b.is_nan() { $nan } else { greatest })
        });
    )*};
}

float! {
    f32, 0x7fc0_0000; f64, 0x7ff8_0000_0000_0000;
}

impl Real for f32 {
    #[inline(always)]
    fn as_f64(wide: f32) -> f64 {
        f64::from(wide)
    }
    #[inline(always)]
    fn blend(x: f32, by_x: f64, y: f32, by_y: f64) -> f32 {
        (f64::from(x) * by_x + f64::from(y) * by_y) as f32
    }
}

impl Real for f64 {
    #[inline(always)]
    fn as_f64(wide: f64) -> f64 {
        wide
    }
    #[inline(always)]
    fn blend(x: f64, by_x: f64, y: f64, by_y: f64) -> f64 {
        x * by_x + y * by_y
    }
}

/// One byte, 0 or 1 once it has been widened.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Bool(u8);

impl Wide for Bool {
    const DIVIDES: bool = false;
    // True stays true unless it is multiplied by 0, as conversion to bool would have it.
    #[inline(always)]
    fn scale(self, factor: f64) -> Bool {
        Bool(self.0 & u8::from(factor != 0.0))
    }
    #[inline(always)]
    fn divide(self, _divisor: u32) -> Bool {
        self
    }
    #[inline(always)]
    fn shift(self, _bits: u32) -> Bool {
        self
    }
    #[inline(always)]
    fn multiply_divide(self, post: f64, divisor: f64) -> Bool {
        self.scale(post / divisor)
    }
}

impl Element for Bool {
    type Wide = Bool;
    #[inline(always)]
    fn widen(self) -> Bool {
        Bool(u8::from(self.0 != 0))
    }
    #[inline(always)]
    fn narrow(wide: Bool) -> Bool {
        wide
    }
}

op!(Sum of Bool: Bool(0), |a, b| Bool(a.0 | b.0));
op!(Product of Bool: Bool(1), |a, b| Bool(a.0 & b.0));
op!(Min of Bool: Bool(1), |a, b| Bool(a.0 & b.0));
op!(Max of Bool: Bool(0), |a, b| Bool(a.0 | b.0));
op!(BitAnd of Bool: Bool(1), |a, b| Bool(a.0 & b.0));
op!(BitOr of Bool: Bool(0), |a, b| Bool(a.0 | b.0));

/// A complex number, for products only: everything else treats its parts as two elements.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Complex<T> {
    re: T,
    im: T,
}

macro_rules! complex {
    ($($t:ty;)*) => {$(
        impl Wide for Complex<$t> {
            const DIVIDES: bool = false;
            #[inline(always)]
            fn scale(self, factor: f64) -> Self {
                Complex { re: self.re.scale(factor), im: self.im.scale(factor) }
            }
            #[inline(always)]
            fn divide(self, divisor: u32) -> Self {
                Complex { re: self.re.divide(divisor), im: self.im.divide(divisor) }
            }
            #[inline(always)]
            fn shift(self, bits: u32) -> Self {
                Complex { re: self.re.shift(bits), im: self.im.shift(bits) }
            }
            #[inline(always)]
            fn multiply_divide(self, post: f64, divisor: f64) -> Self {
                self.scale(post / divisor)
            }
        }
        impl Element for Complex<$t> {
            type Wide = Self;
            #[inline(always)]
            fn widen(self) -> Self { self }
            #[inline(always)]
            fn narrow(wide: Self) -> Self {
                Complex { re: <$t>::narrow(wide.re), im: <$t>::narrow(wide.im) }
            }
        }
        op!(Product of Complex<$t>: Complex { re: 1.0, im: 0.0 }, |a, b| Complex {
            re: a.re * b.re - a.im * b.im,
            im: a.re * b.im + a.im * b.re,
        });
    )*};
}

complex! { f32; f64; }
