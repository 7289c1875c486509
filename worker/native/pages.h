// Owns attention of new tokens over pages of keys and values, on one thread: scores, softmax, weighted values.

#pragma once

#include <cmath>

#include "units.h"
#include "vectors.h"

namespace {

// A head's vectors as they come out of the pages quickest. fp32 in order; of bf16 two vectors share one load, the even
// dimensions being its lower halves and the odd ones its upper: an operation each, where widening in order takes two.
template <int VECTORS>
inline void load_head(const float* at, Floats* x) {
    for (int i = 0; i < VECTORS; i++) x[i] = load(at + i * LANES);
}

template <int VECTORS>
inline void load_head(const bf16* at, Floats* x) {
    for (int i = 0; i + 1 < VECTORS; i += 2) {
        Words pairs;
        std::memcpy(&pairs, at + i * LANES, sizeof pairs);
        x[i] = (Floats)(pairs << 16);
        x[i + 1] = (Floats)(pairs & 0xffff0000);
    }
    if (VECTORS % 2) x[VECTORS - 1] = load(at + (VECTORS - 1) * LANES);
}

// Heads of floats into that order, or out of it.
template <int VECTORS, typename Kept>
void reorder(float* row, int heads, bool back) {
    if (sizeof(Kept) == sizeof(float)) return;
    for (int head = 0; head < heads; head++, row += VECTORS * LANES)
        for (int i = 0; i + 1 < VECTORS; i += 2) {
            float *first = row + i * LANES, *second = first + LANES;
            const Floats x = load(first), y = load(second);
            store(first, back ? lower_pairs(x, y) : evens(x, y));
            store(second, back ? upper_pairs(x, y) : odds(x, y));
        }
}

// A head's part of the page that comes next is fetched line by line while this one's is used: pages lie apart, and
// the processor's own prefetching ends with each.
template <int VECTORS, typename Kept>
inline void fetch(const Kept* ahead) {
    for (int i = 0; i < VECTORS * LANES; i += 64 / sizeof(Kept)) __builtin_prefetch(ahead + i);
}

// Where registers are few, keys are taken two at a time and values by so many of a head's vectors that sums stay in them.
constexpr int TOGETHER = LANES == 8 ? 2 : 1;
constexpr int vectors_at_once(int vectors, int queries) {
    if (LANES != 8) return vectors;
    int most = vectors;
    while (most > 2 && (most * queries > 12 || vectors % most || most % 2)) most--;
    return most;
}

// Up to four query heads that share a key head, over one page: their scores, then their weighted values.
template <int VECTORS, int QUERIES, typename Kept>
void score_page(const float* query, const Kept* keys, const Kept* ahead, int count, int stride, float* scores,
                int64_t width, float scale) {
    Floats q[QUERIES][VECTORS];
    for (int g = 0; g < QUERIES; g++)
        for (int i = 0; i < VECTORS; i++) q[g][i] = load(query + (g * VECTORS + i) * LANES) * scale;
    for (int start = 0; start < count; start += LANES) {
        Floats dots[QUERIES][LANES] = {};
        const int here = count - start < LANES ? count - start : LANES;
        for (int t = 0; t < here; t += TOGETHER, keys += TOGETHER * stride, ahead += TOGETHER * stride) {
            Floats dot[TOGETHER][QUERIES], key[TOGETHER][VECTORS];
            for (int k = 0; k < TOGETHER; k++) {
                const int own = t + k < here ? k * stride : 0;  // nobody reads what is behind the last one's score
                fetch<VECTORS>(ahead + own);
                load_head<VECTORS>(keys + own, key[k]);
            }
            for (int k = 0; k < TOGETHER; k++)
                for (int g = 0; g < QUERIES; g++) dot[k][g] = q[g][0] * key[k][0];
            for (int i = 1; i < VECTORS; i++)
                for (int k = 0; k < TOGETHER; k++)
                    for (int g = 0; g < QUERIES; g++) dot[k][g] += q[g][i] * key[k][i];
            for (int k = 0; k < TOGETHER; k++)
                for (int g = 0; g < QUERIES; g++) dots[g][t + k] = dot[k][g];
        }
        for (int g = 0; g < QUERIES; g++) store(scores + g * width + start, sums(dots[g]));
    }
}

template <int VECTORS, int QUERIES, typename Kept>
void gather_page(float* out, const Kept* values, const Kept* ahead, int count, int stride, const float* weights,
                 int64_t width) {
    constexpr int PART = vectors_at_once(VECTORS, QUERIES);
    for (int part = 0; part < VECTORS; part += PART, out += PART * LANES, values += PART * LANES, ahead += PART * LANES) {
        Floats mixed[QUERIES][PART], value[PART];
        for (int g = 0; g < QUERIES; g++)
            for (int i = 0; i < PART; i++) mixed[g][i] = load(out + (g * VECTORS + i) * LANES);
        for (int t = 0; t < count; t++) {
            fetch<PART>(ahead + t * stride);
            load_head<PART>(values + t * stride, value);
            for (int g = 0; g < QUERIES; g++)
                for (int i = 0; i < PART; i++) mixed[g][i] += weights[g * width + t] * value[i];
        }
        for (int g = 0; g < QUERIES; g++)
            for (int i = 0; i < PART; i++) store(out + (g * VECTORS + i) * LANES, mixed[g][i]);
    }
}

template <int VECTORS, typename Kept>
struct Pages {
    template <int QUERIES>
    static void visit(bool scoring, float* rows, const Kept* kept, const Kept* ahead, int count, int stride,
                      float* scores, int64_t width, float scale) {
        if (scoring)
            score_page<VECTORS, QUERIES>(rows, kept, ahead, count, stride, scores, width, scale);
        else
            gather_page<VECTORS, QUERIES>(rows, kept, ahead, count, stride, scores, width);
    }

