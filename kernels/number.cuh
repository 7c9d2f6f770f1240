// What is done to one value, exactly as src/device/host/number.rs and half.rs do it, to the bit: integers wrap,
// their average is a floor division; 16-bit types are kept in f32 and rounded once; a NaN that is produced is
// the one canonical NaN of its type; Min and Max propagate NaN, and -0 < +0. Compiled without contraction of
// products and sums and without flushing subnormals (see ci/src/ptx).
#pragma once
#include "form.cuh"

struct F16 {
    u16 bits;
};
struct BF16 {
    u16 bits;
};
// One byte, 0 or 1 once it has been widened.
struct Bool {
    u8 byte;
};
// For products only: everything else treats the parts as two elements.
template <class T> struct alignas(2 * sizeof(T)) Complex {
    T re, im;
};

struct Sum {};
struct Product {};
struct Min {};
struct Max {};
struct BitAnd {};
struct BitOr {};

// What is done to a result before it is rounded; made from divisor and postscale by the host.
enum Last : u32 { Nothing = 0, Multiply = 1, Divide = 2, Shift = 3, MultiplyDivide = 4 };

// What an element is accumulated in, and how it is read and rounded. Integers (WHOLE) are scaled by elements
// alone: the code for it in vectors would be long, and it is rare.
template <class E> struct Number;

// Saturates; a NaN becomes 0.
template <class T> DEVICE T saturate(f64 x, f64 least, f64 bound, T smallest, T largest) {
    if (x != x) return 0;
    if (x < least) return smallest;
    return x >= bound ? largest : (T)x;
}

template <class T> DEVICE T floor_divide(T x, u32 divisor) {
    if ((T)-1 > (T)0) return (T)((u64)x / divisor);
    i64 quotient = (i64)x / (i64)divisor;
    return (T)((i64)x % (i64)divisor < 0 ? quotient - 1 : quotient);
}

#define INTEGER(T, SMALLEST, LARGEST, LEAST, BOUND)                                                       \
    DEVICE T combine(Sum, T a, T b) { return (T)((u64)a + (u64)b); }                                      \
    DEVICE T combine(Product, T a, T b) { return (T)((u64)a * (u64)b); }                                  \
    DEVICE T combine(Min, T a, T b) { return b < a ? b : a; }                                             \
    DEVICE T combine(Max, T a, T b) { return b > a ? b : a; }                                             \
    DEVICE T combine(BitAnd, T a, T b) { return (T)(a & b); }                                             \
    DEVICE T combine(BitOr, T a, T b) { return (T)(a | b); }                                              \
    DEVICE T scale(T x, f64 factor) {                                                                     \
        return saturate<T>(floor((f64)x * factor), LEAST, BOUND, SMALLEST, LARGEST);                      \
    }                                                                                                     \
    DEVICE T finish(T x, const Args& args) {                                                              \
        switch (args.last) {                                                                              \
        case Multiply: return scale(x, args.last_factor);                                                 \
        case Divide: return floor_divide<T>(x, args.last_integer);                                        \
        case Shift: return (T)(x >> args.last_integer);                                                   \
        case MultiplyDivide:                                                                              \
            return saturate<T>(                                                                           \
                floor((f64)x * args.last_factor / args.last_divisor), LEAST, BOUND, SMALLEST, LARGEST);   \
        default: return x;                                                                                \
        }                                                                                                 \
    }                                                                                                     \
    template <> struct Number<T> {                                                                        \
        typedef T Wide;                                                                                   \
        static constexpr bool WHOLE = true;                                                               \
        MEMBER T widen(T x) { return x; }                                                                 \
        MEMBER T narrow(T x) { return x; }                                                                \
    };

