// The two forms of a kernel. As CUDA, threads are threads; as host C++, blocks and threads are loops, and every
// access is checked for its alignment and against the memory that the test has lent, so that the arithmetic of
// indices is proven on machines without a device.
//
// No kernel needs more than this: none has shared memory or a barrier, and none waits for anything.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;
typedef short i16;
typedef int i32;
typedef long long i64;
typedef float f32;
typedef double f64;

// Threads of a block.
constexpr u32 THREADS = 256;
// Words of the table of rows that travel with a launch; a longer table is in memory.
constexpr u32 INLINE_WORDS = 384;

// What a kernel is told; `Args` in src/device/cuda/launch.rs is the same, word by word.
struct Args {
    // Tiles of all rows; a block takes every grid-th.
    u64 tiles;
    // The address of the table, or 0 where it is `inlined`.
    u64 table;
    u32 rows;
    // Addresses in a row beside the first, which is written.
    u32 sources;
    // What operands are multiplied with first.
    f64 pre;
    // What is done last: see `Last`.
    u32 last;
    u32 last_integer;
    f64 last_factor;
    f64 last_divisor;
    // What `fill` repeats, in bytes from the first element on.
    u32 pattern[4];
    // Rows of `3 + sources` words: tiles up to the end of this row, elements, the address that is written, and
    // those that are read.
    u64 inlined[INLINE_WORDS];
};

struct alignas(16) Vector {
    u32 word[4];
};

#ifdef __CUDACC__

#define DEVICE __device__ __forceinline__
#define MEMBER static __device__ __forceinline__
#define METHOD __device__ __forceinline__
#define KERNEL(name) extern "C" __global__ void __launch_bounds__(THREADS) name(const __grid_constant__ Args args)

DEVICE u32 thread_index() { return threadIdx.x; }
DEVICE u32 block_index() { return blockIdx.x; }
DEVICE u32 grid_size() { return gridDim.x; }

template <class T> DEVICE T read(u64 address) { return *reinterpret_cast<const T*>(address); }
template <class T> DEVICE void write(u64 address, T value) { *reinterpret_cast<T*>(address) = value; }

DEVICE u32 bits_of(f32 x) { return __float_as_uint(x); }
DEVICE u64 bits_of(f64 x) { return (u64)__double_as_longlong(x); }
DEVICE f32 from_bits(u32 x) { return __uint_as_float(x); }
DEVICE f64 from_bits(u64 x) { return __longlong_as_double((i64)x); }
DEVICE u32 funnel(u32 low, u32 high, u32 bits) { return __funnelshift_r(low, high, bits); }

#else

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define DEVICE static inline
#define MEMBER static inline
#define METHOD inline
// The order of threads is a parameter: a result that depends on it would be a race on a device.
#define KERNEL(name)                                                                   \
    static void name##_thread(const Args& args);                                       \
    extern "C" void name(const Args* args, u32 grid, u32 backwards) {                  \
        the_grid = grid;                                                               \
        for (u32 i = 0; i < grid * THREADS; i++) {                                     \
            u32 at = backwards ? grid * THREADS - 1 - i : i;                           \
            the_block = at / THREADS;                                                  \
            the_thread = at % THREADS;                                                 \
            name##_thread(*args);                                                      \
        }                                                                              \
    }                                                                                  \
    static void name##_thread(const Args& args)

static thread_local u32 the_thread, the_block, the_grid;
DEVICE u32 thread_index() { return the_thread; }
DEVICE u32 block_index() { return the_block; }
DEVICE u32 grid_size() { return the_grid; }

// Memory that the test has lent: what lies outside of it may not even be read.
struct Lent {
    u64 address, bytes;
    u64 writable;
};
static thread_local const Lent* lent;
static thread_local u64 lent_count;
extern "C" void lend(const Lent* list, u64 count) {
    lent = list;
    lent_count = count;
}

static void check(u64 address, u64 bytes, u64 align, bool writes) {
    if (address % align != 0) {
        std::fprintf(stderr, "an access of %llu bytes at %llx is not aligned\n", bytes, address);
        std::abort();
    }
    for (u64 i = 0; i < lent_count; i++) {
        bool inside = lent[i].address <= address && address + bytes <= lent[i].address + lent[i].bytes;
        if (inside && (lent[i].writable || !writes)) return;
    }
    const char* what = writes ? "written" : "read";
    std::fprintf(stderr, "%llu bytes at %llx were not lent to be %s\n", bytes, address, what);
    std::abort();
}

template <class T> DEVICE T read(u64 address) {
    check(address, sizeof(T), alignof(T), false);
    T value;
    std::memcpy(&value, reinterpret_cast<const void*>(address), sizeof(T));
    return value;
}
template <class T> DEVICE void write(u64 address, T value) {
    check(address, sizeof(T), alignof(T), true);
    std::memcpy(reinterpret_cast<void*>(address), &value, sizeof(T));
}

template <class To, class From> DEVICE To same_bits(From x) {
    To to;
    std::memcpy(&to, &x, sizeof(To));
    return to;
}
DEVICE u32 bits_of(f32 x) { return same_bits<u32>(x); }
DEVICE u64 bits_of(f64 x) { return same_bits<u64>(x); }
DEVICE f32 from_bits(u32 x) { return same_bits<f32>(x); }
DEVICE f64 from_bits(u64 x) { return same_bits<f64>(x); }
DEVICE u32 funnel(u32 low, u32 high, u32 bits) { return (u32)(((u64)high << 32 | low) >> bits); }
using std::floor;

#endif
