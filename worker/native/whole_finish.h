// Owns what is done to whole vectors of sums on machines with 512-bit vectors: the same as `finish`, two neighbours at a time.
//
// What is rounded to bf16 is taken to 2^-13 of its size, and numbers too small for bf16's exponents become 0.

#pragma once

#include <immintrin.h>

#include "product.h"
#include "softmax.h"

namespace {

#if defined(__AVX512BF16__)
// x · sigmoid(z)
inline Floats rough_gate(Floats x, Floats z) {
    const Floats e = power_of_two<true>((Floats)_mm512_abs_ps((__m512)z) * -LOG2_E);
    const Floats larger = (Floats)_mm512_rcp14_ps((__m512)(e + 1.0f));
    return x * (z < splat(0.0f) ? e * larger : larger);
}

// With z twice the tanh's argument, x · (1 + tanh(z / 2)) / 2 is x · sigmoid(z).
inline Floats rough_gelu(Floats x) { return rough_gate(x, x * 1.5957691216057308f * (x * x * 0.044715f + 1.0f)); }

// 32 neighbouring sums of a row from `column` on, their bias added: a whole cache line of outputs, or half of one.
template <int KIND>
inline void finish_pair(const Product<bf16>& product, int64_t row, int64_t column, Floats a, Floats b) {
    bf16* out = product.out + row * product.out_stride;
    if (KIND == GATE) return store(out + column / 2, rough_gate(a, a) * b);
    if (KIND == GELU) a = rough_gelu(a), b = rough_gelu(b);
    if (KIND == ADD) {
        const bf16* more = product.residual + row * product.outputs + column;
        a += load(more), b += load(more + LANES);
    }
    store_two(out + column, a, b);
}
#endif

template <int KIND>
inline void finish_pair(const Product<float>& product, int64_t row, int64_t column, Floats a, Floats b) {
    float* out = product.out + row * product.out_stride;
    if (KIND == GATE) return store(out + column / 2, silu(a) * b);
    if (KIND == GELU) a = gelu(a), b = gelu(b);
    if (KIND == ADD) {
        const float* more = product.residual + row * product.outputs + column;
        a += load(more), b += load(more + LANES);
    }
    store_two(out + column, a, b);
}

}  // namespace
