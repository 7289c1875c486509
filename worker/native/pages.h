// Owns attention of single rows over pages of keys and values, on one thread: scores, softmax, weighted values.

#pragma once

#include <vector>

#include "softmax.h"
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

// Where registers do not hold a head, keys are taken several at a time, and values by so many of a head's vectors that sums stay
// in them. A short vector's sums would also wait for one another: so four keys of two vectors each at once.
constexpr int TOGETHER = LANES == 4 ? 4 : LANES == 8 ? 2 : 1;
constexpr int key_vectors_at_once(int vectors) { return LANES == 4 ? 2 : vectors; }
constexpr int vectors_at_once(int vectors, int queries) {
    if (LANES == 16) return vectors;
    int most = vectors;
    while (most > 2 && (most * queries > (LANES == 4 ? 20 : 12) || vectors % most || most % 2)) most--;
    return most;
}

// Up to four query heads that share a key head, over one page: their scores, then their weighted values.
template <int VECTORS, int QUERIES, typename Kept>
void score_page(const float* query, const Kept* keys, const Kept* ahead, int count, int stride, float* scores,
                int64_t width) {
    constexpr int PART = key_vectors_at_once(VECTORS);
    Floats q[QUERIES][VECTORS];
    for (int g = 0; g < QUERIES; g++)
        for (int i = 0; i < VECTORS; i++) q[g][i] = load(query + (g * VECTORS + i) * LANES);
    for (int start = 0; start < count; start += LANES) {
        Floats dots[QUERIES][LANES] = {};
        const int here = count - start < LANES ? count - start : LANES;
        for (int t = 0; t < here; t += TOGETHER, keys += TOGETHER * stride, ahead += TOGETHER * stride) {
            Floats dot[TOGETHER][QUERIES], key[TOGETHER][PART];
            for (int k = 0; k < TOGETHER; k++) {
                const int own = t + k < here ? k * stride : 0;  // nobody reads what is behind the last one's score
                fetch<VECTORS>(ahead + own);
                load_head<PART>(keys + own, key[k]);
            }
            for (int k = 0; k < TOGETHER; k++)
                for (int g = 0; g < QUERIES; g++) dot[k][g] = q[g][0] * key[k][0];
            for (int i = 1; i < PART; i++)
                for (int k = 0; k < TOGETHER; k++)
                    for (int g = 0; g < QUERIES; g++) dot[k][g] += q[g][i] * key[k][i];
            for (int part = PART; part < VECTORS; part += PART) {
                for (int k = 0; k < TOGETHER; k++) load_head<PART>(keys + (t + k < here ? k * stride : 0) + part * LANES, key[k]);
                for (int i = 0; i < PART; i++)
                    for (int k = 0; k < TOGETHER; k++)
                        for (int g = 0; g < QUERIES; g++) dot[k][g] += q[g][part + i] * key[k][i];
            }
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
                      float* scores, int64_t width) {
        if (scoring)
            score_page<VECTORS, QUERIES>(rows, kept, ahead, count, stride, scores, width);
        else
            gather_page<VECTORS, QUERIES>(rows, kept, ahead, count, stride, scores, width);
    }

    static void group(bool scoring, int queries, float* rows, const Kept* kept, const Kept* ahead, int count,
                      int stride, float* scores, int64_t width) {
        for (; queries >= 4; queries -= 4, rows += 4 * VECTORS * LANES, scores += 4 * width)
            visit<4>(scoring, rows, kept, ahead, count, stride, scores, width);
        if (queries == 3) visit<3>(scoring, rows, kept, ahead, count, stride, scores, width);
        if (queries == 2) visit<2>(scoring, rows, kept, ahead, count, stride, scores, width);
        if (queries == 1) visit<1>(scoring, rows, kept, ahead, count, stride, scores, width);
    }
};

// Products become weights, whose sum and largest exponent are given back. Behind the last of `count` there is room for a vector.
inline float softmax(float* scores, int64_t count, const Scores& how, float& top) {
    for (int64_t i = count; i < (count + LANES - 1) / LANES * LANES; i++) scores[i] = 0.0f;
    Floats most = splat(LOWEST), total{};
    Ints lanes;
    for (int lane = 0; lane < LANES; lane++) lanes[lane] = lane;
    for (int64_t i = 0; i < count; i += LANES) {
        Floats x = load(scores + i);
        x = (how.cap == 0.0f ? x : how.capped(x)) * how.scale;
        x = lanes < (int32_t)(count - i) ? x : splat(LOWEST);
        most = greater_of(x, most);
        store(scores + i, x);
    }
    top = largest(most);
    for (int64_t i = 0; i < count; i += LANES) {
        const Floats x = power_of_two(load(scores + i) - top), weight = lanes < (int32_t)(count - i) ? x : splat(0.0f);
        total += weight;
        store(scores + i, weight);
    }
    return sum(total);
}

// One row over keys from part.begin to part.end. The part's next page is fetched last: the first of the keys that the next part
// begins with.
template <int VECTORS, typename Kept>
void attend_row(float* query, const Kept* keys, const Kept* values, const Part& part, const Shape& shape, float* out, float* tops,
                float* totals) {
    const int group = shape.heads / shape.kv_heads, stride = shape.kv_heads * shape.dim;
    const int heads = part.last_head - part.first_head;
    const int64_t page_size = (int64_t)shape.page_tokens * stride, count = part.end - part.begin;
    const int64_t first_page = part.begin / shape.page_tokens;
    const Scores how(shape);
    // Scores are written a vector at a time, so a head's may run over by as many.
    const int64_t width = (count + 2 * LANES - 1) / LANES * LANES;
    static thread_local std::vector<float> space;
    if ((int64_t)space.size() < heads * group * width) space.resize(heads * group * width);
    float* scores = space.data();
    std::memset(out, 0, sizeof(float) * heads * group * shape.dim);
    reorder<VECTORS, Kept>(query, heads * group, false);
    for (bool scoring : {true, false}) {
        const Kept* kept = scoring ? keys : values;
        const Kept* last_ahead = scoring ? values + part.table[first_page] * page_size : keys + part.next_page * page_size;
        int64_t page = first_page;
        for (int64_t at = part.begin; at < part.end; page++) {
            const int64_t offset = at - page * shape.page_tokens, left = part.end - at;
            const bool is_last = shape.page_tokens - offset >= left;
            const int tokens = is_last ? left : shape.page_tokens - offset;
            const Kept* here = kept + part.table[page] * page_size + offset * stride;
            const Kept* ahead = is_last ? last_ahead : kept + part.table[page + 1] * page_size;
            for (int head = 0; head < heads; head++) {
                const int skipped = (part.first_head + head) * shape.dim;
                Pages<VECTORS, Kept>::group(scoring, group, (scoring ? query : out) + head * group * shape.dim, here + skipped,
                                            ahead + skipped, tokens, stride, scores + head * group * width + at - part.begin, width);
            }
            at += tokens;
        }
        if (scoring)
            for (int i = 0; i < heads * group; i++) totals[i] = softmax(scores + i * width, count, how, tops[i]);
    }
    reorder<VECTORS, Kept>(out, heads * group, true);
}

template <typename Kept>
void attend_row_of_any(float* query, const Kept* keys, const Kept* values, const Part& part, const Shape& shape, float* out,
                       float* tops, float* totals) {
    switch (shape.dim) {
#define DIM(SIZE) \
    case SIZE: return attend_row<SIZE / LANES>(query, keys, values, part, shape, out, tops, totals);
        DIM(16) DIM(32) DIM(64) DIM(80) DIM(96) DIM(128)
#undef DIM
    }
}

}  // namespace
