// Owns the unit of single rows' attention over pages, by what the pages hold.

#include "pages.h"

extern "C" {

#define FOR_KEPT(NAME, KEPT)                                                                                             \
    void attend_row_##NAME(float* query, const void* keys, const void* values, const void* part, const void* shape,      \
                           float* out, float* tops, float* totals) {                                                     \
        attend_row_of_any(query, (const KEPT*)keys, (const KEPT*)values, *(const Part*)part, *(const Shape*)shape, out,  \
                          tops, totals);                                                                                 \
    }
FOR_KEPT(float32, float)
FOR_KEPT(bfloat16, bf16)
}
