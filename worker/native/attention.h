// Owns the operations between a layer's products on a CPU: rotation, KV write and paged attention of new tokens. A token's
// result depends on nothing but its sequence, so a batched sequence equals itself run alone bit for bit.

#pragma once

#include <cmath>
#include <vector>

#include "parts.h"
#include "softmax.h"
#include "team.h"
#include "units.h"
#include "vectors.h"

namespace {

// Heads that are neither normed nor turned, into a page: what is not finite becomes 0.
template <typename Model, typename Kept>
void put_finite(const Model* from, Kept* to, int count) {
    for (int i = 0; i < count; i += LANES) {
        const Floats x = load(from + i);
        store(to + i, x - x == splat(0.0f) ? x : splat(0.0f));
    }
}

inline void put_finite(const bf16* from, bf16* to, int count) {
    for (int i = 0; i < count; i += LANES) {
        Halves x;
        std::memcpy(&x, from + i, sizeof x);
        x = (x & 0x7f80) == 0x7f80 ? Halves{} : x;
        std::memcpy((void*)(to + i), &x, sizeof x);
    }
}

// One row's heads: made finite, normed if there are weights, the first `rotary` dimensions turned in adjacent pairs.
template <typename Model>
void rotate_heads(const Model* from, float* to, int heads, int dim, int rotary, const float* turn, const float* weight,
                  float eps) {
    if (!weight && !rotary) return put_finite(from, to, heads * dim);  // of a picture whose positions are learned
    const Floats sign = of_even_lanes(splat(-1.0f), splat(1.0f));
    for (int head = 0; head < heads; head++, from += dim, to += dim) {
        Floats squares{};
        for (int i = 0; i < dim; i += LANES) {
            Floats x = load(from + i);
            x = x - x == splat(0.0f) ? x : splat(0.0f);  // a NaN in a page would spoil the page's next owner
            squares += x * x;
            store(to + i, x);
        }
        if (weight) {
            const float scale = 1.0f / std::sqrt(sum(squares) / dim + eps);
            for (int i = 0; i < dim; i += LANES) store(to + i, load(to + i) * scale * load(weight + head * dim + i));
        }
        for (int i = 0; i < rotary; i += LANES) {
            const Floats x = load(to + i), pairs = load(turn + i);
            const Floats cosine = firsts(pairs, pairs), sine = seconds(pairs, pairs), partner = swapped(x, x);
            store(to + i, x * cosine + partner * sine * sign);
        }
    }
}

template <typename Kept>
void put(const float* from, Kept* to, int count) {
    for (int i = 0; i < count; i += LANES) store(to + i, load(from + i));
}

// A query's sums (dim,) over the sum of its weights, heads of one token side by side.
template <typename Model>
void put_part(const Part& part, const Shape& shape, float* sums, const float* totals, Model* out, int64_t out_stride) {
    const int group = shape.heads / shape.kv_heads, heads = (part.last_head - part.first_head) * group;
    for (int64_t t = 0; t < part.count; t++, sums += heads * shape.dim, totals += heads) {
        for (int head = 0; head < heads; head++) {
            const float inverse = 1.0f / totals[head];
            for (int i = head * shape.dim; i < (head + 1) * shape.dim; i += LANES) store(sums + i, load(sums + i) * inverse);
        }
        put(sums, out + (part.row + t) * out_stride + (int64_t)part.first_head * group * shape.dim, heads * shape.dim);
    }
}

// Shared by a team: first all keys and values are written, since a row of a bidirectional prefix sees those of rows behind it;
// then parts are attended to; then those that share their queries are joined.
template <typename Model, typename Kept>
void attend_rows(Team& team, Parts& plan, int64_t rows, const Model* qkv, Kept* keys, Kept* values, const int64_t* write_index,
                 const float* rotation, int rotary, const float* weight, float eps, const Shape& shape, Model* out,
                 int64_t out_stride) {
    const int kept_width = shape.kv_heads * shape.dim, query_width = shape.heads * shape.dim;
    const int64_t product_width = query_width + 2 * kept_width;
    const int group = shape.heads / shape.kv_heads;
    static thread_local std::vector<float> space;
    const auto take = [&](size_t needed) {
        if (space.size() < needed) space.resize(needed + needed / 2);
        return space.data();
    };

    team.share(rows, 1, [&](int64_t first, int64_t last) {
        float* kept = take(kept_width);
        for (int64_t row = first; row < last; row++) {
            const Model* own = qkv + row * product_width + query_width;
            const float *turn = rotation + row * rotary, *key_weight = weight ? weight + query_width : nullptr;
            Kept* to = keys + write_index[row] * kept_width;
            if (rotary || weight) {
                rotate_heads(own, kept, shape.kv_heads, shape.dim, rotary, turn, key_weight, eps);
                put(kept, to, kept_width);
            } else {
                put_finite(own, to, kept_width);
            }
            put_finite(own + kept_width, values + write_index[row] * kept_width, kept_width);
        }
    });

    team.share(plan.parts.size(), 1, [&](int64_t first, int64_t last) {
        for (int64_t number = first; number < last; number++) {
            const Part& part = plan.parts[number];
            const int64_t queries = Parts::queries_of(part, shape), size = queries * shape.dim;
            const int heads = queries / part.count;
            float *query = take(2 * size + 2 * queries), *sums = query + size;
            if (part.partial >= 0) sums = plan.partials.data() + part.partial;
            float *tops = sums + size, *totals = tops + queries;
            const int64_t skipped = (int64_t)part.first_head * group * shape.dim;
            for (int64_t t = 0; t < part.count; t++) {
                const int64_t row = part.row + t;
                rotate_heads(qkv + row * product_width + skipped, query + t * heads * shape.dim, heads, shape.dim, rotary,
                             rotation + row * rotary, weight ? weight + skipped : nullptr, eps);
            }
            constexpr bool IS_FLOAT = std::is_same<Kept, float>::value;
            if (part.is_chunk)
                (IS_FLOAT ? attend_chunk_float32 : attend_chunk_bfloat16)(query, keys, values, &part, &shape,
                                                                         std::is_same<Model, float>::value, sums, tops, totals);
            else
                (IS_FLOAT ? attend_row_float32 : attend_row_bfloat16)(query, keys, values, &part, &shape, sums, tops, totals);
            if (part.partial < 0) put_part(part, shape, sums, totals, out, out_stride);
        }
    });

    if (plan.joined.empty()) return;
    team.share(plan.joined.size(), 1, [&](int64_t first, int64_t last) {
        for (int64_t number = first; number < last; number++) {
            const Part* part = plan.parts.data() + plan.joined[number].first_part;
            const int64_t queries = Parts::queries_of(*part, shape), size = queries * shape.dim;
            float *sums = plan.partials.data() + part->partial, *tops = sums + size, *totals = tops + queries;
            for (int64_t more = 1; more < plan.joined[number].parts; more++) {
                const float* other = plan.partials.data() + part[more].partial;
                for (int64_t i = 0; i < queries; i++)
                    join(sums + i * shape.dim, tops[i], totals[i], other + i * shape.dim, other[size + i],
                         other[size + queries + i], shape.dim);
            }
            put_part(*part, shape, sums, totals, out, out_stride);
        }
    });
}

}  // namespace
