// Owns attention of a chunk's queries over pages of keys and values, on one thread and in fp32. A block of keys is taken out of
// the pages once for all queries of all heads that share it: products with them, their weights, and sums of weighted values.
//
// A query's result is the same whatever chunk it stands in: blocks begin at fixed keys, and a key that it does not see weighs 0.

#pragma once

#include <vector>

#include "product.h"
#include "softmax.h"
#include "units.h"

namespace {

constexpr int64_t BLOCK_KEYS = LANES == 16 ? 64 : 128;  // a panel of them, or of their values, fits the first-level cache
constexpr int64_t ROWS_TOGETHER = 6;                    // whose sums of a panel fit the registers
constexpr int64_t MOST_KEYS = 256;                      // of any kernel's block

// Where the keys of a block lie within their pages' memory.
struct Lines {
    int64_t at[MOST_KEYS], count;
    Lines(const Part& part, const Shape& shape, int64_t first, int64_t last) : count(last > first ? last - first : 0) {
        const int64_t stride = (int64_t)shape.kv_heads * shape.dim;
        for (int64_t key = 0; key < count;) {
            const int64_t page = (first + key) / shape.page_tokens, offset = (first + key) % shape.page_tokens;
            const int64_t line = ((int64_t)part.table[page] * shape.page_tokens + offset) * stride + part.first_head * shape.dim;
            const int64_t end = count < key + shape.page_tokens - offset ? count : key + shape.page_tokens - offset;
            for (int64_t i = 0; key < end; key++, i++) at[key] = line + i * stride;
        }
    }
};

// Fetches a head's keys or values into the second-level cache while those before them are used: pages lie apart, and the
// processor's own prefetching ends with each.
template <typename Kept>
inline void fetch(const Kept* kept, const Lines& lines, int dim) {
    for (int64_t k = 0; k < lines.count; k++)
        for (int d = 0; d < dim; d += 64 / sizeof(Kept)) __builtin_prefetch(kept + lines.at[k] + d, 0, 2);
}

// out (ROWS, VECS vectors) = or += a (ROWS, depth) · b (depth, VECS vectors)
template <int ROWS, int VECS, bool ADD>
inline void multiply_rows(const float* a, int64_t a_stride, const float* b, int64_t depth, float* out, int64_t out_stride) {
    Floats sums[ROWS][VECS] = {};
    if (ADD)
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECS; v++) sums[r][v] = load(out + r * out_stride + v * LANES);
#pragma GCC unroll 1
    for (int64_t i = 0; i < depth; i++, b += VECS * LANES) {
        Floats w[VECS];
        for (int v = 0; v < VECS; v++) w[v] = load(b + v * LANES), keep_loaded(w[v]);
        for (int r = 0; r < ROWS; r++) {
            const Floats one = splat(a[r * a_stride + i]);
            for (int v = 0; v < VECS; v++) sums[r][v] += one * w[v];
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECS; v++) store(out + r * out_stride + v * LANES, sums[r][v]);
}

template <int VECS, bool ADD>
inline void multiply_panel(int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t depth, float* out,
                           int64_t out_stride) {
    switch (rows) {
#define ROWS(COUNT) \
    case COUNT: return multiply_rows<COUNT, VECS, ADD>(a, a_stride, b, depth, out, out_stride);
        ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6)
#undef ROWS
    }
}

// The same for panels narrower than PANEL, of so many floats.
template <bool ADD>
inline void multiply_panel_of(int64_t width, int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t depth,
                              float* out, int64_t out_stride) {
    switch (width / LANES) {
#define VECTORS_OF(COUNT) \
    case COUNT: return multiply_panel<COUNT, ADD>(rows, a, a_stride, b, depth, out, out_stride);
        VECTORS_OF(1) VECTORS_OF(2)
#undef VECTORS_OF
        case 3:
            multiply_panel<3, ADD>(rows, a, a_stride, b, depth, out, out_stride);
            return;
    }
    multiply_panel<(int)VECTORS, ADD>(rows, a, a_stride, b, depth, out, out_stride);
}

// Keys → panels (dim, PANEL keys) of fp32; those behind the last are 0.
template <typename Kept>
void pack_keys(const Kept* keys, const Lines& lines, int dim, float* packed) {
    const int64_t count = lines.count;
    for (int64_t first = 0; first < count; first += LANES)
        for (int d = 0; d < dim; d += LANES) {
            Floats x[LANES];
            for (int64_t k = 0; k < LANES; k++)
                x[k] = first + k < count ? load(keys + lines.at[first + k] + d) : splat(0.0f);
            transpose(x);
            float* to = packed + first / PANEL * dim * PANEL + d * PANEL + first % PANEL;
            for (int i = 0; i < LANES; i++) store(to + i * PANEL, x[i]);
        }
    // The rest of the last panel is multiplied too, and not looked at: but it must be numbers.
    for (int64_t first = (count + LANES - 1) / LANES * LANES; first % PANEL; first += LANES)
        for (int d = 0; d < dim; d++) store(packed + first / PANEL * dim * PANEL + d * PANEL + first % PANEL, splat(0.0f));
}

