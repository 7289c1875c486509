// Owns the unit of chunks' attention over pages, by what the pages hold.

#include "chunks.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#include "chunk_tiles.h"
#elif defined(__AVX512BF16__)
#include "chunk_dots.h"
#endif

extern "C" {

void attend_chunk_float32(const float* query, const void* keys, const void* values, const void* part, const void* shape, int,
                          float* out, float* tops, float* totals) {
    attend_chunk(*(const Part*)part, *(const Shape*)shape, out, tops, totals, [&](auto&&... place) {
        attend_span(query, (const float*)keys, (const float*)values, place...);
    });
}

void attend_chunk_bfloat16(const float* query, const void* keys, const void* values, const void* part, const void* shape,
                           int is_exact, float* out, float* tops, float* totals) {
    attend_chunk(*(const Part*)part, *(const Shape*)shape, out, tops, totals, [&](auto&&... place) {
#if defined(__AMX_BF16__) && defined(__linux__)
        if (!is_exact && grants_tiles()) return attend_span_by_tiles(query, (const bf16*)keys, (const bf16*)values, place...);
#elif defined(__AVX512BF16__)
        if (!is_exact) return attend_span_by_dots(query, (const bf16*)keys, (const bf16*)values, place...);
#endif
        attend_span(query, (const bf16*)keys, (const bf16*)values, place...);
    });
}
}
