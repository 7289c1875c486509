// Owns attention of a chunk's queries by dot products of bf16 pairs (AVX512-BF16), over pages of bf16. Queries and weights are
// rounded to bf16; sums are fp32.
//
// Six queries at a time go through a block: their scores and weights stay in the first-level cache, keys and values in the second.

#pragma once

#include <immintrin.h>

#include "chunks.h"

namespace {

constexpr int64_t DOT_KEYS = MOST_KEYS;  // of a block: fewer, and joining blocks shows

// out (ROWS, VECS vectors) = or += a (ROWS, pairs) · b (pairs, VECS vectors), each element of a and b a pair.
template <int ROWS, int VECS, bool ADD>
inline void multiply_pairs(const bf16* a, int64_t a_stride, const bf16* b, int64_t pairs, float* out, int64_t out_stride) {
    Floats sums[ROWS][VECS] = {};
    if (ADD)
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECS; v++) sums[r][v] = load(out + r * out_stride + v * LANES);
#pragma GCC unroll 1
    for (int64_t i = 0; i < pairs; i++, b += VECS * 2 * LANES) {
        __m512bh w[VECS];
        for (int v = 0; v < VECS; v++) w[v] = (__m512bh)_mm512_loadu_si512(b + v * 2 * LANES);
        for (int r = 0; r < ROWS; r++) {
            int32_t pair;
            std::memcpy(&pair, a + r * a_stride + 2 * i, sizeof pair);
            const __m512bh one = (__m512bh)_mm512_set1_epi32(pair);
            for (int v = 0; v < VECS; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], one, w[v]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECS; v++) store(out + r * out_stride + v * LANES, sums[r][v]);
}

template <int VECS, bool ADD>
inline void multiply_pairs_of(int64_t rows, const bf16* a, int64_t a_stride, const bf16* b, int64_t pairs, float* out,
                              int64_t out_stride) {
    switch (rows) {
#define ROWS(COUNT) \
    case COUNT: return multiply_pairs<COUNT, VECS, ADD>(a, a_stride, b, pairs, out, out_stride);
        ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6)
#undef ROWS
    }
}

// Keys → panels (dim / 2, PANEL keys) of pairs of dimensions; those behind the last are 0.
inline void pack_key_pairs(const bf16* keys, const Lines& lines, int dim, bf16* packed) {
    for (int64_t first = 0; first < lines.count; first += PANEL, packed += dim * PANEL)
        for (int64_t part = 0; part < PANEL; part += LANES)
            for (int d = 0; d < dim; d += 2 * LANES) {
                const int wide = dim - d < 2 * LANES ? dim - d : 2 * LANES;
                Floats x[LANES];
                for (int64_t k = 0; k < LANES; k++) {
                    const int64_t key = first + part + k;
                    x[k] = Floats{};
                    if (key < lines.count) std::memcpy(&x[k], keys + lines.at[key] + d, wide * sizeof(bf16));
                }
                transpose(x);
                for (int pair = 0; pair < wide / 2; pair++)
                    std::memcpy((void*)(packed + ((d / 2 + pair) * PANEL + part) * 2), &x[pair], sizeof x[pair]);
            }
}

// Values → panels (keys / 2, at most PANEL of the dimensions) of pairs of keys; a key behind the last is 0.
inline void pack_value_pairs(const bf16* values, const Lines& lines, int dim, bf16* packed) {
    for (int first = 0; first < dim; first += PANEL, packed += DOT_KEYS * PANEL) {
        const int width = dim - first < PANEL ? dim - first : PANEL;
        for (int64_t key = 0; key < in_pairs(lines.count); key += 2)
            for (int d = 0; d < width; d += LANES) {
                Words parts[2] = {};
                for (int64_t p = 0; p < 2 && key + p < lines.count; p++) {
                    Halves half;
                    std::memcpy(&half, values + lines.at[key + p] + first + d, sizeof half);
                    parts[p] = __builtin_convertvector(half, Words);
                }
                const Words both = parts[0] | parts[1] << 16;
                std::memcpy((void*)(packed + (key / 2 * width + d) * 2), &both, sizeof both);
            }
    }
}

// See `attend_span`.
inline void attend_span_by_dots(const float* query, const bf16* keys, const bf16* values, const Queries& queries, int64_t begin,
                                int64_t end, float* out, Sums* sums) {
    const Shape& shape = queries.shape;
    const int dim = shape.dim;
    const Scores how(shape);
    static thread_local Scratch<bf16> space;
    const int64_t value_panels = (dim + PANEL - 1) / PANEL;
    bf16* packed = space.take(DOT_KEYS * (dim + value_panels * PANEL) + queries.count * dim);
    bf16 *packed_values = packed + DOT_KEYS * dim, *rounded = packed_values + DOT_KEYS * value_panels * PANEL;
    alignas(64) float scores[ROWS_TOGETHER * DOT_KEYS];  // and weights in their place, in the first half of each line
    begin_sums(queries, sums, out, queries.count * dim);
    for (int64_t i = 0; i < queries.count * dim; i += LANES) store(rounded + i, load(query + i));
    for (int64_t block = begin; block < end; block += DOT_KEYS) {
        const int64_t count = end - block < DOT_KEYS ? end - block : DOT_KEYS;
        const int64_t first = queries.first_of(block), last = queries.last_of(block + count);
        if (first >= last) continue;
        const int64_t next_block = block + count, next_end = next_block + DOT_KEYS < end ? next_block + DOT_KEYS : end;
        const Lines lines(queries.part, shape, block, next_block), ahead(queries.part, shape, next_block, next_end);
        pack_key_pairs(keys, lines, dim, packed);
        fetch(keys, ahead, dim);
        pack_value_pairs(values, lines, dim, packed_values);
        fetch(values, ahead, dim);
        const int64_t groups = (last - first + ROWS_TOGETHER - 1) / ROWS_TOGETHER;
        for (int64_t group = 0; group < groups; group++) {
            const int64_t row = first + (last - first) * group / groups, next = first + (last - first) * (group + 1) / groups;
            const int64_t most = queries.ends[next - 1] - block, seen = most < count ? most : count;
            const int64_t used = in_pairs(seen), rows = next - row;
            for (int64_t key = 0; key < seen; key += PANEL)
                multiply_pairs_of<(int)VECTORS, false>(rows, rounded + row * dim, dim, packed + key * dim, dim / 2, scores + key, DOT_KEYS);
            for (int64_t own = row; own < next; own++) {
                float* line = scores + (own - row) * DOT_KEYS;
                weigh<true>(line, used, queries.begins[own] - block, queries.ends[own] - block, how, sums[own], out + own * dim, dim,
                            [&](int64_t i, Floats x, Floats y) { store_two((bf16*)line + i, x, y); });
            }
            const bf16* weights = (const bf16*)scores;
            for (int64_t panel = 0; panel < value_panels; panel++) {
                const int width = dim - panel * PANEL < PANEL ? dim - panel * PANEL : PANEL;
                const bf16* from = packed_values + panel * DOT_KEYS * PANEL;
                float* to = out + row * dim + panel * PANEL;
                switch (width / LANES) {
                    case 1: multiply_pairs_of<1, true>(rows, weights, 2 * DOT_KEYS, from, used / 2, to, dim); break;
                    case 2: multiply_pairs_of<2, true>(rows, weights, 2 * DOT_KEYS, from, used / 2, to, dim); break;
                    default: multiply_pairs_of<(int)VECTORS, true>(rows, weights, 2 * DOT_KEYS, from, used / 2, to, dim);
                }
            }
        }
    }
}

}  // namespace