// Values → panels (BLOCK_KEYS, at most PANEL of the dimensions) of fp32.
template <typename Kept>
void pack_values(const Kept* values, const Lines& lines, int dim, float* packed) {
    for (int first = 0; first < dim; first += PANEL, packed += BLOCK_KEYS * PANEL) {
        const int width = dim - first < PANEL ? dim - first : PANEL;
        for (int64_t k = 0; k < lines.count; k++)
            for (int d = 0; d < width; d += LANES) store(packed + k * width + d, load(values + lines.at[k] + first + d));
    }
}

// The queries of a part by number: token · group + head. What they see does not begin or end earlier from one to the next.
struct Queries {
    Queries(const Part& part, const Shape& shape) : part(part), shape(shape), count(part.count * (shape.heads / shape.kv_heads)) {
        static thread_local std::vector<int32_t> space;
        if ((int64_t)space.size() < 2 * count) space.resize(2 * count);
        begins = space.data(), ends = begins + count;
        const int64_t group = count / part.count;
        for (int64_t token = 0, query = 0; token < part.count; token++)
            for (int64_t head = 0; head < group; head++, query++) {
                ends[query] = part.lengths[token];
                begins[query] = first_seen(part.position + token, shape.window);
            }
    }
    // Those that see a key of a block.
    int64_t first_of(int64_t block) const {
        int64_t query = 0;
        while (query < count && ends[query] <= block) query++;
        return query;
    }
    int64_t last_of(int64_t block_end) const {
        int64_t query = count;
        while (query > 0 && begins[query - 1] >= block_end) query--;
        return query;
    }
    const Part& part;
    const Shape& shape;
    int64_t count;
    int32_t *begins, *ends;
};

// Up to a whole number of pairs of vectors.
inline int64_t in_pairs(int64_t count) { return (count + 2 * LANES - 1) / (2 * LANES) * (2 * LANES); }

// A query's sums so far: the largest exponent, and the weights' sum lane by lane.
struct Sums {
    float top;
    Floats total;
};

// Of a query's products with a block of `count` keys, of which it sees those from `begin` to `end`: their weights, given to `keep`
// two vectors at a time. The sums (dim,) of earlier blocks are brought to the new largest exponent.
template <bool ROUGH, typename Keep>
inline void weigh(float* scores, int64_t count, int64_t begin, int64_t end, const Scores& how, Sums& sums, float* out, int dim,
                  const Keep& keep) {
    Ints lanes;
    for (int lane = 0; lane < LANES; lane++) lanes[lane] = lane;
    const auto seen = [&](int64_t i) { return (lanes >= (int32_t)(begin - i)) & (lanes < (int32_t)(end - i)); };
    const bool sees_all = begin <= 0 && end >= count;
    if (how.cap != 0.0f)
        for (int64_t i = 0; i < count; i += LANES) store(scores + i, how.capped(load(scores + i)));
    if (!sees_all)
        for (int64_t i = 0; i < count; i += LANES) store(scores + i, seen(i) ? load(scores + i) : splat(LOWEST));
    Floats most = splat(LOWEST);
    for (int64_t i = 0; i < count; i += LANES) most = greater_of(load(scores + i), most);
    const float here = largest(most) * how.scale;
    if (here > sums.top) {
        const Floats factor = power_of_two(splat(sums.top - here));
        sums.total *= factor;
        for (int d = 0; d < dim; d += LANES) store(out + d, load(out + d) * factor);
        sums.top = here;
    }
    const float top = sums.top, scale = how.scale;
    Floats total = sums.total;
    for (int64_t i = 0; i < count; i += 2 * LANES) {
        Floats x = power_of_two<ROUGH>(load(scores + i) * scale - top), y = power_of_two<ROUGH>(load(scores + i + LANES) * scale - top);
        if (!sees_all) x = seen(i) ? x : splat(0.0f), y = seen(i + LANES) ? y : splat(0.0f);
        total += x;
        total += y;
        keep(i, x, y);
    }
    sums.total = total;
}

inline void begin_sums(const Queries& queries, Sums* sums, float* out, int64_t floats) {
    for (int64_t i = 0; i < queries.count; i++) sums[i] = Sums{LOWEST, Floats{}};
    std::memset(out, 0, sizeof(float) * floats);
}

