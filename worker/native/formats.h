// Owns the formats that weights are kept in, and reading them as fp32: a file's weights in another order, never expanded
// in memory. Each weight is read as exactly the number that the file's own dequantisation gives.
//
// A panel is packed as (inputs / BLOCK) blocks, each its scales, then (BLOCK / STEP, PANEL) words of 32 bits: STEP inputs
// of one output side by side. Of eight nibbles in a word the lower half of byte i is input i, its upper half input 4 + i:
// four neighbours are had by one mask.

#pragma once

#include "vectors.h"
#include "product.h"

namespace {

enum Format { SAME, BF16, INT8, INT4, INT4_MIN, INT4_REAL, INT8_REAL, INT8_OFFSET, INT8_FINE };

// The content of a file's blocks: weight = scale · q + least.
struct Quantised {
    const int8_t* q;              // (outputs, inputs)
    const float *scale, *least;   // (outputs, inputs / BLOCK); least may be null
    int64_t scale_inputs;         // inputs that share a scale, a multiple of BLOCK
};

inline Words load_words(const uint8_t* at) {
    Words x;
    std::memcpy(&x, at, sizeof x);
    return x;
}

struct half {
    uint16_t bits;
};

#if defined(__AVX512F__)
inline Floats load(const half* at) { return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)at)); }
inline half to_half(float x) { return {(uint16_t)_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(x), 0), 0)}; }
#elif defined(__aarch64__)
inline Floats load(const half* at) { return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)at))); }
inline half to_half(float x) {
    const __fp16 rounded = x;
    half kept;
    std::memcpy(&kept, &rounded, sizeof kept);
    return kept;
}
#elif defined(DEGAS_MULTIPLIES)
inline Floats load(const half* at) { return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)at)); }
inline half to_half(float x) { return {(uint16_t)_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(x), 0), 0)}; }
#endif

inline void keep(float* at, float x) { *at = x; }

struct Fp32 {
    typedef float Stored;
    static constexpr int64_t BLOCK = 1, STEP = 1, BLOCK_BYTES = PANEL * 4;
    inline void open(const uint8_t*) {}
    static inline const uint8_t* words(const uint8_t* block) { return block; }
    template <int PLACE>
    inline Floats weight(Words words, int) const {
        return (Floats)words;
    }
};

struct Bf16 {
    typedef uint16_t Stored;
    static constexpr int64_t BLOCK = 2, STEP = 2, BLOCK_BYTES = PANEL * 4;
    inline void open(const uint8_t*) {}
    static inline const uint8_t* words(const uint8_t* block) { return block; }
    template <int PLACE>
    inline Floats weight(Words words, int) const {
        return (Floats)(PLACE ? words & 0xffff0000 : words << 16);
    }
};

#if defined(DEGAS_MULTIPLIES)
inline void keep(half* at, float x) { *at = to_half(x); }

// BITS a weight, a scale for each BLOCK_INPUTS inputs of an output. HAS_LEAST: and what is added; else OFFSET is taken off q
// (8 bits: q is signed).
template <int BITS, int BLOCK_INPUTS, typename Scale, bool HAS_LEAST, int OFFSET>
struct Scaled {
    static constexpr int64_t BLOCK = BLOCK_INPUTS, STEP = 32 / BITS;
    static constexpr int NUM_BITS = BITS, LESS = OFFSET;
    static constexpr bool ADDS_LEAST = HAS_LEAST;
    static constexpr int64_t SCALE_BYTES = PANEL * sizeof(Scale);
    static constexpr int64_t HEAD_BYTES = (HAS_LEAST ? 2 : 1) * SCALE_BYTES;
    static constexpr int64_t BLOCK_BYTES = HEAD_BYTES + BLOCK / STEP * PANEL * 4;
    Floats scale[VECTORS], least[VECTORS];

