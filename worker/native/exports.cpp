// Owns the names under which Python finds the compiled operations. Every function is called without Python's lock, over
// memory that the caller keeps alive. Shapes, strides (in elements) and the order of arguments are those of the
// modules that declare them: products.py, operations.py and stack.py, which check them too.

#include "stack.h"

namespace {

// work(first, last) for parts of so many rows, by all threads where there are enough of them to be worth waking the others.
template <typename Work>
void share_rows(int64_t rows, const Work& work) {
    constexpr int64_t MANY_ROWS = 64;
    if (rows < MANY_ROWS) return work((int64_t)0, rows);
    together([&](Team& team) { team.share(rows, 1, work); });
}

}  // namespace

extern "C" {

int vector_lanes() { return LANES; }
int panel_outputs() { return PANEL; }
// What it was compiled for, in a few words.
const char* instruction_set() {
    return
#if defined(__AVX512F__)
        "AVX-512"
#elif defined(__AVX2__)
        "AVX2"
#elif defined(__aarch64__)
        "NEON"
#else
        "the compiler's vectors"
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
        ", AMX bf16"
#elif defined(__AVX512BF16__)
        ", bf16"
#endif
#if (defined(__AVX512F__) && defined(__AVX512VNNI__)) || defined(__AVXVNNI__)
        ", VNNI int8"
#elif defined(__ARM_FEATURE_DOTPROD)
        ", sdot int8"
#elif defined(DEGAS_MULTIPLIES)
        ", int8"
#endif
        ;
}
void use_threads(int count) { set_threads(count); }
int round_to_blocks(int bits, int stored, int64_t count, const void* from, void* to) {
    std::atomic<int> fits{1};
    together([&](Team& team) {
        team.share(count, 256, [&](int64_t first, int64_t last) {
            if (!round_blocks(bits, stored, from, to, first, last)) fits.store(0);
        });
    });
    return fits.load();
}
// 0: some row is not in the table, and nothing was read.
int table_rows(int format, int are_tiles, int64_t outputs, int64_t inputs, const void* packed, const int64_t* rows, int64_t count,
               float* to) {
    for (int64_t r = 0; r < count; r++)
        if (rows[r] < 0 || rows[r] >= outputs) return 0;
    const auto read = [&](int64_t first, int64_t last) {
        read_table_rows(format, are_tiles, inputs, packed, rows + first, last - first, to + first * inputs);
    };
    if (count < 16)
        read(0, count);
    else
        together([&](Team& team) { team.share(count, 4, read); });
    return 1;
}
void pack_file_blocks(int format, int64_t outputs, int64_t inputs, const void* blocks, void* packed) {
    together([&](Team& team) {
        team.share((outputs + PANEL - 1) / PANEL, 1, [&](int64_t first, int64_t last) {
            pack_blocks_as_they_are(format, outputs, inputs, blocks, packed, first, last);
        });
    });
}
#define FOR_DTYPE(NAME, REAL)                                                                                           \
    void multiply_##NAME(const Linear* linear, int64_t rows, const void* x, const void* residual, void* out,            \
                         int64_t out_stride, int kind, int is_unrounded) {                                              \
        Rounded& rounded = Rounded::own();                                                                              \
        rounded.reserve(rows, *linear);                                                                                 \
        together([&](Team& team) {                                                                                      \
            multiply(team, rounded, *linear, rows, (const REAL*)x, (const REAL*)residual, (REAL*)out, out_stride, kind, \
                     nullptr, is_unrounded ? (float*)out : nullptr);                                                    \
        });                                                                                                             \
    }                                                                                                                   \
    void rms_norm_##NAME(int64_t rows, int64_t dim, const void* x, const void* weight, float eps, void* out) {          \
        share_rows(rows, [&](int64_t first, int64_t last) {                                                             \
            const int64_t skipped = first * dim;                                                                        \
            rms_norm(last - first, dim, (const REAL*)x + skipped, (const REAL*)weight, eps, (REAL*)out + skipped);      \
        });                                                                                                             \
    }                                                                                                                   \
    void layer_norm_##NAME(int64_t rows, int64_t dim, const void* x, const void* weight, const void* bias, float eps,   \
                           void* out) {                                                                                 \
        share_rows(rows, [&](int64_t first, int64_t last) {                                                             \
            const int64_t skipped = first * dim;                                                                        \
            layer_norm(last - first, dim, (const REAL*)x + skipped, (const REAL*)weight, (const REAL*)bias, eps,        \
                       (REAL*)out + skipped);                                                                           \
        });                                                                                                             \
    }                                                                                                                   \
    void silu_gate_##NAME(int64_t rows, int64_t dim, const void* both, void* out) {                                     \
        silu_gate(rows, dim, (const REAL*)both, (REAL*)out);                                                            \
    }                                                                                                                   \
    int gated_layers_##NAME(const Step* step, const GatedLayer* layers, int64_t count, void* hidden) {                  \
        return run_layers(*step, layers, count, (REAL*)hidden);                                                         \
    }                                                                                                                   \
    int parallel_layers_##NAME(const Step* step, const ParallelLayer* layers, int64_t count, void* hidden) {            \
        return run_layers(*step, layers, count, (REAL*)hidden);                                                         \
    }
FOR_DTYPE(float32, float)
FOR_DTYPE(bfloat16, bf16)

#define FOR_DTYPES(NAME, REAL, KEPT)                                                                                    \
    int NAME(int64_t rows, const void* qkv, void* keys, void* values, const int64_t* write_index,                       \
             const Run* runs, const int32_t* tables, int64_t table_stride, const int32_t* lengths,                      \
             const float* rotation, int rotary, const float* weight, float eps, int heads, int kv_heads, int dim,       \
             int page_tokens, int window, float cap, void* out, int64_t out_stride) {                                   \
        if (!can_attend(dim)) return 1;                                                                                 \
        static thread_local Parts plan;                                                                                 \
        Parts& own = plan; /* the calling thread's, for all */                                                          \
        const Shape shape{heads, kv_heads, dim, page_tokens, window, cap};                                              \
        own.plan({rows, runs, tables, table_stride, lengths}, shape, pool ? pool->count : 1);                           \
        together([&](Team& team) {                                                                                      \
            attend_rows(team, own, rows, (const REAL*)qkv, (KEPT*)keys, (KEPT*)values, write_index, rotation, rotary,   \
                        weight, eps, shape, (REAL*)out, out_stride);                                                    \
        });                                                                                                             \
        return 0;                                                                                                       \
    }
FOR_DTYPES(attend_float32_float32, float, float)
FOR_DTYPES(attend_float32_bfloat16, float, bf16)
FOR_DTYPES(attend_bfloat16_float32, bf16, float)
FOR_DTYPES(attend_bfloat16_bfloat16, bf16, bf16)

void largest_float32(int64_t rows, int64_t count, const float* x, int64_t stride, float* values, int64_t* places) {
    largest_of_rows(rows, count, x, stride, values, places);
}
}
