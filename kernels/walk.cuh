// From rows of addresses to vectors and elements. A row is a run of bytes that is in one piece of every operand;
// rows are cut into tiles, so that blocks share one long row and many short ones alike.
//
// All is read and written 16 bytes at a time, neighbouring threads side by side. What is written is brought to
// 16 bytes by its first elements; an operand that lies otherwise is read in two vectors and shifted (the second
// is the next thread's first, so it comes from the cache). Only what is written at an address that is no multiple
// of its element's size goes by elements, and those by bytes.
#pragma once
#include "number.cuh"

// Units (of vectors) of a tile. `Kernel::tile_elements` in src/device/cuda/launch.rs follows from it.
constexpr u32 TILE_UNITS = 1024;


// 16 bytes from any address. The 16-byte lines that hold them must lie inside the operand.
DEVICE Vector load(u64 address) {
    u32 shift = (u32)address & 15u;
    Vector low = read<Vector>(address - shift);
    if (shift == 0) return low;
    Vector high = read<Vector>(address - shift + 16);
    u32 w[8];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        w[i] = low.word[i];
        w[i + 4] = high.word[i];
    }
    if (shift & 8u) {
#pragma unroll
        for (int i = 0; i < 6; i++) w[i] = w[i + 2];
    }
    if (shift & 4u) {
#pragma unroll
        for (int i = 0; i < 5; i++) w[i] = w[i + 1];
    }
    Vector vector;
#pragma unroll
    for (int i = 0; i < 4; i++) vector.word[i] = funnel(w[i], w[i + 1], (shift & 3u) * 8u);
    return vector;
}

// The elements of a vector.
template <class E> union Lanes {
    Vector vector;
    E at[16 / sizeof(E)];
    METHOD Lanes() {}
    METHOD Lanes(Vector v) : vector(v) {}
};

template <class E> union Bytes {
    E element;
    u8 at[sizeof(E)];
    METHOD Bytes() {}
};

// One element from any address.
template <class E> DEVICE E load_element(u64 address) {
    if (address % alignof(E) == 0) return read<E>(address);
    Bytes<E> bytes;
    for (u32 i = 0; i < sizeof(E); i++) bytes.at[i] = read<u8>(address + i);
    return bytes.element;
}

template <class E> DEVICE void store_element(u64 address, E element) {
    if (address % alignof(E) == 0) {
        write<E>(address, element);
        return;
    }
    Bytes<E> bytes;
    bytes.element = element;
    for (u32 i = 0; i < sizeof(E); i++) write<u8>(address + i, bytes.at[i]);
}

// A row of the table, and the first of its tiles.
struct Row {
    const u64* words;
    u64 first_tile;
    METHOD u64 elements() const { return words[1]; }
    METHOD u64 target() const { return words[2]; }
    METHOD u64 source(u32 i) const { return words[3 + i]; }
};

// The row that a tile belongs to: the first whose end lies beyond it.
DEVICE Row row_of(const Args& args, u64 tile) {
    const u64* table = args.table ? reinterpret_cast<const u64*>(args.table) : args.inlined;
    u32 stride = 3 + args.sources;
    u32 low = 0, high = args.rows - 1;
    while (low < high) {
        u32 middle = (low + high) / 2;
        if (table[(u64)middle * stride] > tile) high = middle;
        else low = middle + 1;
    }
    u64 first = low == 0 ? 0 : table[(u64)(low - 1) * stride];
    return Row{table + (u64)low * stride, first};
}

// How the elements of a row are shared out: `head` of them singly, then `units` of vectors, the rest singly.
struct Cut {
    u64 head, units;
};

// TO and FROM are the sizes of an element as it is written and as it is read.
template <u32 TO, u32 FROM> DEVICE Cut cut(const Row& row, u32 sources) {
    constexpr u32 PER = 16 / (TO < FROM ? TO : FROM);
    u64 elements = row.elements();
    u32 over = (u32)row.target() & 15u;
    u64 head = over ? (16 - over) / TO : 0;
    if (over % TO != 0 || head + PER > elements) return Cut{elements, 0};
    u64 units = (elements - head) / PER;
    bool shifted = false;
    for (u32 i = 0; i < sources; i++) shifted |= ((row.source(i) + head * FROM) & 15u) != 0;
    if (shifted) {
        // Lines at both ends may be partly outside of the operand.
        if (units < 3) return Cut{elements, 0};
        head += PER;
        units -= 2;
    }
    return Cut{head, units};
}

// Gives every unit of vectors and every single element of this block's tiles to `body`, which has
// `units(row, first element, count)` for up to UNROLL units, THREADS apart, and `element(row, i)`. `sources` of a
// row's addresses are operands.
template <u32 TO, u32 FROM, u32 UNROLL, class Body>
DEVICE void walk(const Args& args, bool vectors, u32 sources, const Body& body) {
    constexpr u32 PER = 16 / (TO < FROM ? TO : FROM);
    for (u64 tile = block_index(); tile < args.tiles; tile += grid_size()) {
        Row row = row_of(args, tile);
        u64 own = tile - row.first_tile;
        u64 elements = row.elements();
        Cut part = vectors ? cut<TO, FROM>(row, sources) : Cut{elements, 0};
        if (part.units == 0) {
            u64 end = (own + 1) * TILE_UNITS * PER;
            end = end < elements ? end : elements;
            for (u64 i = own * TILE_UNITS * PER + thread_index(); i < end; i += THREADS) body.element(row, i);
            continue;
        }
        u64 end = (own + 1) * TILE_UNITS;
        end = end < part.units ? end : part.units;
        for (u64 unit = own * TILE_UNITS + thread_index(); unit < end; unit += UNROLL * THREADS) {
            u32 count = (u32)((end - unit + THREADS - 1) / THREADS);
            body.units(row, part.head + unit * PER, count < UNROLL ? count : UNROLL);
        }
        if (own == 0) {
            u64 rest = elements - part.units * PER;
            for (u64 i = thread_index(); i < rest; i += THREADS) {
                body.element(row, i < part.head ? i : i + part.units * PER);
            }
        }
    }
}
