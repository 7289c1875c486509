// Owns a CPU's products with weights packed once, on machines with 512-bit vectors: fp32, and bf16 where there are
// matrix registers (AMX) or dot products of pairs (AVX512-BF16). A step has dozens of products of a few microseconds;
// a general library spends longer on finding out what to run. A row's result depends on nothing but the row,
// whatever stands beside it.

#pragma once

#include "vectors.h"

#if defined(__AVX512F__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t PANEL = 4 * LANES;  // outputs side by side; the last panel of a weight is filled up with zeros

// What is done to sums before they are stored. GATE: of every 32 columns the first 16 gate the second.
enum Finish { PLAIN, GELU, ADD, GATE };

template <typename Real>
struct Product {
    int64_t inputs, outputs;
    const Real *x, *bias, *residual;
    Real* out;
    int64_t out_stride;
    int kind;
    const Real* after;  // packed weights that will be wanted next, or null
};

// `vectors` neighbouring sums of one row, to columns from `column` on.
template <typename Real>
inline void finish(const Product<Real>& product, int64_t row, int64_t column, Floats* sums, int64_t vectors) {
    Real* out = product.out + row * product.out_stride;
    for (int64_t v = 0; v < vectors; v++) {
        const int64_t at = column + v * LANES;
        Floats x = sums[v];
        if (product.bias) x = x + load(product.bias + at);
        if (product.kind == GELU) {
            // x · (1 + tanh u) / 2 = x / (1 + e^-2u)
            const Floats u = x * 0.7978845608028654f * (x * x * 0.044715f + 1.0f);
            x = x / (exponential(u * -2.0f) + 1.0f);
        }
        if (product.kind == ADD) x = x + load(product.residual + row * product.outputs + at);
        if (product.kind != GATE) {
            store(out + at, x);
        } else if (v % 2 == 0) {
            sums[v] = x;
        } else {
            store(out + (at - LANES) / 2, silu(sums[v - 1]) * x);
        }
    }
}

#if defined(__AVX512F__) && defined(__linux__)

// Panels are packed as (panels, inputs / STEP, PANEL, STEP): STEP inputs of one output side by side.
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
    const int64_t left = (product.outputs - column) / LANES;
    for (int r = 0; r < ROWS; r++) finish(product, row + r, column, sums[r], left < 4 ? left : 4);
}

