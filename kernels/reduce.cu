// Two operands, and many in the canonical tree. The operands may be any memory that the device reads: its own,
// a peer's, pinned memory of the host. A one-shot allreduce is `reduce_many` of all peers' inputs; a two-shot one
// is `reduce_many` of one part and, once the host has seen every peer's mark, `copy` of the others' parts.
#include "walk.cuh"

template <class E, class O> struct Two {
    static constexpr u32 PER = 16 / sizeof(E);

    METHOD void units(const Row& row, u64 first, u32 count) const {
        Lanes<E> a[2], b[2];
#pragma unroll
        for (u32 u = 0; u < 2; u++) {
            u64 at = (first + u * THREADS * PER) * sizeof(E);
            if (u < count) {
                a[u] = load(row.source(0) + at);
                b[u] = load(row.source(1) + at);
            }
        }
#pragma unroll
        for (u32 u = 0; u < 2; u++) {
            if (u < count) {
#pragma unroll
                for (u32 i = 0; i < PER; i++) a[u].at[i] = one(a[u].at[i], b[u].at[i]);
                write(row.target() + (first + u * THREADS * PER) * sizeof(E), a[u].vector);
            }
        }
    }
    METHOD void element(const Row& row, u64 i) const {
        E a = load_element<E>(row.source(0) + i * sizeof(E));
        E b = load_element<E>(row.source(1) + i * sizeof(E));
        store_element<E>(row.target() + i * sizeof(E), one(a, b));
    }
    static METHOD E one(E a, E b) {
        return Number<E>::narrow(combine(O{}, Number<E>::widen(a), Number<E>::widen(b)));
    }
};

// Levels of the tree above fours of operands, for RANKS_MAX operands.
constexpr u32 LEVELS = 16;

// The canonical tree splits at the largest power of two below the number of operands. It is climbed by binary
// counting: after pair i of operands as many sums are merged as i ends in ones, and what remains is merged at
// the end. The two lowest levels are in registers, so that up to eight operands need no other memory.
template <class E, class O> struct Many {
    static constexpr u32 PER = 16 / sizeof(E);
    typedef Number<E> N;
    typedef typename N::Wide Wide;
    struct Sums {
        Wide at[PER];
    };
    const Args& args;

    METHOD void units(const Row& row, u64 first, u32) const {
        u32 sources = args.sources;
        Sums level[LEVELS], twos, fours, sum;
        u32 top = 0;
#pragma unroll 1
        for (u32 k = 0; k < sources; k += 2) {
            sum = pair(row, k, first);
            if (!(k & 2u)) {
                twos = sum;
                continue;
            }
            merge(twos, sum);
            if (!(k & 4u)) {
                fours = sum;
                continue;
            }
            merge(fours, sum);
            if (sources > 8) {
                for (u32 ones = k / 8; ones & 1u; ones >>= 1) merge(level[--top], sum);
                level[top++] = sum;
            }
        }
        u32 pairs = (sources + 1) / 2;
        if (pairs & 2u && pairs & 1u) merge(fours, sum);
        // The newest eight are the sum itself, where nothing came after them.
        if (pairs % 4 == 0 && top > 0) top--;
        while (top > 0) merge(level[--top], sum);
        Lanes<E> out;
#pragma unroll
        for (u32 i = 0; i < PER; i++) out.at[i] = N::narrow(last(sum.at[i]));
        write(row.target() + first * sizeof(E), out.vector);
    }

    // sum = held ⊕ sum
    static METHOD void merge(const Sums& held, Sums& sum) {
#pragma unroll
        for (u32 i = 0; i < PER; i++) sum.at[i] = combine(O{}, held.at[i], sum.at[i]);
    }

    METHOD Sums pair(const Row& row, u32 k, u64 first) const {
        bool two = k + 1 < args.sources;
        Lanes<E> a, b;
        a = load(row.source(k) + first * sizeof(E));
        if (two) b = load(row.source(k + 1) + first * sizeof(E));
        Sums sum;
#pragma unroll
        for (u32 i = 0; i < PER; i++) sum.at[i] = prepared(a.at[i]);
        if (two) {
#pragma unroll
            for (u32 i = 0; i < PER; i++) sum.at[i] = combine(O{}, sum.at[i], prepared(b.at[i]));
        }
        return sum;
    }

    // Times 1 is the same number; integers, which come here only with 1, have no multiplication at all.
    METHOD Wide prepared(E x) const { return N::WHOLE ? N::widen(x) : scale(N::widen(x), args.pre); }
    METHOD Wide last(Wide x) const { return N::WHOLE ? x : finish(x, args); }

    METHOD void element(const Row& row, u64 i) const {
        Wide level[LEVELS + 2];
        u32 top = 0;
        Wide sum = Wide();
        for (u32 k = 0; k < args.sources; k++) {
            sum = N::widen(load_element<E>(row.source(k) + i * sizeof(E)));
            if (args.pre != 1.0) sum = scale(sum, args.pre);
            for (u32 ones = k; ones & 1u; ones >>= 1) sum = combine(O{}, level[--top], sum);
            level[top++] = sum;
        }
        for (top--; top > 0;) sum = combine(O{}, level[--top], sum);
        store_element<E>(row.target() + i * sizeof(E), N::narrow(finish(sum, args)));
    }
};

#define REDUCTION(dtype, element, op)                                                          \
    KERNEL(reduce_##dtype##_##op) {                                                            \
        walk<sizeof(element), sizeof(element), 2>(args, true, 2, Two<element, op>{});             \
    }                                                                                          \
    KERNEL(reduce_many_##dtype##_##op) {                                                       \
        bool plain = args.pre == 1.0 && args.last == Nothing;                                  \
        Many<element, op> body{args};                                                          \
        bool vectors = plain || !Number<element>::WHOLE;                                        \
        walk<sizeof(element), sizeof(element), 1>(args, vectors, args.sources, body);          \
    }
#include "table.def"
