// Owns products of fp32 activations with weights of any format (formats.h), in fp32 arithmetic. A row's result is one sum
// in the order of the inputs, whatever the other rows are: for every format the result of the same weights in fp32.
//
// Few rows are bound by memory: weights are loaded into registers once, from several panels at a time. For more rows,
// parts of a panel are expanded into the first-level cache and multiplied from there.

#pragma once

#include "formats.h"

namespace {

constexpr int64_t MOST_TOGETHER = 6;  // rows whose sums of a panel fit the registers
constexpr int64_t EXPANDED_FLOATS = 288 * 16;  // of a panel: 18 KiB, which leaves room for six rows' inputs
constexpr int64_t ROWS_BYTES = 512 << 10;      // of inputs, kept in the second-level cache from panel to panel
constexpr int64_t AHEAD_BYTES = 2048;

// ROWS rows from `row` on by PANELS panels, `panel_bytes` apart, straight out of memory.
template <typename Format, int ROWS, int PANELS>
void multiply_streamed(const Product<float>& product, int64_t row, const uint8_t* weight, int64_t panel_bytes, int64_t column) {
    constexpr int64_t STEP = Format::STEP;
    constexpr int PAIR = PANELS > 1 && STEP <= 2 ? 2 : 1;  // panels of which a word each is used up at once
    const int64_t inputs = product.inputs;
    const float* x = product.x + row * inputs;
    Floats sums[PANELS][ROWS][VECTORS] = {};
    for (int64_t i = 0; i < inputs; i += Format::BLOCK, weight += Format::BLOCK_BYTES) {
        Format blocks[PANELS];
        for (int p = 0; p < PANELS; p++) blocks[p].open(weight + p * panel_bytes);
#pragma GCC unroll 1
        for (int64_t j = 0; j < Format::BLOCK; j += STEP)
            for (int pair = 0; pair < PANELS; pair += PAIR) {
                Words words[PAIR][VECTORS];
                for (int p = 0; p < PAIR; p++) {
                    const uint8_t* at = Format::words(weight + (pair + p) * panel_bytes) + j / STEP * PANEL * 4;
                    __builtin_prefetch(at + AHEAD_BYTES);
                    for (int v = 0; v < VECTORS; v++) words[p][v] = load_words(at + v * LANES * 4);
                }
                Places<0, STEP>::each([&](auto place) {
                    constexpr int PLACE = decltype(place)::value;
                    for (int p = 0; p < PAIR; p++) {
                        Floats w[VECTORS];
                        for (int v = 0; v < VECTORS; v++) w[v] = blocks[pair + p].template weight<PLACE>(words[p][v], v);
                        for (int r = 0; r < ROWS; r++) {
                            const Floats one = splat(*(x + r * inputs + i + j + PLACE));
                            for (int v = 0; v < VECTORS; v++) sums[pair + p][r][v] += one * w[v];
                        }
                    }
                });
            }
    }
    for (int p = 0; p < PANELS; p++)
        for (int r = 0; r < ROWS; r++) finish(product, row + r, column + p * PANEL, sums[p][r], VECTORS);
}

// So many panels at a time that enough sums are under way.
template <typename Format, int ROWS>
void multiply_few(const Product<float>& product, int64_t row, const uint8_t* packed, int64_t panel_bytes, int64_t first, int64_t last) {
    constexpr int MOST = VECTORS == 2 ? (ROWS == 1 ? 4 : ROWS <= 3 ? 2 : 1) : ROWS == 1 ? 2 : 1;
    int64_t panel = first;
    for (; panel + MOST <= last; panel += MOST)
        multiply_streamed<Format, ROWS, MOST>(product, row, packed + panel * panel_bytes, panel_bytes, panel * PANEL);
    for (; panel < last; panel++)
        multiply_streamed<Format, ROWS, 1>(product, row, packed + panel * panel_bytes, panel_bytes, panel * PANEL);
}

// `depth` inputs of a panel, expanded: (depth, PANEL) fp32. The same memory for fp32 itself.
template <typename Format>
inline const float* expand(const uint8_t* weight, int64_t depth, float* to) {
    if (std::is_same<Format, Fp32>::value) return (const float*)weight;
    float* at = to;
    for (int64_t i = 0; i < depth; i += Format::BLOCK, weight += Format::BLOCK_BYTES) {
        Format block;
        block.open(weight);
#pragma GCC unroll 1
        for (int64_t j = 0; j < Format::BLOCK; j += Format::STEP) {
            const uint8_t* from = Format::words(weight) + j / Format::STEP * PANEL * 4;
            Words words[VECTORS];
            for (int v = 0; v < VECTORS; v++) words[v] = load_words(from + v * LANES * 4);
            Places<0, Format::STEP>::each([&](auto place) {
                constexpr int PLACE = decltype(place)::value;
                for (int v = 0; v < VECTORS; v++, at += LANES) store(at, block.template weight<PLACE>(words[v], v));
            });
        }
    }
    return to;
}

// Adds `depth` inputs of ROWS rows, `stride` apart, to their sums (ROWS, PANEL). A line at `ahead` is fetched every four steps.
template <int ROWS>
void multiply_expanded(const float* x, int64_t stride, const float* weight, int64_t depth, float* sums, const uint8_t* ahead) {
    Floats s[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) s[r][v] = load(sums + r * PANEL + v * LANES);
    const auto step = [&](int64_t i) __attribute__((always_inline)) {
        Floats w[VECTORS];
        for (int v = 0; v < VECTORS; v++) w[v] = load(weight + i * PANEL + v * LANES), keep_loaded(w[v]);
        for (int r = 0; r < ROWS; r++) {
            const Floats one = splat(*(x + r * stride + i));
            for (int v = 0; v < VECTORS; v++) s[r][v] += one * w[v];
        }
    };
    int64_t i = 0;
    for (; i + 4 <= depth; i += 4, ahead += 64) {
        __builtin_prefetch(ahead, 0, 2);
        
#pragma GCC unroll 1
        for (int64_t j = i; j < i + 4; j++) step(j);
    }
    for (; i < depth; i++) step(i);
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) store(sums + r * PANEL + v * LANES, s[r][v]);
}