INTEGER(u8, 0, 255, 0.0, 256.0)
INTEGER(i8, -128, 127, -128.0, 128.0)
INTEGER(u16, 0, 65535, 0.0, 65536.0)
INTEGER(i16, -32768, 32767, -32768.0, 32768.0)
INTEGER(u32, 0, 0xffffffffu, 0.0, 4294967296.0)
INTEGER(i32, -2147483647 - 1, 2147483647, -2147483648.0, 2147483648.0)
INTEGER(u64, 0, 0xffffffffffffffffull, 0.0, 18446744073709551616.0)
INTEGER(i64, -9223372036854775807ll - 1, 9223372036854775807ll, -9223372036854775808.0, 9223372036854775808.0)

#define FLOAT(T, BITS, NAN_BITS)                                                                          \
    DEVICE T combine(Sum, T a, T b) { return a + b; }                                                     \
    DEVICE T combine(Product, T a, T b) { return a * b; }                                                 \
    DEVICE T combine(Min, T a, T b) {                                                                     \
        BITS ordered = a < b ? bits_of(a) : bits_of(b);                                                   \
        /* Equal values differ at most in the sign of a zero: either sign makes it the smaller zero. */   \
        BITS least = a == b ? (bits_of(a) | bits_of(b)) : ordered;                                        \
        return from_bits(a != a || b != b ? (BITS)NAN_BITS : least);                                      \
    }                                                                                                     \
    DEVICE T combine(Max, T a, T b) {                                                                     \
        BITS ordered = a > b ? bits_of(a) : bits_of(b);                                                   \
        BITS greatest = a == b ? (bits_of(a) & bits_of(b)) : ordered;                                     \
        return from_bits(a != a || b != b ? (BITS)NAN_BITS : greatest);                                   \
    }                                                                                                     \
    DEVICE T scale(T x, f64 factor) { return x * (T)factor; }                                             \
    DEVICE T finish(T x, const Args& args) {                                                              \
        return args.last == Nothing ? x : scale(x, args.last_factor);                                     \
    }                                                                                                     \
    DEVICE T canonical(T x) { return from_bits(x != x ? (BITS)NAN_BITS : bits_of(x)); }                   \
    template <> struct Number<T> {                                                                        \
        typedef T Wide;                                                                                   \
        static constexpr bool WHOLE = false;                                                              \
        MEMBER T widen(T x) { return x; }                                                                 \
        MEMBER T narrow(T x) { return canonical(x); }                                                     \
    };

FLOAT(f32, u32, 0x7fc00000u)
FLOAT(f64, u64, 0x7ff8000000000000ull)

