// Owns the unit of integer products: rounding activations to int8, and multiplying blocks by them.

#include "units.h"
#include "vectors.h"

#if defined(DEGAS_MULTIPLIES)

#include "integer_products.h"

namespace {

template <typename Real>
void multiply_blocks(int format, int64_t rows, const Activations& x, const Product<Real>& product, const uint8_t* packed,
                     int64_t first, int64_t last) {
    switch (format) {
        case INT8: return multiply_rows<Int8>(rows, x, product, packed, first, last);
        case INT4: return multiply_rows<Int4>(rows, x, product, packed, first, last);
        case INT4_MIN: return multiply_rows<Int4Min>(rows, x, product, packed, first, last);
        case INT4_REAL: return multiply_rows<Int4Real>(rows, x, product, packed, first, last);
        case INT8_REAL: return multiply_rows<Int8Real>(rows, x, product, packed, first, last);
        case INT8_OFFSET: return multiply_rows<Int8Offset>(rows, x, product, packed, first, last);
        case INT8_FINE: return multiply_rows<Int8Fine>(rows, x, product, packed, first, last);
    }
}

}  // namespace

extern "C" {
int has_integers() { return 1; }
int64_t activation_bytes(int64_t rows, int64_t inputs) { return Activations::bytes(rows, inputs); }
#define FOR_DTYPE(NAME, REAL)                                                                                               \
    void quantise_rows_##NAME(int64_t rows, int64_t inputs, const void* x, void* memory, int64_t first, int64_t last) {     \
        quantise_rows((const REAL*)x, Activations(memory, rows, inputs), first, last);                                      \
    }                                                                                                                       \
    void multiply_blocks_##NAME(int format, int64_t rows, void* memory, const void* product, const void* weight,            \
                                int64_t first, int64_t last) {                                                              \
        const Product<REAL>& of = *(const Product<REAL>*)product;                                                           \
        const Activations x(memory, rows, of.inputs);                                                                       \
        multiply_blocks(format, rows, x, of, (const uint8_t*)weight, first, last);                                          \
    }
FOR_DTYPE(float32, float)
FOR_DTYPE(bfloat16, bf16)
}

#else

extern "C" {
int has_integers() { return 0; }
#define FOR_DTYPE(NAME)                                                                              \
    void quantise_rows_##NAME(int64_t, int64_t, const void*, void*, int64_t, int64_t) {}             \
    void multiply_blocks_##NAME(int, int64_t, void*, const void*, const void*, int64_t, int64_t) {}
FOR_DTYPE(float32)
FOR_DTYPE(bfloat16)
int64_t activation_bytes(int64_t, int64_t) { return 0; }
}

#endif
