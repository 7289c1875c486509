// Owns the description of a product on a CPU, and what is done with its sums: bias, activation, residual, storing.

#pragma once

#include "vectors.h"

namespace {

// Outputs side by side, as many as the registers (16 of 256 bits, 32 of others) take for six rows: the last panel of a weight is filled up with zeros.
constexpr int64_t VECTORS = LANES == 8 ? 2 : 4;
constexpr int64_t PANEL = VECTORS * LANES;

// What is done to sums before they are stored. GATE: of every 2 · LANES columns the first half gates the second.
enum Finish { PLAIN, GELU, ADD, GATE };

template <typename Real>
struct Product {
    int64_t inputs, outputs;
    const Real *x, *bias, *residual;
    Real* out;
    int64_t out_stride;
    int kind;
    float* unrounded;   // where sums go instead of `out`, in fp32; or null
    const void* after;  // packed weights that will be wanted next, or null
};

// x · (1 + tanh u) / 2 = x / (1 + e^-2u)
inline Floats gelu(Floats x) {
    const Floats u = x * 0.7978845608028654f * (x * x * 0.044715f + 1.0f);
    return x / (exponential(u * -2.0f) + 1.0f);
}

// The first `count` of a vector, if there are so few left; of what is loaded the rest is 0.
template <typename Real>
inline Floats load_some(const Real* at, int64_t count) {
    if (count >= LANES) return load(at);
    Real whole[LANES] = {};
    std::memcpy(whole, at, count * sizeof(Real));
    return load(whole);
}

template <typename Real>
inline void store_some(Real* at, Floats x, int64_t count) {
    if (count >= LANES) return store(at, x);
    Real whole[LANES];
    store(whole, x);
    std::memcpy(at, whole, count * sizeof(Real));
}

// `vectors` neighbouring sums of one row, to columns from `column` on; those behind the last output are dropped.
template <typename Real>
inline void finish(const Product<Real>& product, int64_t row, int64_t column, Floats* sums, int64_t vectors) {
    Real* out = product.out + row * product.out_stride;
    for (int64_t v = 0; v < vectors; v++) {
        const int64_t at = column + v * LANES, left = product.outputs - at;
        if (left <= 0) return;
        Floats x = sums[v];
        if (product.bias) x = x + load_some(product.bias + at, left);
        if (product.unrounded) {
            store_some(product.unrounded + row * product.out_stride + at, x, left);
            continue;
        }
        if (product.kind == GELU) x = gelu(x);
        if (product.kind == ADD) x = x + load_some(product.residual + row * product.outputs + at, left);
        if (product.kind != GATE) {
            store_some(out + at, x, left);
        } else if (v % 2 == 0) {
            sums[v] = x;
        } else {
            store(out + (at - LANES) / 2, silu(sums[v - 1]) * x);
        }
    }
}

}  // namespace
