// Owns what stands between a CPU's products in a layer: rotation, KV write and paged attention of new tokens, a row
// each. A row's result depends on nothing but the row, so a batched sequence equals itself run alone bit for bit.

#pragma once

#include <cmath>
#include <vector>

#include "vectors.h"

namespace {

// One row's heads: made finite, normed if there are weights, the first `rotary` dimensions turned in adjacent pairs.
template <typename Model>
void rotate_heads(const Model* from, float* to, int heads, int dim, int rotary, const float* turn, const float* weight,
                  float eps) {
    const Floats sign = {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1};
    for (int head = 0; head < heads; head++, from += dim, to += dim) {
        Floats squares{};
        for (int i = 0; i < dim; i += LANES) {
            Floats x = load(from + i);
            x = x - x == splat(0.0f) ? x : splat(0.0f);  // a masked NaN would spoil the pages' next owner
            squares += x * x;
            store(to + i, x);
        }
        if (weight) {
            const float scale = 1.0f / std::sqrt(sum(squares) / dim + eps);
            for (int i = 0; i < dim; i += LANES) store(to + i, load(to + i) * scale * load(weight + head * dim + i));
        }
        for (int i = 0; i < rotary; i += LANES) {
            const Floats x = load(to + i), pairs = load(turn + i);
            const Floats cosine = __builtin_shufflevector(pairs, pairs, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14);
            const Floats sine = __builtin_shufflevector(pairs, pairs, 1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13, 15, 15);
            const Floats partner = __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
            store(to + i, x * cosine + partner * sine * sign);
        }
    }
}

template <typename Kept>
void put(const float* from, Kept* to, int count) {
    for (int i = 0; i < count; i += LANES) store(to + i, load(from + i));
}

struct Shape {
    int heads, kv_heads, dim, page_tokens;
};

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

// Up to four query heads that share a key head, over one page: their scores, then their weighted values.
template <int VECTORS, int QUERIES, typename Kept>
void score_page(const float* query, const Kept* keys, const Kept* ahead, int count, int stride, float* scores,
                int64_t width, float scale) {
    Floats q[QUERIES][VECTORS], key[VECTORS];
    for (int g = 0; g < QUERIES; g++)
        for (int i = 0; i < VECTORS; i++) q[g][i] = load(query + (g * VECTORS + i) * LANES) * scale;
    for (int start = 0; start < count; start += LANES) {
        Floats dots[QUERIES][LANES] = {};
        const int here = count - start < LANES ? count - start : LANES;
        for (int t = 0; t < here; t++, keys += stride, ahead += stride) {
            fetch<VECTORS>(ahead);
            load_head<VECTORS>(keys, key);
            for (int g = 0; g < QUERIES; g++) {
                Floats dot = q[g][0] * key[0];
                for (int i = 1; i < VECTORS; i++) dot += q[g][i] * key[i];
                dots[g][t] = dot;
            }
        }
        for (int g = 0; g < QUERIES; g++) store(scores + g * width + start, sums(dots[g]));
    }
}

template <int VECTORS, int QUERIES, typename Kept>
void gather_page(float* out, const Kept* values, const Kept* ahead, int count, int stride, const float* weights,
                 int64_t width) {
    Floats mixed[QUERIES][VECTORS], value[VECTORS];
    for (int g = 0; g < QUERIES; g++)
        for (int i = 0; i < VECTORS; i++) mixed[g][i] = load(out + (g * VECTORS + i) * LANES);
    for (int t = 0; t < count; t++, values += stride, ahead += stride) {
        fetch<VECTORS>(ahead);
        load_head<VECTORS>(values, value);
        for (int g = 0; g < QUERIES; g++)
            for (int i = 0; i < VECTORS; i++) mixed[g][i] += weights[g * width + t] * value[i];
    }
    for (int g = 0; g < QUERIES; g++)
        for (int i = 0; i < VECTORS; i++) store(out + (g * VECTORS + i) * LANES, mixed[g][i]);
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

// Consecutive rows of one sequence: they see the same pages.
struct Run {
    int64_t rows;
    const int32_t* table;
};

constexpr int64_t BLOCK_ROWS = 8;  // of one run, which share each key that is loaded

// `count` rows of one run; row r sees the first lengths[r] positions. query and out are (kv_heads, count, group, dim).
// What a row does not see has a weight of 0, so that it does not matter who stands in the block with it. `after` is
// fetched last: the first of the keys that the next block begins with.
template <int VECTORS, typename Kept>
void attend_block(float* query, const Kept* keys, const Kept* values, const Kept* after, const int32_t* table,
                  int64_t count, const int32_t* lengths, Shape shape, float* out, float* scores, int64_t width) {
    const int group = shape.heads / shape.kv_heads, stride = shape.kv_heads * shape.dim, together = count * group;
    const int64_t page_size = (int64_t)shape.page_tokens * stride;
    const float scale = 1.0f / std::sqrt((float)shape.dim);
    int64_t longest = 0;
    for (int64_t row = 0; row < count; row++) longest = lengths[row] > longest ? lengths[row] : longest;
    reorder<VECTORS, Kept>(query, count * shape.heads, false);
    for (bool scoring : {true, false}) {
        const Kept *kept = scoring ? keys : values, *last_ahead = scoring ? values + table[0] * page_size : after;
        for (int64_t at = 0, page = 0; at < longest; at += shape.page_tokens, page++) {
            const bool is_last = at + shape.page_tokens >= longest;
            const int tokens = is_last ? longest - at : shape.page_tokens;
            const Kept* here = kept + table[page] * page_size;
            const Kept* ahead = is_last ? last_ahead : kept + table[page + 1] * page_size;
            for (int head = 0; head < shape.kv_heads; head++)
                Pages<VECTORS, Kept>::group(scoring, together, (scoring ? query : out) + head * together * shape.dim,
                                            here + head * shape.dim, ahead + head * shape.dim, tokens, stride,
                                            scores + head * together * width + at, width, scale);
        }
        if (scoring)
            for (int64_t i = 0; i < count * shape.heads; i++)
                softmax(scores + i * width, lengths[i % together / group], width);
    }
    reorder<VECTORS, Kept>(out, count * shape.heads, true);
}

template <typename Kept>
bool attend_any(float* query, const Kept* keys, const Kept* values, const Kept* after, const int32_t* table,
                int64_t count, const int32_t* lengths, Shape shape, float* out, float* scores, int64_t width) {
    switch (shape.dim / LANES) {
#define DIM(VECTORS)                                                                                             \
    case VECTORS:                                                                                                \
        return attend_block<VECTORS>(query, keys, values, after, table, count, lengths, shape, out, scores, width), \
               true;
        DIM(1) DIM(2) DIM(4) DIM(5) DIM(6) DIM(8)  // heads of 16, 32, 64, 80, 96 and 128
#undef DIM
    }
    return false;
}

// Rows of (heads, dim) as (kv_heads, rows, group, dim), or back.
inline void regroup(const float* from, float* to, int64_t count, Shape shape, bool back) {
    const int64_t size = (int64_t)(shape.heads / shape.kv_heads) * shape.dim;
    for (int64_t row = 0; row < count; row++)
        for (int64_t head = 0; head < shape.kv_heads; head++) {
            const int64_t by_row = (row * shape.kv_heads + head) * size, by_head = (head * count + row) * size;
            std::memcpy(to + (back ? by_row : by_head), from + (back ? by_head : by_row), size * sizeof(float));
        }
}

// `runs` null: each row is one, with a line of `tables`.
template <typename Model, typename Kept>
int decode_rows(int64_t rows, const Model* qkv, Kept* keys, Kept* values, const int64_t* write_index, const Run* runs,
                const int32_t* tables, int64_t table_stride, const int32_t* lengths, const float* rotation, int rotary,
                const float* weight, float eps, Shape shape, Model* out, int64_t out_stride) {
    const int kept_width = shape.kv_heads * shape.dim, query_width = shape.heads * shape.dim;
    const int64_t page_size = (int64_t)shape.page_tokens * kept_width, product_width = query_width + 2 * kept_width;
    int64_t longest = 0;
    for (int64_t row = 0; row < rows; row++) longest = lengths[row] > longest ? lengths[row] : longest;
    // Scores are written sixteen at a time, so a head's may run over by as many.
    const int64_t most_width = (longest + 2 * LANES - 1) / LANES * LANES;
    static thread_local std::vector<float> space;
    const size_t needed = rows * query_width + kept_width + BLOCK_ROWS * (2 * query_width + shape.heads * most_width);
    if (space.size() < needed) space.resize(needed + needed / 2);
    float *queries = space.data(), *kept = queries + rows * query_width, *grouped = kept + kept_width;
    float *mixed = grouped + BLOCK_ROWS * query_width, *scores = mixed + BLOCK_ROWS * query_width;

    // All keys and values first: a row of a bidirectional prefix sees those of rows behind it.
    for (int64_t row = 0; row < rows; row++) {
        const Model* own = qkv + row * product_width;
        const float *turn = rotation + row * rotary, *key_weight = weight ? weight + query_width : nullptr;
        rotate_heads(own, queries + row * query_width, shape.heads, shape.dim, rotary, turn, weight, eps);
        rotate_heads(own + query_width, kept, shape.kv_heads, shape.dim, rotary, turn, key_weight, eps);
        put(kept, keys + write_index[row] * kept_width, kept_width);
        rotate_heads(own + query_width + kept_width, kept, shape.kv_heads, shape.dim, 0, turn, (const float*)nullptr, 0.0f);
        put(kept, values + write_index[row] * kept_width, kept_width);
    }

    Run run{0, nullptr};
    int64_t left = 0;  // of the run
    for (int64_t row = 0, count; row < rows; row += count) {
        if (!left) {
            run = runs ? *runs++ : Run{1, tables + row * table_stride};
            left = run.rows;
        }
        count = left < BLOCK_ROWS ? left : BLOCK_ROWS;
        left -= count;
        int64_t width = 0;
        for (int64_t i = 0; i < count; i++) width = lengths[row + i] > width ? lengths[row + i] : width;
        width = (width + 2 * LANES - 1) / LANES * LANES;
        float* query = queries + row * query_width;
        if (count > 1) regroup(query, grouped, count, shape, false);
        const bool is_end = row + count == rows;
        const int32_t* next = left || is_end ? run.table : runs ? runs->table : run.table + table_stride;
        std::memset(mixed, 0, count * query_width * sizeof(float));
        if (!attend_any<Kept>(count > 1 ? grouped : query, keys, values, keys + next[0] * page_size, run.table, count,
                              lengths + row, shape, mixed, scores, width))
            return 1;
        if (count > 1) regroup(mixed, grouped, count, shape, true);
        for (int64_t i = 0; i < count; i++)
            put((count > 1 ? grouped : mixed) + i * query_width, out + (row + i) * out_stride, query_width);
    }
    return 0;
}

}  // namespace
