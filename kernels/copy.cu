// Bytes as they are: copies, packing and unpacking of any number of tensors in one launch, and what a reduction
// starts from. A gather from peers (the second shot of an allreduce) is a copy too.
#include "walk.cuh"

struct Copy {
    METHOD void units(const Row& row, u64 first, u32 count) const {
        Vector held[4];
#pragma unroll
        for (u32 u = 0; u < 4; u++) {
            if (u < count) held[u] = load(row.source(0) + first + u * THREADS * 16);
        }
#pragma unroll
        for (u32 u = 0; u < 4; u++) {
            if (u < count) write(row.target() + first + u * THREADS * 16, held[u]);
        }
    }
    METHOD void element(const Row& row, u64 i) const { write(row.target() + i, read<u8>(row.source(0) + i)); }
};

KERNEL(copy) { walk<1, 1, 4>(args, true, 1, Copy{}); }

struct Fill {
    const Args& args;
    METHOD u8 byte(u64 i) const { return (u8)(args.pattern[(i & 15u) / 4] >> (i % 4 * 8)); }
    METHOD void units(const Row& row, u64 first, u32 count) const {
        // Rotated, so that it starts where these vectors do; its length divides 16.
        Vector vector;
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u64 at = first + 4 * i;
            vector.word[i] = byte(at) | byte(at + 1) << 8 | byte(at + 2) << 16 | (u32)byte(at + 3) << 24;
        }
        for (u32 u = 0; u < count; u++) write(row.target() + first + u * THREADS * 16, vector);
    }
    METHOD void element(const Row& row, u64 i) const { write(row.target() + i, byte(i)); }
};

KERNEL(fill) { walk<1, 1, 4>(args, true, 0, Fill{args}); }
