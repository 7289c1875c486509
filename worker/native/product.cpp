// Owns a CPU's products with weights packed once: fp32 on machines with 512-bit vectors, bf16 on those with matrix
// registers (AMX). A step has dozens of products of a few microseconds; a general library spends longer on finding
// out what to run. A row's result depends on nothing but the row, whatever stands beside it.

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int64_t LANES = 16;
typedef uint16_t bf16;

// What is done to a sum before it is stored.
enum Finish { PLAIN, GELU, ADD };

inline __m512 load(const float* at) { return _mm512_loadu_ps(at); }

inline __m512 load(const bf16* at) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at)), 16));
}

inline void store(float* at, __m512 x) { _mm512_storeu_ps(at, x); }

inline void store(bf16* at, __m512 x) {
    const __m512i bits = _mm512_castps_si512(x), upper = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_or_epi32(rounded, nan, upper, _mm512_set1_epi32(0x40));
    _mm256_storeu_si256((__m256i*)at, _mm512_cvtepi32_epi16(result));
}

// e^x for x in -87 … 88, beyond which it stays; to about two units in the last place.
inline __m512 exponential(__m512 x) {
    // The bounds first: of two operands one of which is NaN, these give the second.
    x = _mm512_min_ps(_mm512_set1_ps(88.0f), _mm512_max_ps(_mm512_set1_ps(-87.0f), x));
    const __m512 whole = _mm512_roundscale_ps(x * 1.44269504088896341f, 0);
    const __m512 r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return _mm512_scalef_ps(p, whole);
}

template <typename Real>
inline void finish(__m512 x, int64_t column, const Real* bias, const Real* residual, Real* out, int kind) {
    if (bias) x = x + load(bias + column);
    if (kind == GELU) {
        // x · (1 + tanh u) / 2 = x / (1 + e^-2u)
        const __m512 u = x * 0.7978845608028654f * (x * x * 0.044715f + 1.0f);
        x = x / (exponential(u * -2.0f) + 1.0f);
    }
    if (kind == ADD) x = x + load(residual + column);
    store(out + column, x);
}

// ---------------------------------------------------------------- fp32

constexpr int64_t PANEL = 4 * LANES;  // outputs side by side; packed weights are (panels, inputs, PANEL)

template <int ROWS>
void panel_rows(const float* x, int64_t inputs, const float* weight, int64_t column, int64_t vectors, const float* bias,
                const float* residual, float* out, int64_t out_stride, int64_t outputs, int kind) {
    __m512 sums[ROWS][4];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < 4; v++) sums[r][v] = _mm512_setzero_ps();
    for (int64_t i = 0; i < inputs; i++, weight += PANEL) {
        const __m512 w0 = load(weight), w1 = load(weight + 16), w2 = load(weight + 32), w3 = load(weight + 48);
        for (int r = 0; r < ROWS; r++) {
            const __m512 one = _mm512_set1_ps(x[r * inputs + i]);
            sums[r][0] = _mm512_fmadd_ps(one, w0, sums[r][0]);
            sums[r][1] = _mm512_fmadd_ps(one, w1, sums[r][1]);
            sums[r][2] = _mm512_fmadd_ps(one, w2, sums[r][2]);
            sums[r][3] = _mm512_fmadd_ps(one, w3, sums[r][3]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < vectors; v++)
            finish(sums[r][v], column + v * LANES, bias, residual ? residual + r * outputs : nullptr,
                   out + r * out_stride, kind);
}

// ---------------------------------------------------------------- bf16

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

#endif

}  // namespace

extern "C" {

int can_multiply_float32() { return 1; }

// weight (outputs, inputs) → packed (outputs in whole panels, inputs, PANEL)
void pack_float32(int64_t outputs, int64_t inputs, const float* weight, float* packed) {
    for (int64_t panel = 0; panel < outputs; panel += PANEL)
        for (int64_t i = 0; i < inputs; i++)
            for (int64_t o = panel; o < panel + PANEL; o++) *packed++ = o < outputs ? weight[o * inputs + i] : 0.0f;
}

void multiply_float32(int64_t rows, int64_t inputs, int64_t outputs, const float* x, const float* weight,
                      const float* bias, const float* residual, float* out, int64_t out_stride, int kind) {
    for (int64_t column = 0; column < outputs; column += PANEL, weight += PANEL * inputs) {
        const int64_t left = (outputs - column) / LANES, vectors = left < 4 ? left : 4;
#define ROWS(COUNT)                                                                                              \
    panel_rows<COUNT>(x + row * inputs, inputs, weight, column, vectors, bias,                                   \
                      residual ? residual + row * outputs : nullptr, out + row * out_stride, out_stride, outputs, kind)
        int64_t row = 0;
        for (; row + 6 <= rows; row += 6) ROWS(6);
        switch (rows - row) {
            case 5: ROWS(5); break;
            case 4: ROWS(4); break;
            case 3: ROWS(3); break;
            case 2: ROWS(2); break;
            case 1: ROWS(1); break;
        }
#undef ROWS
    }
}

#if defined(__AMX_BF16__)

int can_multiply_bfloat16() {
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

// weight (outputs, inputs) → packed (outputs / 16, inputs / 32, 16 pairs, 16 outputs, 2)
void pack_bfloat16(int64_t outputs, int64_t inputs, const bf16* weight, bf16* packed) {
    for (int64_t block = 0; block < outputs; block += 16)
        for (int64_t i = 0; i < inputs; i += 2)
            for (int64_t o = block; o < block + 16; o++)
                for (int64_t p = 0; p < 2; p++) *packed++ = weight[o * inputs + i + p];
}

void multiply_bfloat16(int64_t rows, int64_t inputs, int64_t outputs, const bf16* x, const bf16* weight,
                       const bf16* bias, const bf16* residual, bf16* out, int64_t out_stride, int kind) {
    alignas(64) float sums[32 * 32];
    const int64_t step = 16 * inputs;
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
                const bf16 *from = x + row * inputs, *with = weight + column * inputs;
                if (count > 16)
                    (wide ? multiply_tiles<true, true> : multiply_tiles<true, false>)(from, inputs, with, step, sums);
                else
                    (wide ? multiply_tiles<false, true> : multiply_tiles<false, false>)(from, inputs, with, step, sums);
                for (int r = 0; r < count; r++)
                    for (int v = 0; v < (wide ? 2 : 1); v++)
                        finish(load(sums + r * 32 + v * 16), column + v * LANES, bias,
                               residual ? residual + (row + r) * outputs : nullptr, out + (row + r) * out_stride, kind);
            }
        }
    }
    _tile_release();
}

#else
int can_multiply_bfloat16() { return 0; }
void pack_bfloat16(int64_t, int64_t, const void*, void*) {}
void multiply_bfloat16(int64_t, int64_t, int64_t, const void*, const void*, const void*, const void*, void*, int64_t, int) {}
#endif
}

#else

extern "C" {
int can_multiply_float32() { return 0; }
int can_multiply_bfloat16() { return 0; }
void pack_float32(int64_t, int64_t, const void*, void*) {}
void pack_bfloat16(int64_t, int64_t, const void*, void*) {}
void multiply_float32(int64_t, int64_t, int64_t, const void*, const void*, const void*, const void*, void*, int64_t, int) {}
void multiply_bfloat16(int64_t, int64_t, int64_t, const void*, const void*, const void*, const void*, void*, int64_t, int) {}
}

#endif