// Memory that grows, aligned for vectors.
template <typename Item>
struct Scratch {
    std::vector<Item> memory;
    Item* take(int64_t count) {
        constexpr int64_t LINE = 64 / sizeof(Item);
        if ((int64_t)memory.size() < count + LINE) memory.resize(count + count / 2 + LINE);
        return (Item*)(((uintptr_t)memory.data() + 63) & ~(uintptr_t)63);
    }
};

// query (count, dim) over the keys from `begin` to `end`, at most a span of them.
template <typename Kept>
void attend_span(const float* query, const Kept* keys, const Kept* values, const Queries& queries, int64_t begin, int64_t end,
                 float* out, Sums* sums) {
    const Shape& shape = queries.shape;
    const int dim = shape.dim, value_panels = (dim + PANEL - 1) / PANEL;
    const Scores how(shape);
    static thread_local Scratch<float> space;
    float* packed = space.take(BLOCK_KEYS * (dim + value_panels * PANEL + queries.count));
    float *packed_values = packed + BLOCK_KEYS * dim, *scores = packed_values + BLOCK_KEYS * value_panels * PANEL;
    begin_sums(queries, sums, out, queries.count * dim);
    for (int64_t block = begin; block < end; block += BLOCK_KEYS) {
        const int64_t count = end - block < BLOCK_KEYS ? end - block : BLOCK_KEYS;
        const int64_t first = queries.first_of(block), last = queries.last_of(block + count);
        if (first >= last) continue;
        const int64_t next = block + count, next_end = next + BLOCK_KEYS < end ? next + BLOCK_KEYS : end;
        const Lines lines(queries.part, shape, block, next), ahead(queries.part, shape, next, next_end);
        pack_keys(keys, lines, dim, packed);
        fetch(keys, ahead, dim);
        // Rows in groups of like size, each over no more keys than one of them sees.
        const int64_t groups = (last - first + ROWS_TOGETHER - 1) / ROWS_TOGETHER;
        const auto each_group = [&](const auto& work) {
            for (int64_t group = 0; group < groups; group++) {
                const int64_t row = first + (last - first) * group / groups, next = first + (last - first) * (group + 1) / groups;
                const int64_t seen = queries.ends[next - 1] - block;
                work(row, next - row, seen < count ? seen : count);
            }
        };
        for (int64_t panel = 0; panel < count; panel += PANEL)
            each_group([&](int64_t row, int64_t rows, int64_t seen) {
                if (panel < seen)
                    multiply_panel<(int)VECTORS, false>(rows, query + row * dim, dim, packed + panel * dim, dim,
                                                        scores + row * BLOCK_KEYS + panel, BLOCK_KEYS);
            });
        each_group([&](int64_t row, int64_t rows, int64_t seen) {
            for (int64_t own = row; own < row + rows; own++) {
                float* line = scores + own * BLOCK_KEYS;
                weigh<false>(line, in_pairs(seen), queries.begins[own] - block, queries.ends[own] - block, how, sums[own], out + own * dim, dim,
                             [&](int64_t i, Floats x, Floats y) { store_two(line + i, x, y); });
            }
        });
        pack_values(values, lines, dim, packed_values);
        fetch(values, ahead, dim);
        for (int panel = 0; panel < value_panels; panel++) {
            const int width = dim - panel * PANEL < PANEL ? dim - panel * PANEL : PANEL;
            each_group([&](int64_t row, int64_t rows, int64_t seen) {
                multiply_panel_of<true>(width, rows, scores + row * BLOCK_KEYS, BLOCK_KEYS,
                                        packed_values + panel * BLOCK_KEYS * PANEL, seen, out + row * dim + panel * PANEL, dim);
            });
        }
    }
}

// query (count, dim) over the part's keys, span by span. `attend` is `attend_span` or what does the same otherwise.
template <typename Attend>
void attend_chunk(const Part& part, const Shape& shape, float* out, float* tops, float* totals, const Attend& attend) {
    const Queries queries(part, shape);
    static thread_local Scratch<Sums> kept;
    static thread_local Scratch<float> space;
    Sums* sums = kept.take(queries.count);
    float* more = space.take(queries.count * shape.dim);
    for (int64_t at = part.begin; at < part.end;) {
        const int64_t span_end = (at / SPAN_KEYS + 1) * SPAN_KEYS, end = span_end < part.end ? span_end : part.end;
        const bool is_first = at == part.begin;
        attend(queries, at, end, is_first ? out : more, sums);
        for (int64_t i = 0; i < queries.count; i++) {
            const float top = sums[i].top, total = sum(sums[i].total);
            if (is_first)
                tops[i] = top, totals[i] = total;
            else
                join(out + i * shape.dim, tops[i], totals[i], more + i * shape.dim, top, total, shape.dim);
        }
        at = end;
    }
}

}  // namespace
