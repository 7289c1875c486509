// Owns attention of a chunk's queries on matrix registers (AMX), over pages of bf16. Queries and weights are rounded to bf16;
// sums are fp32.

#pragma once

#include <immintrin.h>

#include "chunks.h"
#include "tiles.h"

namespace {

constexpr int64_t TILE_KEYS = 128;  // of a block

// Keys → tiles (keys / 16, dim / 32) of 16 pairs of dimensions by 16 keys; what is behind the last key or dimension is 0.
inline void pack_key_tiles(const bf16* keys, const Lines& lines, int dim, int64_t padded, int64_t padded_dim,
                           bf16* packed) {
    for (int64_t first = 0; first < padded; first += 16)
        for (int d = 0; d < padded_dim; d += 32, packed += TILE) {
            Floats x[16];
            const int64_t bytes = (dim - d < 32 ? dim - d : 32) * 2;
            for (int64_t k = 0; k < 16; k++) {
                x[k] = Floats{};
                if (first + k < lines.count) std::memcpy(&x[k], keys + lines.at[first + k] + d, bytes);
            }
            transpose(x);
            std::memcpy(packed, x, sizeof x);
        }
}

// Values → tiles (keys / 32, dim / 16) of 16 pairs of keys by 16 dimensions.
inline void pack_value_tiles(const bf16* values, const Lines& lines, int dim, int64_t padded, int64_t padded_dim,
                             bf16* packed) {
    for (int64_t first = 0; first < padded; first += 32)
        for (int d = 0; d < padded_dim; d += 16, packed += TILE)
            for (int64_t pair = 0; pair < 16; pair++) {
                Words parts[2] = {};
                for (int64_t p = 0; p < 2; p++) {
                    const int64_t key = first + 2 * pair + p;
                    if (key >= lines.count || d >= dim) continue;
                    Halves half;
                    std::memcpy(&half, values + lines.at[key] + d, sizeof half);
                    parts[p] = __builtin_convertvector(half, Words);
                }
                const Words both = parts[0] | parts[1] << 16;
                std::memcpy(packed + pair * 32, &both, sizeof both);
            }
}

// out (32 or 16 rows, 32) = or += a (rows, depth) · two columns of tiles, `b_step` apart; `b_next` leads on in depth.
template <bool TWO_ROWS, bool ADD>
inline void multiply_pair(const bf16* a, int64_t a_stride, const bf16* b, int64_t b_step, int64_t b_next, int64_t depth, float* out,
                          int64_t out_stride) {
    const int64_t line = out_stride * 4;
    if (ADD) {
        _tile_loadd(0, out, line);
        _tile_loadd(1, out + 16, line);
        if (TWO_ROWS) {
            _tile_loadd(2, out + 16 * out_stride, line);
            _tile_loadd(3, out + 16 * out_stride + 16, line);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if (TWO_ROWS) {
            _tile_zero(2);
            _tile_zero(3);
        }
    }
    for (int64_t i = 0; i < depth; i += 32, b += b_next) {
        _tile_loadd(4, a + i, a_stride * 2);
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + b_step, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (TWO_ROWS) {
            _tile_loadd(5, a + 16 * a_stride + i, a_stride * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, out, line);
    _tile_stored(1, out + 16, line);
    if (TWO_ROWS) {
        _tile_stored(2, out + 16 * out_stride, line);
        _tile_stored(3, out + 16 * out_stride + 16, line);
    }
}

// See `attend_span`.
inline void attend_span_by_tiles(const float* query, const bf16* keys, const bf16* values, const Queries& queries, int64_t begin,
                                 int64_t end, float* out, Sums* sums) {
    const Shape& shape = queries.shape;
    const int dim = shape.dim;
    const int64_t padded_dim = (dim + 31) / 32 * 32, rows = (queries.count + 15) / 16 * 16;
    const Scores how(shape);
    static thread_local Scratch<bf16> space;
    static thread_local Scratch<float> sums_space;
    bf16* rounded = space.take(rows * padded_dim + 2 * TILE_KEYS * padded_dim + rows * TILE_KEYS);
    bf16 *packed = rounded + rows * padded_dim, *packed_values = packed + TILE_KEYS * padded_dim;
    bf16* weights = packed_values + TILE_KEYS * padded_dim;
    float *mixed = sums_space.take(rows * padded_dim + rows * TILE_KEYS), *scores = mixed + rows * padded_dim;
    begin_sums(queries, sums, mixed, rows * padded_dim);
    std::memset((void*)rounded, 0, rows * padded_dim * sizeof(bf16));
    for (int64_t row = 0; row < queries.count; row++)
        for (int d = 0; d < dim; d += LANES) store(rounded + row * padded_dim + d, load(query + row * dim + d));
    configure(16, 16);
    for (int64_t block = begin; block < end; block += TILE_KEYS) {
        const int64_t count = end - block < TILE_KEYS ? end - block : TILE_KEYS, padded = (count + 31) / 32 * 32;
        const int64_t first = queries.first_of(block), last = queries.last_of(block + count);
        if (first >= last) continue;
        const int64_t next_block = block + count, next_end = next_block + TILE_KEYS < end ? next_block + TILE_KEYS : end;
        const Lines lines(queries.part, shape, block, next_block), ahead(queries.part, shape, next_block, next_end);
        pack_key_tiles(keys, lines, dim, padded, padded_dim, packed);
        fetch(keys, ahead, dim);
        pack_value_tiles(values, lines, dim, padded, padded_dim, packed_values);
        fetch(values, ahead, dim);
        for (int64_t row = first / 16 * 16; row < last;) {
            const bool two = row + 16 < last;
            const int64_t next = row + (two ? 32 : 16), end_row = next < last ? next : last;
            const int64_t most = queries.ends[end_row - 1] - block, seen = most < count ? most : count;
            const int64_t used = (seen + 31) / 32 * 32;
            for (int64_t key = 0; key < used; key += 32)
                (two ? multiply_pair<true, false> : multiply_pair<false, false>)(
                    rounded + row * padded_dim, padded_dim, packed + key * padded_dim, 16 * padded_dim, TILE, padded_dim,
                    scores + row * TILE_KEYS + key, TILE_KEYS);
            for (int64_t own = row; own < next; own++) {
                bf16* line = weights + own * TILE_KEYS;
                if (own < first || own >= last) {
                    std::memset((void*)line, 0, used * sizeof(bf16));
                    continue;
                }
                weigh<true>(scores + own * TILE_KEYS, used, queries.begins[own] - block, queries.ends[own] - block, how, sums[own],
                             mixed + own * padded_dim, dim, [&](int64_t i, Floats x, Floats y) { store_two(line + i, x, y); });
            }
            for (int64_t d = 0; d < padded_dim; d += 32)
                (two ? multiply_pair<true, true> : multiply_pair<false, true>)(
                    weights + row * TILE_KEYS, TILE_KEYS, packed_values + d * 32, TILE, padded_dim * 32, used,
                    mixed + row * padded_dim + d, padded_dim);
            row = next;
        }
    }
    _tile_release();
    for (int64_t row = 0; row < queries.count; row++)
        std::memcpy(out + row * dim, mixed + row * padded_dim, dim * sizeof(float));
}

}  // namespace