template <> struct Number<F16> {
    typedef f32 Wide;
    static constexpr bool WHOLE = false;

    MEMBER f32 widen(F16 x) {
#ifdef __CUDACC__
        f32 wide;
        asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
        return wide;
#else
        u32 bits = x.bits;
        // The exponent moves from bias 15 to 127 by an exact multiplication, which makes subnormals normal.
        f32 magnitude = from_bits((bits & 0x7fffu) << 13) * from_bits((254u - 15u) << 23);
        u32 special = magnitude >= 65536.0f ? 0x7f800000u : 0u;
        return from_bits(bits_of(magnitude) | special | (bits & 0x8000u) << 16);
#endif
    }

    MEMBER F16 narrow(f32 wide) {
#ifdef __CUDACC__
        u16 bits;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(wide));
        return F16{wide != wide ? (u16)0x7e00 : bits};
#else
        // Added to a value below the smallest normal, its last place is the last place of a subnormal.
        const u32 subnormal_bits = (127u - 15u + 23u - 10u + 1u) << 23;
        u32 bits = bits_of(wide);
        u32 magnitude = bits & 0x7fffffffu;
        u32 subnormal = bits_of(from_bits(magnitude) + from_bits(subnormal_bits)) - subnormal_bits;
        // Rebiased, and rounded to even by adding just below one half, and the last bit that is kept.
        u32 rounded = (magnitude - ((127u - 15u) << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
        u32 finite = magnitude < 113u << 23 ? subnormal : rounded;
        u32 bounded = magnitude >= 143u << 23 ? 0x7c00u : finite;
        return F16{wide != wide ? (u16)0x7e00 : (u16)(bounded | (bits >> 16 & 0x8000u))};
#endif
    }
};

template <> struct Number<BF16> {
    typedef f32 Wide;
    static constexpr bool WHOLE = false;

    MEMBER f32 widen(BF16 x) { return from_bits((u32)x.bits << 16); }

    MEMBER BF16 narrow(f32 wide) {
        u32 bits = bits_of(wide);
        u32 rounded = bits + 0x7fffu + (bits >> 16 & 1u);
        return BF16{(u16)((wide != wide ? 0x7fc00000u : rounded) >> 16)};
    }
};

DEVICE Bool either(Bool a, Bool b) { return Bool{(u8)(a.byte | b.byte)}; }
DEVICE Bool both(Bool a, Bool b) { return Bool{(u8)(a.byte & b.byte)}; }
DEVICE Bool combine(Sum, Bool a, Bool b) { return either(a, b); }
DEVICE Bool combine(Max, Bool a, Bool b) { return either(a, b); }
DEVICE Bool combine(BitOr, Bool a, Bool b) { return either(a, b); }
DEVICE Bool combine(Product, Bool a, Bool b) { return both(a, b); }
DEVICE Bool combine(Min, Bool a, Bool b) { return both(a, b); }
DEVICE Bool combine(BitAnd, Bool a, Bool b) { return both(a, b); }
// True stays true unless it is multiplied by 0.
DEVICE Bool scale(Bool x, f64 factor) { return Bool{(u8)(x.byte & (factor != 0.0 ? 1 : 0))}; }
DEVICE Bool finish(Bool x, const Args& args) { return args.last == Nothing ? x : scale(x, args.last_factor); }

template <> struct Number<Bool> {
    typedef Bool Wide;
    static constexpr bool WHOLE = false;
    MEMBER Bool widen(Bool x) { return Bool{(u8)(x.byte != 0)}; }
    MEMBER Bool narrow(Bool x) { return x; }
};

template <class T> DEVICE Complex<T> combine(Product, Complex<T> a, Complex<T> b) {
    return Complex<T>{a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <class T> DEVICE Complex<T> scale(Complex<T> x, f64 factor) {
    return Complex<T>{scale(x.re, factor), scale(x.im, factor)};
}
template <class T> DEVICE Complex<T> finish(Complex<T> x, const Args& args) {
    return Complex<T>{finish(x.re, args), finish(x.im, args)};
}

template <class T> struct Number<Complex<T>> {
    typedef Complex<T> Wide;
    static constexpr bool WHOLE = false;
    MEMBER Complex<T> widen(Complex<T> x) { return x; }
    MEMBER Complex<T> narrow(Complex<T> x) { return Complex<T>{canonical(x.re), canonical(x.im)}; }
};

// From one accumulator to another, for conversions; exact, or rounded once more where it is narrower.
template <class E> struct Into {
    MEMBER E of(f32 x) { return Number<E>::narrow((typename Number<E>::Wide)x); }
    // To 16 bits by way of an f32 that is rounded to odd, which the second rounding then rounds as if at once.
    MEMBER E of(f64 x) {
        f32 near = (f32)x;
        u32 bits = bits_of(near);
        if ((f64)near != x && x == x) {
            // The neighbour toward zero, with its last place set: what was cut off is remembered in it.
            f64 magnitude = x < 0 ? -x : x;
            f64 rounded = near < 0 ? -(f64)near : (f64)near;
            bits = (rounded > magnitude ? bits - 1 : bits) | 1u;
        }
        return Number<E>::narrow(from_bits(bits));
    }
};
template <> struct Into<f32> {
    MEMBER f32 of(f64 x) { return canonical((f32)x); }
    MEMBER f32 of(f32 x) { return canonical(x); }
};
template <> struct Into<f64> {
    MEMBER f64 of(f32 x) { return canonical((f64)x); }
};
