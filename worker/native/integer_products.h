// Owns products of int8 activations (activations.h) with weights in a file's blocks (formats.h). Sums of a group are whole
// numbers, exact in any order; what they add to a row's result is one rounding each, in the order of the inputs:
//
//     sum = fma(float(dot), scale of the weights · scale of the row, sum), then fma(least, weighted sum of the row, sum)
//
// So a row's bits are the same whatever the other rows are, on every instruction set.

#pragma once

#include <type_traits>

#include "activations.h"
#include "dots.h"
#include "formats.h"

namespace {

constexpr int64_t FETCHED_AHEAD = 2048;
constexpr int64_t ROWS_IN_CACHE = 128 << 10;  // bytes of activations, kept in the second-level cache from panel to panel

inline Words splat_word(const void* at) {
    uint32_t word;
    std::memcpy(&word, at, sizeof word);
    return word - Words{};
}

// Which products a format takes, and how much for each activation its sums start with, as a power of two; -1: nothing.
template <typename Format>
struct Integers {
    typedef typename std::conditional<Format::NUM_BITS == 4, Nibbles, Bytes>::type Dots;
    static constexpr int SHIFT = Format::LESS ? 3 : Dots::BIAS_SHIFT;
    static_assert(Format::LESS == 0 || Format::LESS == 8, "a power of two");

    static_assert(Format::BLOCK % GROUP == 0, "groups lie within blocks");

    static inline Ints from(const float* facts, int64_t stride) {
        return SHIFT < 0 ? Ints{} : (Ints)(splat_word(facts + MINUS * stride) << SHIFT);
    }
};

// A group's whole sum for each of a vector's outputs, added to their results. A row's facts stand at `facts`.
template <typename Format>
inline void add_group(Floats& sum, Ints dot, Floats scale, Floats least, const float* facts, int64_t stride) {
    const Floats both = scale * facts[SCALE * stride];
    sum += __builtin_convertvector(dot, Floats) * both;
    if (Format::ADDS_LEAST) sum += least * facts[WEIGHTED * stride];
}

// sums (PANELS, ROWS, VECTORS) of ROWS rows from `row` on by PANELS panels, `panel_bytes` apart.
template <typename Format, int ROWS, int PANELS>
__attribute__((noinline)) void sum_integers(const Activations& x, int64_t row, const uint8_t* weight, int64_t panel_bytes, Floats* to) {
    typedef Integers<Format> Of;
    typedef typename Of::Dots Dots;
    constexpr int64_t STEP = Format::STEP;
    const int64_t inputs = x.inputs, stride = x.stride;
    const int8_t* q = x.q + row * inputs;
    Floats sums[PANELS][ROWS][VECTORS] = {};
    for (int64_t i = 0; i < inputs; i += Format::BLOCK, weight += Format::BLOCK_BYTES)
        for (int p = 0; p < PANELS; p++) {
            const uint8_t* block = weight + p * panel_bytes;
#pragma GCC unroll 1
            for (int64_t begin = 0; begin < Format::BLOCK; begin += GROUP) {
                const float* facts = x.facts + (i + begin) / GROUP * FACTS * stride + row;
                typename Dots::Sum dots[ROWS][VECTORS];
                for (int r = 0; r < ROWS; r++)
                    for (int v = 0; v < VECTORS; v++) dots[r][v] = Dots::start(Of::from(facts + r, stride));
#pragma GCC unroll 1
                for (int64_t j = begin; j < begin + GROUP; j += STEP) {
                    NOT_UNROLLED(j);
                    const uint8_t* at = Format::words(block) + j / STEP * PANEL * 4;
                    for (int line = 0; line < PANEL * 4; line += 64) __builtin_prefetch(at + FETCHED_AHEAD + line);
                    Words words[VECTORS];
                    for (int v = 0; v < VECTORS; v++) words[v] = load_words(at + v * LANES * 4);
                    for (int part = 0; part < STEP / 4; part++) {
                        typename Dots::Weights weights[VECTORS];
                        for (int v = 0; v < VECTORS; v++) weights[v] = Dots::prepare(Format::four(words[v], part));
                        for (int r = 0; r < ROWS; r++) {
                            const Words four = splat_word(q + r * inputs + i + j + part * 4);
                            for (int v = 0; v < VECTORS; v++) Dots::add(dots[r][v], weights[v], four);
                        }
                    }
                }
                Format scales;
                scales.open_scales(block);
                for (int r = 0; r < ROWS; r++)
                    for (int v = 0; v < VECTORS; v++) {
                        const Ints dot = Dots::total(dots[r][v], Of::from(facts + r, stride));
                        add_group<Format>(sums[p][r][v], dot, scales.scale[v], scales.least[v], facts + r, stride);
                    }
            }
        }
    std::memcpy(to, sums, sizeof sums);
}

template <typename Format, int ROWS, int PANELS, typename Real>
inline void multiply_integers(const Activations& x, const Product<Real>& product, int64_t row, const uint8_t* packed,
                              int64_t panel_bytes, int64_t panel) {
    Floats sums[PANELS * ROWS * VECTORS];
    sum_integers<Format, ROWS, PANELS>(x, row, packed + panel * panel_bytes, panel_bytes, sums);
    for (int p = 0; p < PANELS; p++)
        for (int r = 0; r < ROWS; r++)
            finish(product, row + r, (panel + p) * PANEL, sums + (p * ROWS + r) * VECTORS, VECTORS);
}

// Panels `first` to `last` of the outputs, of all rows. One row is bound by memory: as many streams of it as sums fit.
template <typename Format, typename Real>
void multiply_rows(int64_t rows, const Activations& x, const Product<Real>& product, const uint8_t* packed,
                   int64_t first, int64_t last) {
    constexpr int MOST = Integers<Format>::Dots::ROWS;
    constexpr int STREAMS = 8 / VECTORS;
    const int64_t panel_bytes = product.inputs / Format::BLOCK * Format::BLOCK_BYTES;
    int64_t panel = first;
    if (rows == 1)
        for (; panel + STREAMS <= last; panel += STREAMS)
            multiply_integers<Format, 1, STREAMS>(x, product, 0, packed, panel_bytes, panel);
    int64_t together = ROWS_IN_CACHE / (2 * product.inputs) / MOST * MOST;
    together = together < 4 * MOST ? 4 * MOST : together;
    const int64_t chunks = (rows + together - 1) / together;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {  // of like size
        const int64_t top = rows * chunk / chunks, count = rows * (chunk + 1) / chunks - top;
        const int64_t parts = (count + MOST - 1) / MOST;
        for (int64_t at = panel; at < last; at++)
            for (int64_t part = 0; part < parts; part++) {
                const int64_t row = top + count * part / parts;
                switch (top + count * (part + 1) / parts - row) {
#define ROWS(COUNT) \
    case COUNT: multiply_integers<Format, COUNT <= MOST ? COUNT : 1, 1>(x, product, row, packed, panel_bytes, at); break;
                    ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6)
#undef ROWS
                }
            }
    }
}

}  // namespace
