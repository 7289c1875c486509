// Owns the unit of products: packing weights, and multiplying by panels of them.

#include "file_blocks.h"
#include "weights.h"
#include "units.h"

extern "C" {

int64_t bytes_packed(int format, int64_t outputs, int64_t inputs) { return packed_bytes(format, outputs, inputs); }
int multiplies_by_tiles() { return HAS_TILES && Weights<bf16>::are_taken(); }
int are_bfloat16(int64_t count, const float* weight) { return fit_bf16(count, weight); }
void pack_bfloat16_for_float32(int64_t outputs, int64_t inputs, const void* weight, void* packed) {
    pack_panels<Bf16>(outputs, inputs, (const uint16_t*)weight, (uint8_t*)packed);
}
void pack_blocks(int format, int64_t outputs, int64_t inputs, const int8_t* q, const float* scale, const float* least,
                 int64_t scale_inputs, void* packed) {
    pack_quantised(format, outputs, inputs, Quantised{q, scale, least, scale_inputs}, (uint8_t*)packed);
}
void pack_blocks_as_they_are(int format, int64_t outputs, int64_t inputs, const void* blocks, void* packed, int64_t first,
                             int64_t last) {
#if defined(DEGAS_MULTIPLIES)
    const uint8_t* from = (const uint8_t*)blocks;
    uint8_t* to = (uint8_t*)packed;
    switch (format) {
        case INT8: return pack_file_panels<Int8>(outputs, inputs, from, to, first, last);
        case INT4: return pack_file_panels<Int4>(outputs, inputs, from, to, first, last);
        case INT4_MIN: return pack_file_panels<Int4Min>(outputs, inputs, from, to, first, last);
    }
#endif
}

#define FOR_DTYPE(NAME, REAL)                                                                                           \
    int can_multiply_##NAME() { return Weights<REAL>::are_taken(); }                                                    \
    void pack_##NAME(int64_t outputs, int64_t inputs, const void* weight, void* packed) {                               \
        Weights<REAL>::pack(outputs, inputs, (const REAL*)weight, packed);                                              \
    }                                                                                                                   \
    void multiply_panels_##NAME(int format, int64_t rows, const void* product, const void* weight, int64_t first,       \
                                int64_t last) {                                                                         \
        Weights<REAL>::multiply(format, rows, *(const Product<REAL>*)product, weight, first, last);                     \
    }
FOR_DTYPE(float32, float)
FOR_DTYPE(bfloat16, bf16)
}
