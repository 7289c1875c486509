// Owns the unit that rounds weights to ggml's blocks of 32: Q8_0, and Q4_1 with the range that suits each block best.
//
// The arithmetic is quantiser.py's, operation by operation and each rounded by itself (build.py has this unit compiled without
// fused ones), its sums in the order that torch has on x86: of numbers eight apart, then those eight one by one. As many
// blocks as a vector has lanes are rounded side by side, so that nothing is summed across lanes.

#include "units.h"
#include "vectors.h"

#if defined(DEGAS_MULTIPLIES)

#include "formats.h"

namespace {

constexpr int64_t VALUES = 32;
constexpr float LARGEST = 60000.0f;  // scales and offsets are 16-bit floats
constexpr double CLIPPED[] = {0.0, 0.04, 0.08, 0.12, 0.16};  // of a block's range, at either end
constexpr float TO_WHOLE = 12582912.0f;  // 1.5 · 2^23: what is added to a small number leaves no bits behind the point

// LANES blocks, a block a lane; behind the last of `count` that one again. Whether all numbers are finite and not too large.
template <typename Real>
inline bool read_blocks(const Real* from, int64_t count, Floats* x) {
    for (int64_t part = 0; part < VALUES; part += LANES) {
        for (int64_t b = 0; b < LANES; b++) x[part + b] = load(from + (b < count ? b : count - 1) * VALUES + part);
        transpose(x + part);
    }
    Ints fits = splat(0.0f) == splat(0.0f);
    for (int64_t i = 0; i < VALUES; i++) fits &= (x[i] < splat(LARGEST)) & (x[i] > splat(-LARGEST));
    bool all = true;
    for (int b = 0; b < LANES; b++) all &= fits[b] != 0;
    return all;
}

template <typename Value>
inline Floats sum_of(const Value& value) {
    Floats total = {};
    for (int64_t i = 0; i < 8; i++) total += ((value(i) + value(8 + i)) + value(16 + i)) + value(24 + i);
    return total;
}

// 1 / scale, 0 where that is 0.
inline Floats inverse(Floats scale) { return scale == splat(0.0f) ? splat(0.0f) : splat(1.0f) / scale; }

// To the nearest whole number within the bounds, ties to even.
inline Floats nearest(Floats x, float low, float high) {
    x = x < splat(low) ? splat(low) : x;
    x = x > splat(high) ? splat(high) : x;
    return (x + splat(TO_WHOLE)) - splat(TO_WHOLE);
}

inline Floats as_half(Floats x) {
    half kept[LANES];
    for (int b = 0; b < LANES; b++) kept[b] = to_half(x[b]);
    return load(kept);
}

struct Range {
    Floats scale, least;
};

inline void levels(const Floats* x, Range range, Floats* q) {
    const Floats by = inverse(range.scale);
    for (int64_t i = 0; i < VALUES; i++) q[i] = nearest((x[i] - range.least) * by, 0.0f, 15.0f);
}

// The range that suits the levels best which this one gives, by least squares; itself for a block of one level.
inline Range fitted(const Floats* x, Floats x_sum, Range range) {
    Floats q[VALUES];
    levels(x, range, q);
    Floats q_sum = {}, squares = {};  // whole numbers: exact in any order
    for (int64_t i = 0; i < VALUES; i++) q_sum += q[i], squares += q[i] * q[i];
    const Floats products = sum_of([&](int64_t i) { return q[i] * x[i]; });
    const Floats spread = 32.0f * squares - q_sum * q_sum;
    const Floats slope = (32.0f * products - q_sum * x_sum) / spread;
    const Floats least = (x_sum - slope * q_sum) / 32.0f;
    return {spread > splat(0.0f) ? slope : range.scale, spread > splat(0.0f) ? least : range.least};
}

inline void store_scale(uint8_t* to, float scale) {
    const half kept = to_half(scale);
    std::memcpy(to, &kept, sizeof kept);
}

struct Q8_0 {
    static constexpr int64_t BYTES = 34;
    static inline void round(const Floats* x, int64_t count, uint8_t* to) {
        Floats top = splat(0.0f);
        for (int64_t i = 0; i < VALUES; i++) {
            const Floats size = x[i] < splat(0.0f) ? -x[i] : x[i];
            top = size > top ? size : top;
        }
        const Floats scale = as_half(top / 127.0f), by = inverse(scale);
        int32_t q[VALUES][LANES];
        for (int64_t i = 0; i < VALUES; i++) {
            const Ints whole = __builtin_convertvector(nearest(x[i] * by, -127.0f, 127.0f), Ints);
            std::memcpy(q[i], &whole, sizeof whole);
        }
        for (int64_t b = 0; b < count; b++, to += BYTES) {
            store_scale(to, scale[b]);
            for (int64_t i = 0; i < VALUES; i++) to[2 + i] = (uint8_t)q[i][b];
        }
    }
};

struct Q4_1 {
    static constexpr int64_t BYTES = 20;
    static inline void round(const Floats* x, int64_t count, uint8_t* to) {
        Floats low = x[0], high = x[0];
        for (int64_t i = 1; i < VALUES; i++) low = x[i] < low ? x[i] : low, high = x[i] > high ? x[i] : high;
        const Floats span = high - low, x_sum = sum_of([&](int64_t i) { return x[i]; });
        Range best = {};
        Floats least_error = {};
        for (int tried = 0; tried < 5; tried++) {
            const float width = (float)((1 - 2 * CLIPPED[tried]) / 15);
            const Range range = fitted(x, x_sum, {span * width, low + span * (float)CLIPPED[tried]});
            Floats q[VALUES];
            levels(x, range, q);
            const Floats error = sum_of([&](int64_t i) {
                const Floats off = (q[i] * range.scale + range.least) - x[i];
                return off * off;
            });
            if (!tried) {
                least_error = error, best = range;
                continue;
            }
            best.scale = error < least_error ? range.scale : best.scale;
            best.least = error < least_error ? range.least : best.least;
            least_error = error < least_error ? error : least_error;
        }
        best = fitted(x, x_sum, best);
        best = {as_half(best.scale), as_half(best.least)};
        Floats q[VALUES];
        levels(x, best, q);
        int32_t pairs[VALUES / 2][LANES];
        for (int64_t i = 0; i < VALUES / 2; i++) {
            const Ints whole = __builtin_convertvector(q[i] + q[i + VALUES / 2] * 16.0f, Ints);
            std::memcpy(pairs[i], &whole, sizeof whole);
        }
        for (int64_t b = 0; b < count; b++, to += BYTES) {
            store_scale(to, best.scale[b]);
            store_scale(to + 2, best.least[b]);
            for (int64_t i = 0; i < VALUES / 2; i++) to[4 + i] = (uint8_t)pairs[i][b];
        }
    }
};

template <typename Kind, typename Real>
int round_some(const Real* from, uint8_t* to, int64_t first, int64_t last) {
    Floats x[VALUES];
    for (int64_t block = first; block < last; block += LANES) {
        const int64_t count = last - block < LANES ? last - block : LANES;
        if (!read_blocks(from + block * VALUES, count, x)) return 0;
        Kind::round(x, count, to + block * Kind::BYTES);
    }
    return 1;
}

template <typename Real>
int round_kind(int bits, const void* from, uint8_t* to, int64_t first, int64_t last) {
    return bits == 8 ? round_some<Q8_0>((const Real*)from, to, first, last) : round_some<Q4_1>((const Real*)from, to, first, last);
}

}  // namespace

extern "C" {
int can_round() { return 1; }
int round_blocks(int bits, int stored, const void* from, void* to, int64_t first, int64_t last) {
    switch (stored) {
        case 0: return round_kind<float>(bits, from, (uint8_t*)to, first, last);
        case 1: return round_kind<bf16>(bits, from, (uint8_t*)to, first, last);
        default: return round_kind<half>(bits, from, (uint8_t*)to, first, last);
    }
}
}

#else

extern "C" {
int can_round() { return 0; }
int round_blocks(int, int, const void*, void*, int64_t, int64_t) { return 0; }
}

#endif