template <typename Format>
void multiply_many(int64_t begin, int64_t end, const Product<float>& product, const uint8_t* packed, int64_t panel_bytes, int64_t first, int64_t last) {
    constexpr int64_t DEPTH = EXPANDED_FLOATS / PANEL / 32 * 32;
    constexpr int64_t MOST_ROWS = 512;
    alignas(64) float expanded[DEPTH * PANEL], sums[MOST_ROWS * PANEL];
    const int64_t inputs = product.inputs;
    int64_t together = ROWS_BYTES / 4 / inputs / MOST_TOGETHER * MOST_TOGETHER;
    together = together < 48 ? 48 : together > MOST_ROWS ? MOST_ROWS : together;
    const int64_t chunks = (end - begin + together - 1) / together;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {  // of like size
        const int64_t top = begin + (end - begin) * chunk / chunks, count = begin + (end - begin) * (chunk + 1) / chunks - top;
        const int64_t groups = (count + MOST_TOGETHER - 1) / MOST_TOGETHER;
        for (int64_t panel = first; panel < last; panel++) {
            const uint8_t* weight = packed + panel * panel_bytes;
            std::memset(sums, 0, count * PANEL * sizeof(float));
            for (int64_t i = 0; i < inputs; i += DEPTH) {
                const int64_t depth = inputs - i < DEPTH ? inputs - i : DEPTH, bytes = depth / Format::BLOCK * Format::BLOCK_BYTES;
                const float* floats = expand<Format>(weight, depth, expanded);
                weight += bytes;
                for (int64_t group = 0; group < groups; group++) {
                    const int64_t row = count * group / groups, rows = count * (group + 1) / groups - row;
                    const float* x = product.x + (top + row) * inputs + i;
                    const uint8_t* ahead = weight + (group * depth * 16 < bytes ? group * depth * 16 : 0);
                    switch (rows) {
#define ROWS(COUNT) \
    case COUNT: multiply_expanded<COUNT>(x, inputs, floats, depth, sums + row * PANEL, ahead); break;
                        ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6)
#undef ROWS
                    }
                }
            }
            for (int64_t row = 0; row < count; row++) {
                Floats done[VECTORS];
                for (int v = 0; v < VECTORS; v++) done[v] = load(sums + row * PANEL + v * LANES);
                finish(product, top + row, panel * PANEL, done, VECTORS);
            }
        }
    }
}

// Panels `first` to `last` of the outputs, of all rows.
template <typename Format>
void multiply_format(int64_t rows, const Product<float>& product, const uint8_t* packed, int64_t first, int64_t last) {
    const int64_t panel_bytes = product.inputs / Format::BLOCK * Format::BLOCK_BYTES;
    constexpr bool IS_REAL = Format::STEP <= 2;  // so cheap to read that memory alone counts
    switch (rows) {
        case 1: return multiply_few<Format, 1>(product, 0, packed, panel_bytes, first, last);
        case 2: return multiply_few<Format, 2>(product, 0, packed, panel_bytes, first, last);
        case 4: return multiply_few<Format, 4>(product, 0, packed, panel_bytes, first, last);
        case 3: if (IS_REAL) return multiply_few<Format, IS_REAL ? 3 : 1>(product, 0, packed, panel_bytes, first, last); break;
        case 5: if (IS_REAL) return multiply_few<Format, IS_REAL ? 5 : 1>(product, 0, packed, panel_bytes, first, last); break;
        case 6: if (IS_REAL) return multiply_few<Format, IS_REAL ? 6 : 1>(product, 0, packed, panel_bytes, first, last); break;
    }
    multiply_many<Format>(0, rows, product, packed, panel_bytes, first, last);
}

}  // namespace
