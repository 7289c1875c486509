// Owns which products there are on this processor for each dtype of activations, and packing weights for them.
//
// fp32 activations multiply weights of any format of formats.h, with 256-bit vectors and on Arm. bf16 ones multiply bf16
// weights alone, where the processor has arithmetic for that; elsewhere fp32 over bf16 weights is quicker than emulating it.

#pragma once

#include <cmath>

#include "formats.h"
#include "panels.h"

#if defined(__AVX512F__)
#include "wide.h"
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#include "tiles.h"
#endif

namespace {

#if defined(__AMX_BF16__) && defined(__linux__)
constexpr bool HAS_TILES = true;
#else
constexpr bool HAS_TILES = false;
#endif

// The products for activations of a dtype: none, unless specialised below.
template <typename Real>
struct Weights {
    static bool are_taken() { return false; }
    static void pack(int64_t, int64_t, const Real*, void*) {}
    static void multiply(int, int64_t, const Product<Real>&, const void*, int64_t, int64_t) {}
};

#if defined(DEGAS_MULTIPLIES)

template <>
struct Weights<float> {
    static bool are_taken() { return true; }
    static void pack(int64_t outputs, int64_t inputs, const float* weight, void* packed) {
        pack_panels<Fp32>(outputs, inputs, weight, (uint8_t*)packed);
    }
    // Panels `first` to `last` of the outputs.
    static void multiply(int format, int64_t rows, const Product<float>& product, const void* weight, int64_t first, int64_t last) {
        const uint8_t* packed = (const uint8_t*)weight;
        switch (format) {
            case BF16: return multiply_format<Bf16>(rows, product, packed, first, last);
            case INT8: return multiply_format<Int8>(rows, product, packed, first, last);
            case INT4: return multiply_format<Int4>(rows, product, packed, first, last);
            case INT4_MIN: return multiply_format<Int4Min>(rows, product, packed, first, last);
            case INT4_REAL: return multiply_format<Int4Real>(rows, product, packed, first, last);
            case INT8_REAL: return multiply_format<Int8Real>(rows, product, packed, first, last);
            case INT8_OFFSET: return multiply_format<Int8Offset>(rows, product, packed, first, last);
            case INT8_FINE: return multiply_format<Int8Fine>(rows, product, packed, first, last);
        }
#if defined(__AVX512F__)
        multiply_panels(rows, product, (const float*)weight, first, last);
#else
        multiply_format<Fp32>(rows, product, packed, first, last);
#endif
    }
};

// Bytes of a weight in a format; 0 where the format does not take so many inputs.
template <typename Format>
int64_t packed_bytes_of(int64_t outputs, int64_t inputs) {
    return inputs % Format::BLOCK ? 0 : (outputs + PANEL - 1) / PANEL * (inputs / Format::BLOCK) * Format::BLOCK_BYTES;
}

inline int64_t packed_bytes(int format, int64_t outputs, int64_t inputs) {
    switch (format) {
        case SAME: return packed_bytes_of<Fp32>(outputs, inputs);
        case BF16: return packed_bytes_of<Bf16>(outputs, inputs);
        case INT8: return packed_bytes_of<Int8>(outputs, inputs);
        case INT4: return packed_bytes_of<Int4>(outputs, inputs);
        case INT4_MIN: return packed_bytes_of<Int4Min>(outputs, inputs);
        case INT4_REAL: return packed_bytes_of<Int4Real>(outputs, inputs);
        case INT8_REAL: return packed_bytes_of<Int8Real>(outputs, inputs);
        case INT8_OFFSET: return packed_bytes_of<Int8Offset>(outputs, inputs);
        case INT8_FINE: return packed_bytes_of<Int8Fine>(outputs, inputs);
    }
    return 0;
}

inline void pack_quantised(int format, int64_t outputs, int64_t inputs, const Quantised& from, uint8_t* packed) {
    switch (format) {
        case INT8: return Int8::pack(outputs, inputs, from, packed);
        case INT4: return Int4::pack(outputs, inputs, from, packed);
        case INT4_MIN: return Int4Min::pack(outputs, inputs, from, packed);
        case INT4_REAL: return Int4Real::pack(outputs, inputs, from, packed);
        case INT8_REAL: return Int8Real::pack(outputs, inputs, from, packed);
        case INT8_OFFSET: return Int8Offset::pack(outputs, inputs, from, packed);
        case INT8_FINE: return Int8Fine::pack(outputs, inputs, from, packed);
    }
}

#if defined(__AMX_BF16__) && defined(__linux__)
template <>
struct Weights<bf16> {
    static bool are_taken() { return grants_tiles(); }
    static void pack(int64_t outputs, int64_t inputs, const bf16* weight, void* packed) {
        pack_tiles(outputs, inputs, weight, (bf16*)packed);
    }
    static void multiply(int, int64_t rows, const Product<bf16>& product, const void* weight, int64_t first, int64_t last) {
        const int64_t end = last * PANEL < product.outputs ? last * PANEL : product.outputs;
        multiply_all_tiles(rows, product, (const bf16*)weight, first * PANEL, end);
    }
};
#elif defined(__AVX512BF16__)
template <>
struct Weights<bf16> {
    static bool are_taken() { return true; }
    static void pack(int64_t outputs, int64_t inputs, const bf16* weight, void* packed) {
        pack_panels<Bf16>(outputs, inputs, (const uint16_t*)weight, (uint8_t*)packed);
    }
    static void multiply(int, int64_t rows, const Product<bf16>& product, const void* weight, int64_t first, int64_t last) {
        multiply_panels(rows, product, (const bf16*)weight, first, last);
    }
};
#endif

#else

inline int64_t packed_bytes(int, int64_t, int64_t) { return 0; }
inline void pack_quantised(int, int64_t, int64_t, const Quantised&, uint8_t*) {}

#endif

}  // namespace
