// Owns the integer dot products that an instruction set has: of four bytes of a weight with four of an activation, added to a
// sum for each output. All of integer_products.h that differs from processor to processor stands here.
//
// Nibbles: weights from 0 to 15; Bytes: from -128 to 127. Activations are from -127 to 127. Both hold sums of a block of at most
// 32 inputs. What is `start`ed with a sum (of so much for each activation) and `total`led is that sum and the products, exactly.

#pragma once

#include "vectors.h"

#if defined(DEGAS_MULTIPLIES)

namespace {

// Of four weights and activations each to a 32-bit lane; the weights unsigned on x86, with a sign on Arm.
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#define DEGAS_DOT4
inline Ints dot4(Ints sum, Words weights, Words x) { return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, (__m512i)x); }
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
#define DEGAS_DOT4
inline Ints dot4(Ints sum, Words weights, Words x) { return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)weights, (__m256i)x); }
#elif defined(__ARM_FEATURE_DOTPROD)
#define DEGAS_DOT4
inline Ints dot4(Ints sum, Words weights, Words x) { return (Ints)vdotq_s32((int32x4_t)sum, (int8x16_t)weights, (int8x16_t)x); }
#endif

#if defined(DEGAS_DOT4)

struct Nibbles {
    static constexpr int ROWS = LANES == 4 ? 4 : 6;  // whose sums of a panel fit the registers, on Arm beside nibbles taken apart
    static constexpr int BIAS_SHIFT = -1;
    typedef Words Weights;
    typedef Ints Sum;
    static inline Weights prepare(Words weights) { return weights; }
    static inline Sum start(Ints from) { return from; }
    static inline void add(Sum& sum, Weights weights, Words x) { sum = dot4(sum, weights, x); }
    static inline Ints total(Sum sum, Ints) { return sum; }
};

#if defined(__aarch64__)
struct Bytes : Nibbles {
    static constexpr int ROWS = 6;
};
#else
// A weight is read as itself and 128, which the sum starts without: 2^BIAS_SHIFT for each activation.
struct Bytes : Nibbles {
    static constexpr int BIAS_SHIFT = 7;
    static inline Weights prepare(Words weights) { return weights ^ 0x80808080; }
};
#endif

#elif defined(__aarch64__)

// Products in 16 bits, two vectors of them: of the first two outputs and of the last two. Nothing overflows: eight products of 15
// and 127, of neighbours sixteen; or two of 128 and 127.
inline int16x8_t neighbours(int16x8_t first, int16x8_t last) { return vpaddq_s16(first, last); }

struct Nibbles {
    static constexpr int ROWS = 3;
    static constexpr int BIAS_SHIFT = -1;
    typedef Words Weights;
    struct Sum {
        int16x8_t first, last;
    };
    static inline Weights prepare(Words weights) { return weights; }
    static inline Sum start(Ints) { return {vdupq_n_s16(0), vdupq_n_s16(0)}; }
    static inline void add(Sum& sum, Weights weights, Words x) {
        sum.first = vmlal_s8(sum.first, vget_low_s8((int8x16_t)weights), vget_low_s8((int8x16_t)x));
        sum.last = vmlal_high_s8(sum.last, (int8x16_t)weights, (int8x16_t)x);
    }
    static inline Ints total(Sum sum, Ints from) { return (Ints)vpaddlq_s16(neighbours(sum.first, sum.last)) + from; }
};

struct Bytes {
    static constexpr int ROWS = 4;
    static constexpr int BIAS_SHIFT = -1;
    typedef Words Weights;
    typedef Ints Sum;
    static inline Weights prepare(Words weights) { return weights; }
    static inline Sum start(Ints from) { return from; }
    static inline void add(Sum& sum, Weights weights, Words x) {
        const int16x8_t first = vmull_s8(vget_low_s8((int8x16_t)weights), vget_low_s8((int8x16_t)x));
        sum = (Ints)vpadalq_s16((int32x4_t)sum, neighbours(first, vmull_high_s8((int8x16_t)weights, (int8x16_t)x)));
    }
    static inline Ints total(Sum sum, Ints) { return sum; }
};

#else

// Sums of neighbouring products in 16 bits. Nothing saturates: sixteen products of 15 and 127, or two of 128 and 127.
#if defined(__AVX512F__)
inline Ints pairs(Words weights, Words x) { return (Ints)_mm512_maddubs_epi16((__m512i)weights, (__m512i)x); }
inline Ints add_pairs(Ints x, Ints y) { return (Ints)_mm512_add_epi16((__m512i)x, (__m512i)y); }
inline Ints add_up(Ints pairs) { return (Ints)_mm512_madd_epi16((__m512i)pairs, _mm512_set1_epi16(1)); }
#else
inline Ints pairs(Words weights, Words x) { return (Ints)_mm256_maddubs_epi16((__m256i)weights, (__m256i)x); }
inline Ints add_pairs(Ints x, Ints y) { return (Ints)_mm256_add_epi16((__m256i)x, (__m256i)y); }
inline Ints add_up(Ints pairs) { return (Ints)_mm256_madd_epi16((__m256i)pairs, _mm256_set1_epi16(1)); }
#endif

struct Nibbles {
    static constexpr int ROWS = 5;
    static constexpr int BIAS_SHIFT = -1;
    typedef Words Weights;
    typedef Ints Sum;  // in pairs
    static inline Weights prepare(Words weights) { return weights; }
    static inline Sum start(Ints) { return Ints{}; }
    static inline void add(Sum& sum, Weights weights, Words x) { sum = add_pairs(sum, pairs(weights, x)); }
    static inline Ints total(Sum sum, Ints from) { return add_up(sum) + from; }
};

// The weight's magnitude, and its sign given to the activation: of 128 the magnitude is read without a sign.
struct Bytes {
    static constexpr int ROWS = 4;
    static constexpr int BIAS_SHIFT = -1;
    typedef Ints Sum;
    static inline Sum start(Ints from) { return from; }
    static inline Ints total(Sum sum, Ints) { return sum; }
#if defined(__AVX512F__)
    struct Weights {
        Words magnitude;
        __mmask64 negative;
    };
    static inline Weights prepare(Words weights) {
        return {(Words)_mm512_abs_epi8((__m512i)weights), _mm512_movepi8_mask((__m512i)weights)};
    }
    static inline void add(Sum& sum, const Weights& weights, Words x) {
        const Words with = (Words)_mm512_mask_sub_epi8((__m512i)x, weights.negative, _mm512_setzero_si512(), (__m512i)x);
        sum += add_up(pairs(weights.magnitude, with));
    }
#else
    struct Weights {
        Words magnitude, weights;
    };
    static inline Weights prepare(Words weights) { return {(Words)_mm256_abs_epi8((__m256i)weights), weights}; }
    static inline void add(Sum& sum, const Weights& weights, Words x) {
        const Words with = (Words)_mm256_sign_epi8((__m256i)x, (__m256i)weights.weights);
        sum += add_up(pairs(weights.magnitude, with));
    }
#endif
};

#endif

}  // namespace

#endif
