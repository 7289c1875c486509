// Owns activations as the integer products read them: int8 in blocks of 32 inputs with an fp32 scale each.
//
// q = round(x · 127 / m), to the nearest, ties to even, and the scale m / 127, for the largest magnitude m of the block. A block
// that is not finite has no numbers for its scale, so that all sums of its row are none. One whose magnitudes are below
// TOO_SMALL is 0.

#pragma once

#include <cmath>

#include "vectors.h"

namespace {

constexpr int64_t GROUP = 32, HALF_GROUP = GROUP / 2;
constexpr float TOO_SMALL = 1e-36f;  // 127 over it is finite

// Of a group of a row. `minus` is less the sum of q, which offsets of weights are multiplied by, `weighted` scale times that
// sum; of the whole and of its halves.
struct alignas(32) Group {
    float scale, weighted, weighted_half[2];
    int32_t minus, minus_half[2], reserved;
};

// Of some rows of `inputs`, a multiple of GROUP: q (rows, inputs) and groups (inputs / GROUP, stride), those of all rows side by
// side. The stride is odd, so that a row's groups do not all meet in one set of a cache.
struct Activations {
    int8_t* q;
    Group* groups;
    int64_t inputs, stride;

    static int64_t bytes(int64_t rows, int64_t inputs) {
        return rows * inputs + (rows | 1) * (inputs / GROUP) * (int64_t)sizeof(Group);
    }
    // memory: `bytes`, on a boundary of 64 bytes
    Activations(void* memory, int64_t rows, int64_t inputs)
        : groups((Group*)memory), inputs(inputs), stride(rows | 1) {
        q = (int8_t*)(groups + stride * (inputs / GROUP));
    }
};

template <typename Real>
inline Group quantise_group(const Real* x, int8_t* q) {
    constexpr int VECTORS = GROUP / LANES;
    constexpr float MAGIC = 12582912.0f;  // 1.5 · 2^23: what is added to it is rounded to a whole number, the lowest bits
    typedef int8_t Few __attribute__((vector_size(LANES)));
    Floats values[VECTORS];
    Ints most{};  // magnitudes' bits are in the order of the magnitudes, and above all of them are those of no numbers
    for (int v = 0; v < VECTORS; v++) {
        values[v] = load(x + v * LANES);
        const Ints magnitude = (Ints)values[v] & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
    }
    int32_t bits = 0;
    for (int lane = 0; lane < LANES; lane++) bits = most[lane] > bits ? most[lane] : bits;
    float largest_here;
    std::memcpy(&largest_here, &bits, 4);
    const bool is_finite = bits < 0x7f800000;
    Group group{};
    const float times = is_finite && largest_here >= TOO_SMALL ? 127.0f / largest_here : 0.0f;
    group.scale = !is_finite ? NAN : times == 0.0f ? 0.0f : largest_here / 127.0f;
    Floats halves[2] = {};
    for (int v = 0; v < VECTORS; v++) {
        const Floats magic = values[v] * times + MAGIC;
        const Few rounded = __builtin_convertvector((Ints)magic, Few);
        std::memcpy(q + v * LANES, &rounded, LANES);
        halves[v * LANES / HALF_GROUP] += magic - MAGIC;
    }
    const float sums[2] = {sum(halves[0]), sum(halves[1])};
    for (int half = 0; half < 2; half++) {
        group.minus_half[half] = is_finite ? -(int32_t)sums[half] : 0;
        group.weighted_half[half] = is_finite ? group.scale * sums[half] : NAN;
    }
    group.minus = group.minus_half[0] + group.minus_half[1];
    group.weighted = is_finite ? group.scale * (sums[0] + sums[1]) : NAN;
    return group;
}

// Rows `first` to `last` of x (rows, inputs).
template <typename Real>
void quantise_rows(const Real* x, const Activations& to, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++)
        for (int64_t i = 0; i < to.inputs; i += GROUP)
            to.groups[i / GROUP * to.stride + row] = quantise_group(x + row * to.inputs + i, to.q + row * to.inputs + i);
}

}  // namespace
