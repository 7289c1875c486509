// Owns the vectors that the compiled operations compute with: as many floats as a register of the processor holds,
// loaded from and stored to fp32 and bf16.
//
// GCC's and clang's vectors, never wider than a register, because compilers keep wider ones in memory. They are `__m512`,
// `__m256` or, on Arm, `float32x4_t` under another name, so that intrinsics take them as they are.

#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

// Processors that there are compiled products for: those with integer vectors, and instructions that read 16-bit floats.
#if (defined(__AVX2__) && defined(__F16C__)) || (defined(__aarch64__) && defined(__ARM_NEON))
#define DEGAS_MULTIPLIES
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Floats __attribute__((vector_size(LANES * 4), may_alias));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef float Sixteen __attribute__((vector_size(64)));
typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));

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
#if defined(__AVX512F__) && defined(__AVX512BF16__)
    // The same in one instruction, but that numbers too small for bf16's exponents become 0.
    const __m256bh whole = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy((void*)at, &whole, sizeof whole);
    return;
#endif
    const Words bits = (Words)x;
    // To the nearest, ties to even. A NaN keeps its upper half, made quiet: rounding could carry it into infinity.
    const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Halves half = __builtin_convertvector(x == x ? rounded : (bits >> 16) | 0x40, Halves);
    std::memcpy(at, &half, sizeof half);
}

// Two vectors side by side: of bf16 a whole cache line, rounded by one instruction.
inline void store_two(float* at, Floats x, Floats y) { store(at, x), store(at + LANES, y); }

inline void store_two(bf16* at, Floats x, Floats y) {
#if defined(__AVX512F__) && defined(__AVX512BF16__)
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)y, (__m512)x);
    std::memcpy((void*)at, &both, sizeof both);
#else
    store(at, x), store(at + LANES, y);
#endif
}

inline Floats splat(float x) { return x - Floats{}; }  // not x + 0, which would have to make 0 of -0

// Keeps a vector that is used several times in a register; GCC would load it again for each use.
inline void keep_loaded(Floats& x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#endif
}

// In a loop that counts by i, which GCC for Arm would unroll in spite of its pragma, and then not keep sums in registers.
#if defined(__aarch64__)
#define NOT_UNROLLED(i) asm("" : "+r"(i))
#else
#define NOT_UNROLLED(i)
#endif

inline Four folded(Four x) { return x; }

inline Four folded(Eight x) {
    Four parts[2];
    std::memcpy(parts, &x, sizeof parts);
    return parts[0] + parts[1];
}

inline Four folded(Sixteen x) {
    Eight parts[2];
    std::memcpy(parts, &x, sizeof parts);
    return folded(parts[0] + parts[1]);
}

inline float sum(Floats x) {
    const Four four = folded(x);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

// Lanes of x and y, y's counted from LANES on, in an order given by a function of the place.
template <typename Order, int... PLACES>
inline Floats shuffled(Floats x, Floats y, std::integer_sequence<int, PLACES...>) {
    return __builtin_shufflevector(x, y, Order::of(PLACES)...);
}

#define SHUFFLE(NAME, WHERE)                                                        \
    struct NAME##_order {                                                           \
        static constexpr int of(int i) { return WHERE; }                            \
    };                                                                              \
    inline Floats NAME(Floats x, Floats y) {                                        \
        return shuffled<NAME##_order>(x, y, std::make_integer_sequence<int, LANES>()); \
    }
SHUFFLE(evens, 2 * i)
SHUFFLE(odds, 2 * i + 1)
// The other way about: x's and y's places in turn, of their first halves and of their last.
SHUFFLE(lower_pairs, i % 2 * LANES + i / 2)
SHUFFLE(upper_pairs, i % 2 * LANES + i / 2 + LANES / 2)
// Of each pair of x the first twice, the second twice, and the two changing places.
SHUFFLE(firsts, i / 2 * 2)
SHUFFLE(seconds, i / 2 * 2 + 1)
SHUFFLE(swapped, i ^ 1)
SHUFFLE(of_even_lanes, i % 2 ? LANES + i : i)
#undef SHUFFLE

// Sums of neighbours: x's, then y's.
inline Floats halve(Floats x, Floats y) { return evens(x, y) + odds(x, y); }

// As many vectors' sums as there are lanes, as one vector. Neighbours are halved into one another over and over, which
// costs a fifth of summing each.
inline Floats sums(const Floats* x) {
    Floats halved[LANES / 2];
    for (int i = 0; i < LANES / 2; i++)
        halved[i] = halve(x[2 * i], x[2 * i + 1]);
    for (int count = LANES / 4; count; count /= 2)
        for (int i = 0; i < count; i++)
            halved[i] = halve(halved[2 * i], halved[2 * i + 1]);
    return halved[0];
}

inline Four larger(Four x) { return x; }

inline Four larger(Eight x) {
    Four parts[2];
    std::memcpy(parts, &x, sizeof parts);
    return parts[0] > parts[1] ? parts[0] : parts[1];
}

inline Four larger(Sixteen x) {
    Eight parts[2];
    std::memcpy(parts, &x, sizeof parts);
    return larger(parts[0] > parts[1] ? parts[0] : parts[1]);
}

inline float largest(Floats x) {
    const Four four = larger(x);
    const float even = four[0] > four[2] ? four[0] : four[2], odd = four[1] > four[3] ? four[1] : four[3];
    return even > odd ? even : odd;
}

// Lane by lane; y where one of them is no number. One operation, where compilers make two of a comparison.
inline Floats greater_of(Floats x, Floats y) {
#if defined(__AVX512F__)
    return _mm512_max_ps(x, y);
#elif defined(__AVX2__)
    return _mm256_max_ps(x, y);
#else
    return x > y ? x : y;
#endif
}

// As many vectors as there are lanes: lane i of vector j and lane j of vector i change places.
inline void transpose(Floats* x) {
    for (int round = 1; round < LANES; round *= 2) {
        Floats mixed[LANES];
        for (int i = 0; i < LANES / 2; i++) {
            mixed[2 * i] = lower_pairs(x[i], x[i + LANES / 2]);
            mixed[2 * i + 1] = upper_pairs(x[i], x[i + LANES / 2]);
        }
        for (int i = 0; i < LANES; i++) x[i] = mixed[i];
    }
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

// visit(PLACE), …, visit(COUNT - 1), each place a constant: what it indexes stays in registers.
template <int PLACE, int COUNT>
struct Places {
    template <typename Visit>
    static inline __attribute__((always_inline)) void each(const Visit& visit) {
        visit(std::integral_constant<int, PLACE>());
        Places<PLACE + 1, COUNT>::each(visit);
    }
};
template <int COUNT>
struct Places<COUNT, COUNT> {
    template <typename Visit>
    static inline __attribute__((always_inline)) void each(const Visit&) {}
};

}  // namespace
