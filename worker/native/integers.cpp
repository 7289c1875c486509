// Owns the unit of integer products: rounding activations to int8, and multiplying blocks by them.

#include "units.h"

#if defined(__AVX2__) && defined(__F16C__)

#include "integer_products.h"
#if defined(__AMX_INT8__) && defined(__AVX512F__) && defined(__linux__)
#include "integer_tiles.h"
#endif

namespace {

template <typename Format, typename Real>
void multiply_all(int64_t rows, const Activations& x, const Product<Real>& product, const uint8_t* packed, int64_t first, int64_t last) {
    int64_t done = 0;
#if defined(__AMX_INT8__) && defined(__AVX512F__) && defined(__linux__)
    if constexpr (Format::NUM_BITS == 4) done = multiply_integer_tiles<Format>(rows, x, product, packed, first, last);
#endif
    multiply_rows<Format>(done, rows, x, product, packed, first, last);
}

template <typename Real>
void multiply_blocks(int format, int64_t rows, const Activations& x, const Product<Real>& product, const uint8_t* packed,
                     int64_t first, int64_t last) {
    switch (format) {
        case INT8: return multiply_all<Int8>(rows, x, product, packed, first, last);
        case INT4: return multiply_all<Int4>(rows, x, product, packed, first, last);
        case INT4_MIN: return multiply_all<Int4Min>(rows, x, product, packed, first, last);
        case INT4_REAL: return multiply_all<Int4Real>(rows, x, product, packed, first, last);
        case INT8_REAL: return multiply_all<Int8Real>(rows, x, product, packed, first, last);
        case INT8_OFFSET: return multiply_all<Int8Offset>(rows, x, product, packed, first, last);
        case INT8_FINE: return multiply_all<Int8Fine>(rows, x, product, packed, first, last);
    }
}

inline int64_t group_of(int format) {
    return format == INT4 || format == INT4_MIN || format == INT4_REAL ? WIDE_GROUP : NARROW_GROUP;
}

}  // namespace

extern "C" {
int has_integers() { return 1; }
int64_t activation_bytes(int format, int64_t rows, int64_t inputs) { return Activations::bytes(rows, inputs, group_of(format)); }
#define FOR_DTYPE(NAME, REAL)                                                                                               \
    void quantise_rows_##NAME(int format, int64_t rows, int64_t inputs, const void* x, void* memory, int64_t first,         \
                              int64_t last) {                                                                               \
        const Activations to(memory, rows, inputs, group_of(format));                                                       \
        if (to.group == WIDE_GROUP) return quantise_rows<WIDE_GROUP>((const REAL*)x, to, first, last);                      \
        quantise_rows<NARROW_GROUP>((const REAL*)x, to, first, last);                                                       \
    }                                                                                                                       \
    void multiply_blocks_##NAME(int format, int64_t rows, void* memory, const void* product, const void* weight,            \
                                int64_t first, int64_t last) {                                                              \
        const Product<REAL>& of = *(const Product<REAL>*)product;                                                           \
        const Activations x(memory, rows, of.inputs, group_of(format));                                                     \
        multiply_blocks(format, rows, x, of, (const uint8_t*)weight, first, last);                                          \
    }
FOR_DTYPE(float32, float)
FOR_DTYPE(bfloat16, bf16)
}

#else

extern "C" {
int has_integers() { return 0; }
#define FOR_DTYPE(NAME)                                                                              \
    void quantise_rows_##NAME(int, int64_t, int64_t, const void*, void*, int64_t, int64_t) {}        \
    void multiply_blocks_##NAME(int, int64_t, void*, const void*, const void*, int64_t, int64_t) {}
FOR_DTYPE(float32)
FOR_DTYPE(bfloat16)
int64_t activation_bytes(int, int64_t, int64_t) { return 0; }
}

#endif
