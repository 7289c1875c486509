// Owns products on machines with 512-bit vectors whose activations and weights are of one dtype: fp32, and bf16 where there are
// dot products of pairs (AVX512-BF16).

#pragma once

#include <immintrin.h>

#include "product.h"
#include "whole_finish.h"

namespace {

// Panels are packed as formats.h has it.
template <typename Real>
struct Panel;

template <>
struct Panel<float> {
    static constexpr int64_t STEP = 1;
    static inline Floats spread(const float* x) { return _mm512_set1_ps(*x); }
    static inline Floats weights(const float* at) { return load(at); }
    static inline Floats add(Floats sum, Floats x, Floats weight) { return _mm512_fmadd_ps(x, weight, sum); }
};

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
template <>
struct Panel<bf16> {
    static constexpr int64_t STEP = 2;
    static inline __m512bh spread(const bf16* x) {
        int32_t pair;
        std::memcpy(&pair, x, sizeof pair);
        return (__m512bh)_mm512_set1_epi32(pair);
    }
    static inline __m512bh weights(const bf16* at) { return (__m512bh)_mm512_loadu_si512(at); }
    static inline Floats add(Floats sum, __m512bh x, __m512bh weight) { return _mm512_dpbf16_ps(sum, x, weight); }
};
#endif

template <int KIND, int ROWS, typename Real>
inline void finish_rows(const Product<Real>& product, int64_t row, int64_t column, Floats (&sums)[ROWS][4]) {
    Floats bias[4] = {};
    if (product.bias)
        for (int v = 0; v < 4; v++) bias[v] = load(product.bias + column + v * LANES);
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < 4; v += 2)
            finish_pair<KIND>(product, row + r, column + v * LANES, sums[r][v] + bias[v], sums[r][v + 1] + bias[v + 1]);
}

// ROWS rows from `row` on by one panel. `ahead` is fetched meanwhile, a line for every step.
template <int ROWS, typename Real>
void panel_rows(const Product<Real>& product, int64_t row, const Real* weight, int64_t column, const Real* ahead) {
    typedef Panel<Real> Of;
    constexpr int64_t WIDTH = LANES * Of::STEP;
    const Real* x = product.x + row * product.inputs;
    Floats sums[ROWS][4] = {};
    for (int64_t i = 0; i < product.inputs; i += Of::STEP, weight += 4 * WIDTH, ahead += WIDTH) {
        _mm_prefetch((const char*)ahead, _MM_HINT_T1);
        const auto w0 = Of::weights(weight), w1 = Of::weights(weight + WIDTH), w2 = Of::weights(weight + 2 * WIDTH),
                   w3 = Of::weights(weight + 3 * WIDTH);
        for (int r = 0; r < ROWS; r++) {
            const auto one = Of::spread(x + r * product.inputs + i);
            sums[r][0] = Of::add(sums[r][0], one, w0);
            sums[r][1] = Of::add(sums[r][1], one, w1);
            sums[r][2] = Of::add(sums[r][2], one, w2);
            sums[r][3] = Of::add(sums[r][3], one, w3);
        }
    }
    if (column + PANEL <= product.outputs && !product.unrounded) {
        switch (product.kind) {
            case PLAIN: return finish_rows<PLAIN>(product, row, column, sums);
            case GELU: return finish_rows<GELU>(product, row, column, sums);
            case ADD: return finish_rows<ADD>(product, row, column, sums);
            case GATE: return finish_rows<GATE>(product, row, column, sums);
        }
    }
    for (int r = 0; r < ROWS; r++) finish(product, row + r, column, sums[r], 4);
}

// So few rows at a time that they stay in the second-level cache. The next panel comes out of memory while one is
// multiplied: a quarter of it with each pass.
template <typename Real>
void multiply_panels(int64_t rows, const Product<Real>& product, const Real* packed, int64_t first, int64_t last) {
    constexpr int64_t MOST_ROWS = 252;
    for (int64_t begin = 0; begin < rows; begin += MOST_ROWS) {
        const int64_t end = begin + MOST_ROWS < rows ? begin + MOST_ROWS : rows;
        const Real* weight = packed + first * PANEL * product.inputs;
        for (int64_t panel = first; panel < last; panel++) {
            const int64_t column = panel * PANEL;
            const Real* next = weight + PANEL * product.inputs;
            const Real* first_ahead = column + PANEL < product.outputs || !product.after ? next : (const Real*)product.after;
            const Real* ahead = first_ahead;
#define ROWS(COUNT)                                         \
    panel_rows<COUNT>(product, row, weight, column, ahead); \
    if (ahead < first_ahead + 3 * LANES * product.inputs) ahead += LANES * product.inputs
            int64_t row = begin;
            for (; row + 6 <= end; row += 6) {
                ROWS(6);
            }
            switch (end - row) {
                case 5: ROWS(5); break;
                case 4: ROWS(4); break;
                case 3: ROWS(3); break;
                case 2: ROWS(2); break;
                case 1: ROWS(1); break;
            }
#undef ROWS
            weight = next;
        }
    }
}

}  // namespace
