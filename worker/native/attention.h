// Owns the operations between a layer's products on a CPU: rotation, KV write and paged attention of new tokens, each
// token a row. A row's result depends on nothing but the row, so a batched sequence equals itself run alone bit for bit.

#pragma once

#include <cmath>
#include <vector>

#include "team.h"
#include "units.h"
#include "vectors.h"

namespace {

// One row's heads: made finite, normed if there are weights, the first `rotary` dimensions turned in adjacent pairs.
template <typename Model>
void rotate_heads(const Model* from, float* to, int heads, int dim, int rotary, const float* turn, const float* weight,
                  float eps) {
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

// Consecutive rows of one sequence: they see the same pages.
struct Run {
    int64_t rows;
    const int32_t* table;
};

constexpr int64_t BLOCK_ROWS = 8;  // rows of one run that share each loaded key

// All rows' blocks. `runs` null: each row is one, with a line of `tables`.
inline void list_blocks(int64_t rows, const Run* runs, const int32_t* tables, int64_t table_stride, const int32_t* lengths,
                        Shape shape, bool by_head, std::vector<Block>& blocks) {
    blocks.clear();
    Run run{0, nullptr};
    int64_t left = 0;  // of the run
    for (int64_t row = 0, count; row < rows; row += count) {
        if (!left) {
            run = runs ? *runs++ : Run{1, tables + row * table_stride};
            left = run.rows;
        }
        count = left < BLOCK_ROWS ? left : BLOCK_ROWS;
        left -= count;
        if (!blocks.empty()) blocks.back().next_page = run.table[0];
        const int step = by_head ? 1 : shape.kv_heads;
        for (int head = 0; head < shape.kv_heads; head += step)
            blocks.push_back({run.table, lengths + row, row, count, head, head + step, run.table[0]});
    }
}

// Shared by a team: first all keys and values are written, since a row of a bidirectional prefix sees those of rows behind it;
// then rows attend, in blocks.
template <typename Model, typename Kept>
void decode_rows(Team& team, int64_t rows, const Model* qkv, Kept* keys, Kept* values, const int64_t* write_index,
                 const Run* runs, const int32_t* tables, int64_t table_stride, const int32_t* lengths, const float* rotation,
                 int rotary, const float* weight, float eps, Shape shape, Model* out, int64_t out_stride) {
    const int kept_width = shape.kv_heads * shape.dim, query_width = shape.heads * shape.dim;
    const int64_t product_width = query_width + 2 * kept_width;
    const int group = shape.heads / shape.kv_heads;
    static thread_local std::vector<float> space;
    static thread_local std::vector<Block> blocks;
    const auto take = [&](size_t needed) {
        if (space.size() < needed) space.resize(needed + needed / 2);
        return space.data();
    };

    team.share(rows, 1, [&](int64_t first, int64_t last) {
        float* kept = take(kept_width);
        for (int64_t row = first; row < last; row++) {
            const Model* own = qkv + row * product_width + query_width;
            const float *turn = rotation + row * rotary, *key_weight = weight ? weight + query_width : nullptr;
            rotate_heads(own, kept, shape.kv_heads, shape.dim, rotary, turn, key_weight, eps);
            put(kept, keys + write_index[row] * kept_width, kept_width);
            rotate_heads(own + kept_width, kept, shape.kv_heads, shape.dim, 0, turn, (const float*)nullptr, 0.0f);
            put(kept, values + write_index[row] * kept_width, kept_width);
        }
    });

    // Split by key heads only if there are too few blocks for all threads, because all heads of a page lie side by side.
    list_blocks(rows, runs, tables, table_stride, lengths, shape, team.count() > 1 && rows < 16 * team.count(), blocks);
    team.share(blocks.size(), 1, [&](int64_t first, int64_t last) {
        for (int64_t number = first; number < last; number++) {
            const Block& block = blocks[number];
            const int heads = (block.last_head - block.first_head) * group, width_of_heads = heads * shape.dim;
            int64_t width = 0;
            for (int64_t i = 0; i < block.count; i++) width = block.lengths[i] > width ? block.lengths[i] : width;
            // Scores are written a vector at a time, so a head's may run over by as many.
            width = (width + 2 * LANES - 1) / LANES * LANES;
            const int64_t size = block.count * width_of_heads;
            float *row_query = take(width_of_heads + 2 * size + block.count * heads * width), *query = row_query + width_of_heads;
            float *mixed = query + size, *scores = mixed + size;
            const int64_t skipped = (int64_t)block.first_head * group * shape.dim, part = (int64_t)group * shape.dim;
            for (int64_t r = 0; r < block.count; r++) {
                const int64_t row = block.row + r;
                rotate_heads(qkv + row * product_width + skipped, row_query, heads, shape.dim, rotary, rotation + row * rotary,
                             weight ? weight + skipped : nullptr, eps);
                for (int64_t head = 0; head < heads / group; head++)
                    std::memcpy(query + (head * block.count + r) * part, row_query + head * part, part * sizeof(float));
            }
            std::memset(mixed, 0, size * sizeof(float));
            const auto attend = std::is_same<Kept, float>::value ? attend_float32 : attend_bfloat16;
            attend(query, keys, values, &block, &shape, mixed, scores, width);
            for (int64_t r = 0; r < block.count; r++)
                for (int64_t head = 0; head < heads / group; head++)
                    put(mixed + (head * block.count + r) * part, out + (block.row + r) * out_stride + skipped + head * part, part);
        }
    });
}

}  // namespace
