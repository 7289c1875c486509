// Owns dividing a step's attention into parts, each for one thread at a time. Worked out once a step for all layers of one window.

#pragma once

#include <algorithm>
#include <vector>

#include "units.h"

namespace {

// Consecutive rows of one sequence, as worker/native/token_rows.py lays them out: rows of their own, or the tokens of a chunk.
struct Run {
    int64_t rows;
    const int32_t* table;
    int64_t position, is_chunk;  // of a chunk's first row
};

// The rows of a step. `runs` null: each row has a line of `tables`. A length is the number of leading keys that a row sees.
struct Rows {
    int64_t count;
    const Run* runs;
    const int32_t* tables;
    int64_t table_stride;
    const int32_t* lengths;
};

constexpr int64_t CHUNK_QUERIES = 192;  // of a part: enough to be worth taking its keys out of the pages
constexpr int64_t EVEN_QUERIES = 1024;  // of one whose queries see the same keys, at most: its sums stay in the second-level cache

// Parts whose keys are a sequence's, one after another: their results are joined.
struct Joined {
    int64_t first_part, parts;
};

struct Parts {
    std::vector<Part> parts;
    std::vector<Joined> joined;
    std::vector<float> partials;

    // Of a part's partial result, in floats: sums (queries, dim), then each query's largest exponent and its weights' sum.
    static int64_t queries_of(const Part& part, const Shape& shape) {
        return part.count * (part.last_head - part.first_head) * (shape.heads / shape.kv_heads);
    }

    void plan(const Rows& rows, const Shape& shape, int64_t threads) {
        parts.clear();
        joined.clear();
        int64_t floats = 0;
        // Large parts first, so that small ones fill the gaps at the end.
        plan_chunks(rows, shape, threads, floats);
        plan_rows(rows, shape, threads, floats);
        if ((int64_t)partials.size() < floats) partials.resize(floats);
        for (size_t i = 0; i + 1 < parts.size(); i++) parts[i].next_page = parts[i + 1].table[parts[i + 1].begin / shape.page_tokens];
    }

private:
    template <typename Visit>
    static void each_run(const Rows& rows, const Visit& visit) {
        const Run* run = rows.runs;
        for (int64_t row = 0; row < rows.count;) {
            const Run own = run ? *run++ : Run{1, rows.tables + row * rows.table_stride, 0, 0};
            visit(row, own);
            row += own.rows;
        }
    }

    static int64_t spans_of(int64_t begin, int64_t end) { return (end - 1) / SPAN_KEYS - begin / SPAN_KEYS + 1; }

    void add(Part part, const Shape& shape, bool by_span, int64_t& floats) {
        const int64_t spans = spans_of(part.begin, part.end);
        if (!by_span || spans == 1) return parts.push_back(part);
        joined.push_back({(int64_t)parts.size(), spans});
        for (int64_t at = part.begin, end; at < part.end; at = end) {
            end = (at / SPAN_KEYS + 1) * SPAN_KEYS < part.end ? (at / SPAN_KEYS + 1) * SPAN_KEYS : part.end;
            Part own = part;
            own.begin = at, own.end = end, own.partial = floats;
            floats += queries_of(part, shape) * (shape.dim + 2);
            parts.push_back(own);
        }
    }

    void plan_chunks(const Rows& rows, const Shape& shape, int64_t threads, int64_t& floats) {
        const int group = shape.heads / shape.kv_heads;
        const int64_t together = CHUNK_QUERIES / group > 1 ? CHUNK_QUERIES / group : 1;
        int64_t whole = 0;
        each_run(rows, [&](int64_t, const Run& run) {
            if (run.is_chunk) whole += (run.rows + together - 1) / together * shape.kv_heads;
        });
        const bool by_span = threads > 1 && whole < 4 * threads;
        each_run(rows, [&](int64_t row, const Run& run) {
            if (!run.is_chunk) return;
            // Where all see as much, a head's keys stay in the cache for its next block, and are taken out of the pages as rarely as
            // the threads allow; else the large parts come first.
            const bool is_even = rows.lengths[row] == rows.lengths[row + run.rows - 1] && !shape.window;
            int64_t blocks = (run.rows + together - 1) / together;
            if (is_even) {
                const int64_t fewest = (run.rows * group + EVEN_QUERIES - 1) / EVEN_QUERIES, enough = (8 * threads + shape.kv_heads - 1) / shape.kv_heads;
                blocks = std::min(blocks, std::max(fewest, enough));
            }
            const auto add_block = [&](int64_t block, int head) {
                const int64_t first = run.rows * block / blocks, count = run.rows * (block + 1) / blocks - first;
                const int32_t* lengths = rows.lengths + row + first;
                const int64_t begin = first_seen(run.position + first, shape.window) / SPAN_KEYS * SPAN_KEYS;
                add({run.table, lengths, row + first, count, run.position + first, head, head + 1, begin, lengths[count - 1], run.table[0], -1, true},
                    shape, by_span, floats);
            };
            if (is_even)
                for (int head = 0; head < shape.kv_heads; head++)
                    for (int64_t block = blocks; block-- > 0;) add_block(block, head);
            else
                for (int64_t block = blocks; block-- > 0;)
                    for (int head = 0; head < shape.kv_heads; head++) add_block(block, head);
        });
    }

    // By key heads only if there are too few parts for all threads, because all heads of a page lie side by side.
    void plan_rows(const Rows& rows, const Shape& shape, int64_t threads, int64_t& floats) {
        int64_t whole = 0;
        each_run(rows, [&](int64_t row, const Run& run) {
            for (int64_t i = row; !run.is_chunk && i < row + run.rows; i++)
                whole += spans_of(first_seen(rows.lengths[i] - 1, shape.window), rows.lengths[i]);
        });
        const int step = threads > 1 && whole < 16 * threads ? 1 : shape.kv_heads;
        each_run(rows, [&](int64_t row, const Run& run) {
            for (int64_t i = row; !run.is_chunk && i < row + run.rows; i++)
                for (int head = 0; head < shape.kv_heads; head += step) {
                    const int64_t begin = first_seen(rows.lengths[i] - 1, shape.window);
                    add({run.table, rows.lengths + i, i, 1, rows.lengths[i] - 1, head, head + step, begin, rows.lengths[i], run.table[0], -1, false}, shape,
                        true, floats);
                }
        });
    }
};

}  // namespace