    // What the file holds.
    inline void open_scales(const uint8_t* block) {
        for (int v = 0; v < VECTORS; v++) {
            scale[v] = load((const Scale*)block + v * LANES);
            if (HAS_LEAST) least[v] = load((const Scale*)(block + SCALE_BYTES) + v * LANES);
        }
    }
    inline void open(const uint8_t* block) {
        open_scales(block);
        for (int v = 0; v < VECTORS && OFFSET; v++) least[v] = scale[v] * (float)-OFFSET;
    }
    static inline const uint8_t* words(const uint8_t* block) { return block + HEAD_BYTES; }
    // Of a word the bit at which the weight of an input begins.
    static constexpr int bit(int place) { return BITS == 8 ? place * 8 : place % 4 * 8 + place / 4 * 4; }
    // Four neighbouring inputs' weights, a byte each.
    static inline Words four(Words words, int part) { return BITS == 8 ? words : (part ? words >> 4 : words) & 0x0f0f0f0f; }
    template <int PLACE>
    inline Floats weight(Words words, int v) const {
        constexpr int BIT = bit(PLACE), UP = 32 - BITS - BIT;
        Ints q;
        if (BITS == 8)
            q = (Ints)(words << UP) >> 24;
        else
            q = (Ints)(BIT ? (words >> BIT) : words);
        if (BITS == 4 && UP) q = q & 15;
        const Floats x = __builtin_convertvector(q, Floats);
        return HAS_LEAST || OFFSET ? x * scale[v] + least[v] : x * scale[v];
    }

    static void pack(int64_t outputs, int64_t inputs, const Quantised& from, uint8_t* packed) {
        const int64_t scales = inputs / from.scale_inputs;
        for (int64_t panel = 0; panel < outputs; panel += PANEL)
            for (int64_t begin = 0; begin < inputs; begin += BLOCK, packed += BLOCK_BYTES) {
                std::memset(packed, 0, BLOCK_BYTES);
                for (int64_t o = 0; o < PANEL && panel + o < outputs; o++) {
                    const int64_t output = panel + o, at = output * scales + begin / from.scale_inputs;
                    keep((Scale*)packed + o, from.scale[at]);
                    if (HAS_LEAST) keep((Scale*)(packed + SCALE_BYTES) + o, from.least ? from.least[at] : 0.0f);
                    for (int64_t i = 0; i < BLOCK; i++) {
                        uint32_t word;
                        const int q = from.q[output * inputs + begin + i] + OFFSET;
                        uint8_t* place = packed + HEAD_BYTES + (i / STEP * PANEL + o) * 4;
                        std::memcpy(&word, place, 4);
                        word |= (uint32_t)(q & ((1 << BITS) - 1)) << bit(i % STEP);
                        std::memcpy(place, &word, 4);
                    }
                }
            }
    }
};

typedef Scaled<8, 32, half, false, 0> Int8;       // Q8_0, Q5_0
typedef Scaled<4, 32, half, false, 8> Int4;       // Q4_0
typedef Scaled<4, 32, half, true, 0> Int4Min;     // Q4_1
typedef Scaled<4, 32, float, true, 0> Int4Real;   // Q4_K
typedef Scaled<8, 32, float, true, 0> Int8Offset;    // Q5_1, Q5_K
typedef Scaled<8, 16, float, false, 0> Int8Fine;  // Q6_K
typedef Scaled<8, 16, float, true, 0> Int8Real;   // any of them side by side
#endif

// Whether bf16 holds all of these exactly.
inline bool fit_bf16(int64_t count, const float* weight) {
    uint32_t lower = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        std::memcpy(&bits, weight + i, 4);
        lower |= bits & 0xffff;
    }
    return lower == 0;
}

// weight (outputs, inputs) of `Stored` → packed
template <typename Format>
void pack_panels(int64_t outputs, int64_t inputs, const typename Format::Stored* weight, uint8_t* packed) {
    typedef typename Format::Stored Stored;
    Stored* to = (Stored*)packed;
    for (int64_t panel = 0; panel < outputs; panel += PANEL)
        for (int64_t i = 0; i < inputs; i += Format::STEP)
            for (int64_t o = panel; o < panel + PANEL; o++)
                for (int64_t p = 0; p < Format::STEP; p++) *to++ = o < outputs ? weight[o * inputs + i + p] : Stored{};
}

}  // namespace