    static void group(bool scoring, int queries, float* rows, const Kept* kept, const Kept* ahead, int count,
                      int stride, float* scores, int64_t width, float scale) {
        for (; queries >= 4; queries -= 4, rows += 4 * VECTORS * LANES, scores += 4 * width)
            visit<4>(scoring, rows, kept, ahead, count, stride, scores, width, scale);
        if (queries == 3) visit<3>(scoring, rows, kept, ahead, count, stride, scores, width, scale);
        if (queries == 2) visit<2>(scoring, rows, kept, ahead, count, stride, scores, width, scale);
        if (queries == 1) visit<1>(scoring, rows, kept, ahead, count, stride, scores, width, scale);
    }
};

// Over the first `length` of `width` scores; what lies behind becomes 0.
void softmax(float* scores, int64_t length, int64_t width) {
    for (int64_t i = length; i < width; i++) scores[i] = -INFINITY;
    Floats most = splat(-INFINITY);
    for (int64_t i = 0; i < width; i += LANES) {
        const Floats x = load(scores + i);
        most = x > most ? x : most;
    }
    const float top = largest(most);
    for (int64_t i = 0; i < width; i += LANES) store(scores + i, exponential(load(scores + i) - top));
    for (int64_t i = length; i < width; i++) scores[i] = 0.0f;
    Floats total{};
    for (int64_t i = 0; i < width; i += LANES) total += load(scores + i);
    const float inverse = 1.0f / sum(total);
    for (int64_t i = 0; i < width; i += LANES) store(scores + i, load(scores + i) * inverse);
}

// Row r sees the first lengths[r] positions. query and out are (kv_heads, count, group, dim) of the block's heads.
// What a row does not see has a weight of 0, so that it does not matter who stands in the block with it. `after` is
// fetched last: the first of the keys that the next block begins with.
template <int VECTORS, typename Kept>
void attend_block(float* query, const Kept* keys, const Kept* values, const Block& block, Shape shape, float* out,
                  float* scores, int64_t width) {
    const int group = shape.heads / shape.kv_heads, stride = shape.kv_heads * shape.dim, together = block.count * group;
    const int heads = block.last_head - block.first_head;
    const int64_t page_size = (int64_t)shape.page_tokens * stride;
    const int32_t* table = block.table;
    const float scale = 1.0f / std::sqrt((float)shape.dim);
    int64_t longest = 0;
    for (int64_t row = 0; row < block.count; row++) longest = block.lengths[row] > longest ? block.lengths[row] : longest;
    reorder<VECTORS, Kept>(query, heads * together, false);
    for (bool scoring : {true, false}) {
        const Kept *kept = scoring ? keys : values;
        const Kept* last_ahead = scoring ? values + table[0] * page_size : keys + block.next_page * page_size;
        for (int64_t at = 0, page = 0; at < longest; at += shape.page_tokens, page++) {
            const bool is_last = at + shape.page_tokens >= longest;
            const int tokens = is_last ? longest - at : shape.page_tokens;
            const Kept* here = kept + table[page] * page_size;
            const Kept* ahead = is_last ? last_ahead : kept + table[page + 1] * page_size;
            for (int head = 0; head < heads; head++) {
                const int offset = (block.first_head + head) * shape.dim;
                Pages<VECTORS, Kept>::group(scoring, together, (scoring ? query : out) + head * together * shape.dim,
                                            here + offset, ahead + offset, tokens, stride,
                                            scores + head * together * width + at, width, scale);
            }
        }
        if (scoring)
            for (int64_t i = 0; i < heads * together; i++)
                softmax(scores + i * width, block.lengths[i % together / group], width);
    }
    reorder<VECTORS, Kept>(out, heads * together, true);
}

template <typename Kept>
void attend_any(float* query, const Kept* keys, const Kept* values, const Block& block, Shape shape, float* out,
                float* scores, int64_t width) {
    switch (shape.dim) {
#define DIM(SIZE) \
    case SIZE: return attend_block<SIZE / LANES>(query, keys, values, block, shape, out, scores, width);
        DIM(16) DIM(32) DIM(64) DIM(80) DIM(96) DIM(128)
#undef DIM
    }
}

}  // namespace
