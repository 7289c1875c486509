// Owns the vectors that the compiled operations compute with: sixteen floats, loaded from and stored to fp32 and bf16.
//
// Plain GCC and clang vectors: the compiler splits them where its registers are narrower. On x86 they are `__m512`
// under another name, so that intrinsics take them as they are.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 16;
typedef float Floats __attribute__((vector_size(64), may_alias));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(32)));

struct bf16 {
    uint16_t bits;
};

inline Floats load(const float* at) {
    Floats x;
    std::memcpy(&x, at, sizeof x);
    return x;
}

inline Floats load(const bf16* at) {
    Halves x;
    std::memcpy(&x, at, sizeof x);
    return (Floats)(__builtin_convertvector(x, Words) << 16);
}

inline void store(float* at, Floats x) { std::memcpy(at, &x, sizeof x); }

inline void store(bf16* at, Floats x) {
    const Words bits = (Words)x;
    // To the nearest, ties to even. A NaN keeps its upper half, made quiet: rounding could carry it into infinity.
    const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Halves half = __builtin_convertvector(x == x ? rounded : (bits >> 16) | 0x40, Halves);
    std::memcpy(at, &half, sizeof half);
}

inline Floats splat(float x) { return Floats{} + x; }

inline float sum(Floats x) {
    Eight low, high;
    std::memcpy(&low, &x, sizeof low);
    std::memcpy(&high, (const char*)&x + sizeof low, sizeof high);
    low += high;
    Four first, second;
    std::memcpy(&first, &low, sizeof first);
    std::memcpy(&second, (const char*)&low + sizeof first, sizeof second);
    first += second;
    return (first[0] + first[2]) + (first[1] + first[3]);
}

inline Floats evens(Floats x, Floats y) {
    return __builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}

inline Floats odds(Floats x, Floats y) {
    return __builtin_shufflevector(x, y, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

// The other way about: x's and y's places in turn, of their first eight and of their last.
inline Floats lower_pairs(Floats x, Floats y) {
    return __builtin_shufflevector(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}

inline Floats upper_pairs(Floats x, Floats y) {
    return __builtin_shufflevector(x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

// Sums of neighbours: x's eight, then y's.
inline Floats halve(Floats x, Floats y) { return evens(x, y) + odds(x, y); }

// Sixteen vectors' sums as one vector. Neighbours are halved into one another four times over, which costs a
// fifth of summing each.
inline Floats sums(const Floats* x) {
    Floats halved[LANES / 2];
    for (int i = 0; i < LANES / 2; i++)
        halved[i] = halve(x[2 * i], x[2 * i + 1]);
    for (int count = LANES / 4; count; count /= 2)
        for (int i = 0; i < count; i++)
            halved[i] = halve(halved[2 * i], halved[2 * i + 1]);
    return halved[0];
}

inline float largest(Floats x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
}

// e^x to about two units in the last place (a polynomial in the fraction of x · log2 e); 0 below -87, at most e^88.
inline Floats exponential(Floats x) {
    x = x < splat(-87.0f) ? splat(-87.0f) : x;
    x = x > splat(88.0f) ? splat(88.0f) : x;
    const Floats power = x * 1.44269504088896341f;
    const Ints whole = __builtin_convertvector(power + (power < splat(0.0f) ? splat(-0.5f) : splat(0.5f)), Ints);
    // The fraction, times ln 2, from x itself: ln 2 in two parts keeps its last bits.
    const Floats turns = __builtin_convertvector(whole, Floats);
    const Floats r = (x - turns * 0.693359375f) + turns * 2.12194440e-4f;
    Floats p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * (Floats)((whole + 127) << 23);
}

inline Floats silu(Floats x) { return x / (exponential(-x) + 1.0f); }

}  // namespace
