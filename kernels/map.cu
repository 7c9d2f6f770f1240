// One operand: scales, what is done last to a sum, and conversions with a factor, each rounded once. With many
// rows it is packing and unpacking with scale and conversion fused.
#include "walk.cuh"

template <class D, class S> struct Map {
    static constexpr u32 PER = 16 / (sizeof(D) < sizeof(S) ? sizeof(D) : sizeof(S));
    static constexpr u32 READS = PER * sizeof(S) / 16, WRITES = PER * sizeof(D) / 16;
    const Args& args;

    METHOD void units(const Row& row, u64 first, u32 count) const {
        for (u32 u = 0; u < count; u++, first += THREADS * PER) {
            Lanes<S> in[READS];
            Lanes<D> out[WRITES];
#pragma unroll
            for (u32 i = 0; i < READS; i++) in[i] = load(row.source(0) + first * sizeof(S) + 16 * i);
#pragma unroll
            for (u32 i = 0; i < PER; i++) {
                S x = in[i * sizeof(S) / 16].at[i % (16 / sizeof(S))];
                out[i * sizeof(D) / 16].at[i % (16 / sizeof(D))] = one(x);
            }
#pragma unroll
            for (u32 i = 0; i < WRITES; i++) write(row.target() + first * sizeof(D) + 16 * i, out[i].vector);
        }
    }
    METHOD void element(const Row& row, u64 i) const {
        store_element<D>(row.target() + i * sizeof(D), one(load_element<S>(row.source(0) + i * sizeof(S))));
    }
    METHOD D one(S x) const { return convert(finish(Number<S>::widen(x), args), (D*)0); }
    template <class T> static METHOD D convert(T x, T*) { return Number<D>::narrow(x); }
    template <class T, class U> static METHOD D convert(T x, U*) { return Into<D>::of(x); }
};

#define ELEMENT(dtype, element)                                                            \
    KERNEL(map_##dtype) {                                                                  \
        Map<element, element> body{args};                                                  \
        walk<sizeof(element), sizeof(element), 4>(args, !Number<element>::WHOLE, 1, body);    \
    }
#define CAST(from, to)                                                                     \
    KERNEL(cast_##from##_##to) {                                                           \
        Map<as_##to, as_##from> body{args};                                                \
        walk<sizeof(as_##to), sizeof(as_##from), 2>(args, true, 1, body);                     \
    }
typedef F16 as_F16;
typedef BF16 as_BF16;
typedef f32 as_F32;
typedef f64 as_F64;
#include "table.def"
