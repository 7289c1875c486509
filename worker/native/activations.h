// Owns activations as the integer products read them: int8, with an fp32 scale for every few neighbouring inputs of a row, a group.
//
// q = round(x · 127 / m), to the nearest, ties to even, and the scale m / 127, for the largest magnitude m of the group. A group
// that is not finite has no numbers for its scale, so that all sums of its row are none. One whose magnitudes are below
// TOO_SMALL is 0.

#pragma once

#include <cmath>

#include "vectors.h"

namespace {

constexpr int64_t GROUP = 16;  // with 32 the error is twice as large (docs/lab-notes.md)
constexpr float TOO_SMALL = 1e-36f;  // 127 over it is finite

// What is known of a group of a row: its scale, the scale times the sum of q, and (a whole number) less that sum, which offsets of
// weights are multiplied by.
enum Fact { SCALE, WEIGHTED, MINUS, FACTS };

// Of some rows of `inputs`, a multiple of 32: q (rows, inputs) and facts (inputs / GROUP, FACTS, stride), those of all rows side by
// side. The stride is an odd number of cache lines, so that a row's do not all meet in one set of a cache.
struct Activations {
    int8_t* q;
    float* facts;
    int64_t inputs, stride;

    static int64_t stride_of(int64_t rows) { return ((rows + 15) / 16 | 1) * 16; }
    static int64_t bytes(int64_t rows, int64_t inputs) {
        return rows * inputs + FACTS * stride_of(rows) * (inputs / GROUP) * (int64_t)sizeof(float);
    }
    // memory: `bytes`, on a boundary of 64 bytes
    Activations(void* memory, int64_t rows, int64_t inputs)
        : facts((float*)memory), inputs(inputs), stride(stride_of(rows)) {
        q = (int8_t*)(facts + FACTS * stride * (inputs / GROUP));
    }
};

// Of as many vectors as there are lanes the largest whole numbers, as one vector; see `sums`.
inline Ints maxima(const Ints* x) {
    Ints halved[LANES];
    for (int i = 0; i < LANES; i++) halved[i] = x[i];
    for (int count = LANES / 2; count; count /= 2)
        for (int i = 0; i < count; i++) {
            const Floats first = (Floats)halved[2 * i], second = (Floats)halved[2 * i + 1];
            const Ints even = (Ints)evens(first, second), odd = (Ints)odds(first, second);
            halved[i] = even > odd ? even : odd;
        }
    return halved[0];
}

// A group of whole numbers from -128 to 127, as bytes. (GCC's conversion of vectors takes out one lane after another.)
inline void store_bytes(int8_t* at, const Ints* x) {
#if defined(__AVX512F__)
    for (int v = 0; v < GROUP / LANES; v++) _mm_storeu_si128((__m128i*)at + v, _mm512_cvtepi32_epi8((__m512i)x[v]));
#elif defined(__AVX2__)
    for (int64_t i = 0; i < GROUP; i += 16, x += 2) {
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)x[0], (__m256i)x[1]), 0xd8);
        const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128((__m128i*)(at + i), bytes);
    }
#elif defined(__aarch64__)
    int16x8_t halves[2];
    for (int i = 0; i < 2; i++) halves[i] = vcombine_s16(vmovn_s32((int32x4_t)x[2 * i]), vmovn_s32((int32x4_t)x[2 * i + 1]));
    vst1q_s8(at, vcombine_s8(vmovn_s16(halves[0]), vmovn_s16(halves[1])));
#else
    for (int64_t i = 0; i < GROUP; i++) at[i] = (int8_t)x[i / LANES][i % LANES];
#endif
}

// `count` groups side by side of one row, at most as many as there are lanes: what is had of each stands in its lane.
template <typename Real>
inline void quantise_groups(const Real* x, int64_t count, int8_t* q, float* facts, int64_t stride) {
    constexpr int NUM = GROUP / LANES;
    constexpr float MAGIC = 12582912.0f;  // 1.5 · 2^23: what is added to it is rounded to a whole number, the lowest bits
    // Magnitudes' bits are in the order of the magnitudes, and above all of them are those of no numbers.
    Ints most[LANES] = {};
    for (int64_t g = 0; g < count; g++)
        for (int v = 0; v < NUM; v++) {
            const Ints magnitude = (Ints)load(x + g * GROUP + v * LANES) & 0x7fffffff;
            most[g] = magnitude > most[g] ? magnitude : most[g];
        }
    const Ints tops = maxima(most), finite = tops < 0x7f800000;
    const Floats top = (Floats)tops, none = splat(NAN), nothing{};
    const Ints counts = finite & (top >= splat(TOO_SMALL));
    const Floats times = counts ? splat(127.0f) / top : nothing, scale = finite ? (counts ? top / splat(127.0f) : nothing) : none;
    Floats whole_sums[LANES] = {};
    for (int64_t g = 0; g < count; g++) {
        Ints whole[NUM];
        for (int v = 0; v < NUM; v++) {
            const Floats magic = load(x + g * GROUP + v * LANES) * times[g] + MAGIC;
            whole[v] = (Ints)magic - (Ints)splat(MAGIC);
            whole_sums[g] += magic - MAGIC;
        }
        store_bytes(q + g * GROUP, whole);
    }
    const Floats total = finite ? sums(whole_sums) : nothing;
    Floats known[FACTS];
    known[SCALE] = scale, known[WEIGHTED] = scale * total, known[MINUS] = (Floats)__builtin_convertvector(-total, Ints);
    for (int64_t g = 0; g < count; g++, facts += FACTS * stride)
        for (int fact = 0; fact < FACTS; fact++) std::memcpy(facts + fact * stride, (const float*)(known + fact) + g, sizeof(float));
}

// Rows `first` to `last` of x (rows, inputs).
template <typename Real>
void quantise_rows(const Real* x, const Activations& to, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++)
        for (int64_t i = 0; i < to.inputs; i += GROUP * LANES) {
            const int64_t left = (to.inputs - i) / GROUP, at = row * to.inputs + i;
            float* facts = to.facts + i / GROUP * FACTS * to.stride + row;
            quantise_groups(x + at, left < LANES ? left : LANES, to.q + at, facts, to.stride);
        }
}

}  // namespace
