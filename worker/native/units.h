// Owns what the units that are compiled side by side say to each other: attention of single rows, attention of chunks, products,
// integer products, and the rest. One compiler would take as long as all of them together, while somebody waits for a first start.

#pragma once

#include <cstdint>
#include <initializer_list>

namespace {

// A layer's attention. A query sees itself and the `window` - 1 keys before it (0: all of them); a score s becomes
// cap · tanh(s / cap), if there is a cap.
struct Shape {
    int heads, kv_heads, dim, page_tokens, window;
    float cap;
};

// What one thread attends to at a time: a row, or some queries of a chunk, with the keys from `begin` to `end` of some of the
// key heads. A chunk's part has one key head.
struct Part {
    const int32_t *table, *lengths;  // of the first row; a length is the number of leading keys that a row sees
    int64_t row, count, position;    // of the first row within its sequence, then of each behind it one more
    int first_head, last_head;
    int64_t begin, end;
    int64_t next_page;  // the first that the part behind this one reads
    int64_t partial;    // where its result waits for those of the other keys; -1: they are all here
    bool is_chunk;
};

// Keys whose weighted values are summed up by themselves: such sums are added in order, whoever made them, so that threads
// may share the keys of a long context without changing a bit.
constexpr int64_t SPAN_KEYS = 1024;

inline bool can_attend(int dim) {
    for (int taken : {16, 32, 64, 80, 96, 128})
        if (dim == taken) return true;
    return false;
}

// The first key that a row at this position sees.
inline int64_t first_seen(int64_t position, int window) {
    return window && position + 1 > window ? position + 1 - window : 0;
}

}  // namespace

extern "C" {
// Types of these units' own, which C++ would call another's, go by address. `product` is a Product of that dtype.
void multiply_panels_float32(int format, int64_t rows, const void* product, const void* weight, int64_t first, int64_t last);
void multiply_panels_bfloat16(int format, int64_t rows, const void* product, const void* weight, int64_t first, int64_t last);
// Of (rows, inputs), inputs a multiple of 32: rows `first` to `last` to int8 in `memory` of `activation_bytes` on a boundary of 64;
// products of those with weights in a file's blocks, into `product`, a Product of the dtype that the rows had.
int64_t activation_bytes(int64_t rows, int64_t inputs);
void quantise_rows_float32(int64_t rows, int64_t inputs, const void* x, void* memory, int64_t first, int64_t last);
void quantise_rows_bfloat16(int64_t rows, int64_t inputs, const void* x, void* memory, int64_t first, int64_t last);
void multiply_blocks_float32(int format, int64_t rows, void* memory, const void* product, const void* weight, int64_t first, int64_t last);
void multiply_blocks_bfloat16(int format, int64_t rows, void* memory, const void* product, const void* weight, int64_t first, int64_t last);
int has_integers();  // whether there are any
// Rows (count,) of a weight packed in `format`, or of bf16 for matrix registers → (count, inputs) fp32.
void read_table_rows(int format, int are_tiles, int64_t inputs, const void* packed, const int64_t* rows, int64_t count, float* to);
// Blocks `first` to `last` of 32 numbers each, `stored` as fp32 (0), bf16 (1) or fp16 (2), to Q8_0 (bits 8) or Q4_1 (4). 0: some
// number is not finite, or too large for a scale of 16 bits.
int round_blocks(int bits, int stored, const void* from, void* to, int64_t first, int64_t last);
// ggml's blocks (outputs, inputs / 32) of a kind that is packed in `format` with the same bits → panels `first` to `last`.
void pack_blocks_as_they_are(int format, int64_t outputs, int64_t inputs, const void* blocks, void* packed, int64_t first, int64_t last);
// query and out are (key heads, tokens, group, dim), `out` sums of weighted values; of each query `tops` is the largest score in
// powers of two, `totals` the sum of weights. `is_exact`: query and weights are not rounded to what the pages hold.
void attend_row_float32(float* query, const void* keys, const void* values, const void* part, const void* shape, float* out,
                        float* tops, float* totals);
void attend_row_bfloat16(float* query, const void* keys, const void* values, const void* part, const void* shape, float* out,
                         float* tops, float* totals);
void attend_chunk_float32(const float* query, const void* keys, const void* values, const void* part, const void* shape,
                          int is_exact, float* out, float* tops, float* totals);
void attend_chunk_bfloat16(const float* query, const void* keys, const void* values, const void* part, const void* shape,
                           int is_exact, float* out, float* tops, float* totals);
}
