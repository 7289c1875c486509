// Owns what the three units that are compiled side by side say to each other: attention over pages, products, and the rest. One
// compiler would take as long as all three together, while somebody waits for a first start.

#pragma once

#include <cstdint>
#include <initializer_list>

namespace {

struct Shape {
    int heads, kv_heads, dim, page_tokens;
};

// One run's rows that are attended to together, of some of the key heads.
struct Block {
    const int32_t *table, *lengths;  // of the block's first row
    int64_t row, count;
    int first_head, last_head;
    int64_t next_page;  // the first that the block behind this one reads
};

inline bool can_attend(int dim) {
    for (int taken : {16, 32, 64, 80, 96, 128})
        if (dim == taken) return true;
    return false;
}

}  // namespace

extern "C" {
// Types of these units' own, which C++ would call another's, go by address. `product` is a Product of that dtype.
void multiply_panels_float32(int format, int64_t rows, const void* product, const void* weight, int64_t first, int64_t last);
void multiply_panels_bfloat16(int format, int64_t rows, const void* product, const void* weight, int64_t first, int64_t last);
void attend_float32(float* query, const void* keys, const void* values, const void* block, const void* shape, float* out,
                    float* scores, int64_t width);
void attend_bfloat16(float* query, const void* keys, const void* values, const void* block, const void* shape, float* out,
                     float* scores, int64_t width);
}
