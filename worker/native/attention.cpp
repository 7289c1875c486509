// Owns the unit of attention over pages, by what the pages hold.

#include "pages.h"

extern "C" {

#define FOR_KEPT(NAME, KEPT)                                                                                         \
    void attend_##NAME(float* query, const void* keys, const void* values, const void* block, const void* shape,     \
                       float* out, float* scores, int64_t width) {                                                   \
        attend_any(query, (const KEPT*)keys, (const KEPT*)values, *(const Block*)block, *(const Shape*)shape, out,   \
                   scores, width);                                                                                   \
    }
FOR_KEPT(float32, float)
FOR_KEPT(bfloat16, bf16)
}