// So few rows at a time that they stay in the second-level cache. The next panel comes out of memory while one is
// multiplied: a quarter of it with each pass.
template <typename Real>
void multiply_panels(int64_t rows, const Product<Real>& product, const Real* packed) {
    constexpr int64_t MOST_ROWS = 252;
    for (int64_t begin = 0; begin < rows; begin += MOST_ROWS) {
        const int64_t end = begin + MOST_ROWS < rows ? begin + MOST_ROWS : rows;
        const Real* weight = packed;
        for (int64_t column = 0; column < product.outputs; column += PANEL) {
            const Real* next = weight + PANEL * product.inputs;
            const Real* first_ahead = column + PANEL < product.outputs || !product.after ? next : product.after;
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

// weight (outputs, inputs) → packed, see Panel.
template <typename Real>
void pack_panels(int64_t outputs, int64_t inputs, const Real* weight, Real* packed) {
    constexpr int64_t STEP = Panel<Real>::STEP;
    for (int64_t panel = 0; panel < outputs; panel += PANEL)
        for (int64_t i = 0; i < inputs; i += STEP)
            for (int64_t o = panel; o < panel + PANEL; o++)
                for (int64_t p = 0; p < STEP; p++) *packed++ = o < outputs ? weight[o * inputs + i + p] : Real{};
}

#if defined(__AMX_BF16__)

// A tile of weights: 16 outputs by 32 inputs, as 16 rows of one pair of inputs for each output.
constexpr int64_t TILE = 16 * 32;

struct alignas(64) Tiles {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles 0 to 3 hold sums, 4 and 5 rows of x, 6 and 7 weights.
void configure(int first, int second) {
    Tiles tiles;
    for (int t = 0; t < 8; t++) {
        tiles.bytes[t] = 64;
        tiles.rows[t] = 16;
    }
    tiles.rows[0] = tiles.rows[1] = tiles.rows[4] = first;
    tiles.rows[2] = tiles.rows[3] = tiles.rows[5] = second;
    _tile_loadconfig(&tiles);
}

template <bool TWO_ROWS, bool TWO_COLUMNS>
void multiply_tiles(const bf16* x, int64_t inputs, const bf16* weight, int64_t weight_step, float* sums) {
    _tile_zero(0);
    if (TWO_COLUMNS) _tile_zero(1);
    if (TWO_ROWS) _tile_zero(2);
    if (TWO_ROWS && TWO_COLUMNS) _tile_zero(3);
    for (int64_t i = 0; i < inputs; i += 32, weight += TILE) {
        _tile_loadd(4, x + i, inputs * 2);
        _tile_loadd(6, weight, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (TWO_COLUMNS) {
            _tile_loadd(7, weight + weight_step, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (TWO_ROWS) {
            _tile_loadd(5, x + 16 * inputs + i, inputs * 2);
            _tile_dpbf16ps(2, 5, 6);
            if (TWO_COLUMNS) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 128);
    if (TWO_COLUMNS) _tile_stored(1, sums + 16, 128);
    if (TWO_ROWS) _tile_stored(2, sums + 16 * 32, 128);
    if (TWO_ROWS && TWO_COLUMNS) _tile_stored(3, sums + 16 * 32 + 16, 128);
}

// weight (outputs, inputs) → packed (outputs / 16, inputs / 32, 16 pairs, 16 outputs, 2)
void pack_tiles(int64_t outputs, int64_t inputs, const bf16* weight, bf16* packed) {
    for (int64_t block = 0; block < outputs; block += 16)
        for (int64_t i = 0; i < inputs; i += 2)
            for (int64_t o = block; o < block + 16; o++)
                for (int64_t p = 0; p < 2; p++) *packed++ = weight[o * inputs + i + p];
}

void multiply_all_tiles(int64_t rows, const Product<bf16>& product, const bf16* weight) {
    alignas(64) float sums[32 * 32];
    const int64_t inputs = product.inputs, outputs = product.outputs, step = 16 * inputs;
    for (int64_t begin = 0; begin < rows; begin += 64) {  // so few rows that sums of all columns stay in the cache
        const int64_t end = begin + 64 < rows ? begin + 64 : rows;
        int configured = 0;
        for (int64_t column = 0; column < outputs; column += 32) {
            const bool wide = column + 32 <= outputs;
            for (int64_t row = begin; row < end; row += 32) {
                const int count = end - row < 32 ? end - row : 32;
                if (count != configured) {
                    configure(count < 16 ? count : 16, count > 16 ? count - 16 : 1);
                    configured = count;
                }
                const bf16 *from = product.x + row * inputs, *with = weight + column * inputs;
                if (count > 16)
                    (wide ? multiply_tiles<true, true> : multiply_tiles<true, false>)(from, inputs, with, step, sums);
                else
                    (wide ? multiply_tiles<false, true> : multiply_tiles<false, false>)(from, inputs, with, step, sums);
                for (int r = 0; r < count; r++) {
                    Floats pair[2] = {load(sums + r * 32), load(sums + r * 32 + 16)};
                    finish(product, row + r, column, pair, wide ? 2 : 1);
                }
            }
        }
    }
    _tile_release();
}

#endif
#endif

// What there is for a dtype on this processor: nothing, unless said below.
template <typename Real>
struct Weights {
    static bool are_taken() { return false; }
    static void pack(int64_t, int64_t, const Real*, Real*) {}
    static void multiply(int64_t, const Product<Real>&, const Real*) {}
};

#if defined(__AVX512F__) && defined(__linux__)

template <typename Real>
struct PanelWeights {
    static bool are_taken() { return true; }
    static void pack(int64_t outputs, int64_t inputs, const Real* weight, Real* packed) {
        pack_panels(outputs, inputs, weight, packed);
    }
    static void multiply(int64_t rows, const Product<Real>& product, const Real* packed) {
        multiply_panels(rows, product, packed);
    }
};

template <>
struct Weights<float> : PanelWeights<float> {};

#if defined(__AMX_BF16__)
template <>
struct Weights<bf16> {
    static bool are_taken() {
        constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
        return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    }
    static void pack(int64_t outputs, int64_t inputs, const bf16* weight, bf16* packed) {
        pack_tiles(outputs, inputs, weight, packed);
    }
    static void multiply(int64_t rows, const Product<bf16>& product, const bf16* packed) {
        multiply_all_tiles(rows, product, packed);
    }
};
#elif defined(__AVX512BF16__)
template <>
struct Weights<bf16> : PanelWeights<bf16> {};
#endif

#endif

}  // namespace
