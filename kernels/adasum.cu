// Adasum of whole tensors (Maleki et al., MLSys 2021): (1 - a·b / 2|a|²) a + (1 - a·b / 2|b|²) b.
//
// The order of a scalar product is the host's: chunks of CHUNK elements, in each of them element i goes to sum
// i % PARTS, and all these sums are the leaves of one canonical tree. So it depends on nothing but the length.
// `dots` makes the leaves, `fold` merges FOLD of them at a time, until one is left for each tensor.
#include "walk.cuh"

constexpr u32 CHUNK = 1024, PARTS = 8, FOLD = 32;

// a·b, a·a and b·b.
struct Products {
    f64 dot, a, b;
};

DEVICE f64 as_f64(f32 x) { return (f64)x; }
DEVICE f64 as_f64(f64 x) { return x; }

DEVICE Products read_products(u64 address) {
    return Products{read<f64>(address), read<f64>(address + 8), read<f64>(address + 16)};
}
DEVICE void write_products(u64 address, Products p) {
    write<f64>(address, p.dot);
    write<f64>(address + 8, p.a);
    write<f64>(address + 16, p.b);
}

// PARTS neighbouring threads have a chunk; a tile is THREADS / PARTS chunks. A warp reads whole sectors.
template <class E> DEVICE void dots(const Args& args) {
    for (u64 tile = block_index(); tile < args.tiles; tile += grid_size()) {
        Row row = row_of(args, tile);
        u64 leaf = (tile - row.first_tile) * THREADS + thread_index();
        u64 start = leaf / PARTS * CHUNK, end = start + CHUNK;
        if (start >= row.elements()) continue;
        end = end < row.elements() ? end : row.elements();
        Products sum = {0.0, 0.0, 0.0};
#pragma unroll 4
        for (u64 i = start + leaf % PARTS; i < end; i += PARTS) {
            f64 x = as_f64(Number<E>::widen(load_element<E>(row.source(0) + i * sizeof(E))));
            f64 y = as_f64(Number<E>::widen(load_element<E>(row.source(1) + i * sizeof(E))));
            sum.dot += x * y;
            sum.a += x * x;
            sum.b += y * y;
        }
        write_products(row.target() + leaf * sizeof(Products), sum);
    }
}

KERNEL(fold) {
    for (u64 tile = block_index(); tile < args.tiles; tile += grid_size()) {
        Row row = row_of(args, tile);
        u64 own = (tile - row.first_tile) * THREADS + thread_index();
        u64 start = own * FOLD;
        if (start >= row.elements()) continue;
        u64 some = row.elements() - start;
        some = some < FOLD ? some : FOLD;
        Products level[6], sum = {0.0, 0.0, 0.0};
        u32 top = 0;
        for (u32 k = 0; k < some; k++) {
            sum = read_products(row.source(0) + (start + k) * sizeof(Products));
            for (u32 ones = k; ones & 1u; ones >>= 1) {
                top--;
                sum = Products{level[top].dot + sum.dot, level[top].a + sum.a, level[top].b + sum.b};
            }
            level[top++] = sum;
        }
        for (top--; top > 0;) {
            top--;
            sum = Products{level[top].dot + sum.dot, level[top].a + sum.a, level[top].b + sum.b};
        }
        write_products(row.target() + own * sizeof(Products), sum);
    }
}

// A tensor's factor. One whose norm is (almost) nothing, below the root of the least normal number, is added as
// it is.
DEVICE f64 share(f64 dot, f64 norm) {
    return norm >= from_bits((u64)(1023 - 511) << 52) ? 1.0 - dot / norm * 0.5 : 1.0;
}

// f32 in f64, 16-bit types in f32, so that each is rounded to its own width once.
template <class E> struct Blend {
    static METHOD f32 of(f32 x, f64 by_x, f32 y, f64 by_y) { return scale(x, by_x) + scale(y, by_y); }
};
template <> struct Blend<f32> {
    static METHOD f32 of(f32 x, f64 by_x, f32 y, f64 by_y) { return (f32)((f64)x * by_x + (f64)y * by_y); }
};
template <> struct Blend<f64> {
    static METHOD f64 of(f64 x, f64 by_x, f64 y, f64 by_y) { return x * by_x + y * by_y; }
};

// The third source of a row is where the tensor's products are.
template <class E> struct Combine {
    static constexpr u32 PER = 16 / sizeof(E);

    METHOD void units(const Row& row, u64 first, u32) const {
        Products p = read_products(row.source(2));
        f64 by_a = share(p.dot, p.a), by_b = share(p.dot, p.b);
        Lanes<E> a = load(row.source(0) + first * sizeof(E)), b = load(row.source(1) + first * sizeof(E));
#pragma unroll
        for (u32 i = 0; i < PER; i++) a.at[i] = one(a.at[i], by_a, b.at[i], by_b);
        write(row.target() + first * sizeof(E), a.vector);
    }
    METHOD void element(const Row& row, u64 i) const {
        Products p = read_products(row.source(2));
        E a = load_element<E>(row.source(0) + i * sizeof(E)), b = load_element<E>(row.source(1) + i * sizeof(E));
        E out = one(a, share(p.dot, p.a), b, share(p.dot, p.b));
        store_element<E>(row.target() + i * sizeof(E), out);
    }
    static METHOD E one(E a, f64 by_a, E b, f64 by_b) {
        return Number<E>::narrow(Blend<E>::of(Number<E>::widen(a), by_a, Number<E>::widen(b), by_b));
    }
};

#define REAL(dtype, element)                                                        \
    KERNEL(dots_##dtype) { dots<element>(args); }                                   \
    KERNEL(combine_##dtype) {                                                       \
        walk<sizeof(element), sizeof(element), 1>(args, true, 2, Combine<element>{});  \
    }
#include "table.def"
