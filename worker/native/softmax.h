// Owns the arithmetic of a softmax that is taken in parts: weights as powers of two, capped scores, joining two parts' sums.

#pragma once

#include <cmath>

#include "units.h"
#include "vectors.h"

namespace {

constexpr float LOG2_E = 1.44269504088896341f;
constexpr float LOWEST = -1e30f;  // below any score, and finite: two of them differ by 0

// 2^x for x ≤ 0, to about two units in the last place, or to 2^-13 if it will be rounded to bf16; nearly 0 below -126, and
// exactly 1 for 0.
template <bool ROUGH = false>
inline Floats power_of_two(Floats x) {
    x = greater_of(x, splat(-126.0f));
#if defined(__AVX512DQ__)
    if (ROUGH) {  // a polynomial of the fraction above the whole number below x
        const Floats r = (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        Floats p = splat(7.7067159116e-2f) * r + 2.2764486074e-1f;
        p = p * r + 6.9511681795e-1f;
        p = p * r + 1.0f;
        return (Floats)_mm512_scalef_ps((__m512)p, (__m512)x);
    }
#endif
    const Floats shifted = x + 12582912.0f;  // 1.5 · 2^23: the last bits of the sum are x rounded to a whole number
    const Floats r = x - (shifted - 12582912.0f);
    Floats p = splat(1.5403530394e-4f) * r + 1.3333558146e-3f;
    p = p * r + 9.6181291076e-3f;
    p = p * r + 5.5504108664e-2f;
    p = p * r + 2.4022650695e-1f;
    p = p * r + 6.9314718056e-1f;
    p = p * r + 1.0f;
    return (Floats)((Words)p + ((Words)shifted << 23));
}

// How products of queries and keys become exponents of two: capped if there is a cap, then times `scale`.
struct Scores {
    explicit Scores(const Shape& shape) : scale(LOG2_E), cap(shape.cap), capped_by(0.0f) {
        const float by_dim = 1.0f / std::sqrt((float)shape.dim);
        if (cap == 0.0f)
            scale *= by_dim;
        else
            capped_by = 2.0f * by_dim / cap;
    }
    // c · tanh u = c - 2c / (e^2u + 1)
    inline Floats capped(Floats product) const { return splat(cap) - splat(2.0f * cap) / (exponential(product * capped_by) + 1.0f); }
    float scale, cap, capped_by;
};

inline float power_of_two(float x) { return power_of_two(splat(x))[0]; }

// Adds the sums (dim,) of other keys to a query's.
inline void join(float* out, float& top, float& total, const float* more, float more_top, float more_total, int dim) {
    const float most = top > more_top ? top : more_top;
    const float own = power_of_two(top - most), other = power_of_two(more_top - most);
    for (int i = 0; i < dim; i += LANES) store(out + i, load(out + i) * own + load(more + i) * other);
    total = total * own + more_total * other;
    top = most;
}

}  // namespace
