// Owns a CPU's decode operations between the products: rotation, KV write and paged attention of the new tokens, RMS
// norm, SiLU gate. Called without Python's lock; plain functions over memory that the caller keeps alive.
//
// Vectors are 16 floats wide whatever the machine: the compiler splits them where its registers are narrower. A row's
// result depends on nothing but the row, so a batched sequence equals itself run alone bit for bit.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int LANES = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

struct bf16 {
    uint16_t bits;
};

inline Floats load(const float* at) {
    Floats x;
    std::memcpy(&x, at, sizeof x);
    return x;
}

inline Floats load(const bf16* at) {
    Halves x;
    std::memcpy(&x, at, sizeof x);
    return (Floats)(__builtin_convertvector(x, Words) << 16);
}

inline void store(float* at, Floats x) { std::memcpy(at, &x, sizeof x); }

inline void store(bf16* at, Floats x) {
    const Words bits = (Words)x;
    // To the nearest, ties to even. A NaN keeps its upper half, made quiet: rounding could carry it into infinity.
    const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Halves half = __builtin_convertvector(x == x ? rounded : (bits >> 16) | 0x40, Halves);
    std::memcpy(at, &half, sizeof half);
}

inline Floats splat(float x) { return Floats{} + x; }

inline float sum(Floats x) {
    Eight low, high;
    std::memcpy(&low, &x, sizeof low);
    std::memcpy(&high, (const char*)&x + sizeof low, sizeof high);
    low += high;
    Four first, second;
    std::memcpy(&first, &low, sizeof first);
    std::memcpy(&second, (const char*)&low + sizeof first, sizeof second);
    first += second;
    return (first[0] + first[2]) + (first[1] + first[3]);
}

// Sums of neighbours: x's eight, then y's.
inline Floats halve(Floats x, Floats y) {
    return __builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           __builtin_shufflevector(x, y, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

// Sixteen vectors' sums as one vector. Neighbours are halved into one another four times over, which costs a
// fifth of summing each.
inline Floats sums(const Floats* x) {
    Floats halved[LANES / 2];
    for (int i = 0; i < LANES / 2; i++)
        halved[i] = halve(x[2 * i], x[2 * i + 1]);
    for (int count = LANES / 4; count; count /= 2)
        for (int i = 0; i < count; i++)
            halved[i] = halve(halved[2 * i], halved[2 * i + 1]);
    return halved[0];
}

inline float largest(Floats x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
}

// e^x to about two units in the last place (a polynomial in the fraction of x · log2 e); 0 below -87, at most e^88.
inline Floats exponential(Floats x) {
    x = x < splat(-87.0f) ? splat(-87.0f) : x;
    x = x > splat(88.0f) ? splat(88.0f) : x;
    const Floats power = x * 1.44269504088896341f;
    const Ints whole = __builtin_convertvector(power + (power < splat(0.0f) ? splat(-0.5f) : splat(0.5f)), Ints);
    // The fraction, times ln 2, from x itself: ln 2 in two parts keeps its last bits.
    const Floats turns = __builtin_convertvector(whole, Floats);
    const Floats r = (x - turns * 0.693359375f) + turns * 2.12194440e-4f;
    Floats p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * (Floats)((whole + 127) << 23);
}

// One row's heads: made finite, normed if there are weights, the first `rotary` dimensions turned in adjacent pairs.
template <typename Model>
void rotate_heads(const Model* from, float* to, int heads, int dim, int rotary, const float* turn, const float* weight,
                  float eps) {
    const Floats sign = {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1};
    for (int head = 0; head < heads; head++, from += dim, to += dim) {
        Floats squares{};
        for (int i = 0; i < dim; i += LANES) {
            Floats x = load(from + i);
            x = x - x == splat(0.0f) ? x : splat(0.0f);  // a masked NaN would spoil the pages' next owner
            squares += x * x;
            store(to + i, x);
        }
        if (weight) {
            const float scale = 1.0f / std::sqrt(sum(squares) / dim + eps);
            for (int i = 0; i < dim; i += LANES) store(to + i, load(to + i) * scale * load(weight + head * dim + i));
        }
        for (int i = 0; i < rotary; i += LANES) {
            const Floats x = load(to + i), pairs = load(turn + i);
            const Floats cosine = __builtin_shufflevector(pairs, pairs, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14);
            const Floats sine = __builtin_shufflevector(pairs, pairs, 1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13, 15, 15);
            const Floats partner = __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
            store(to + i, x * cosine + partner * sine * sign);
        }
    }
}

template <typename Kept>
void put(const float* from, Kept* to, int count) {
    for (int i = 0; i < count; i += LANES) store(to + i, load(from + i));
}

struct Shape {
    int heads, kv_heads, dim, page_tokens;
};

// Up to four query heads that share a key head, over one page: their scores, then their weighted values.
template <int VECTORS, int QUERIES, typename Kept>
void score_page(const float* query, const Kept* keys, int count, int stride, float* scores, int64_t width, float scale) {
    Floats q[QUERIES][VECTORS];
    for (int g = 0; g < QUERIES; g++)
        for (int i = 0; i < VECTORS; i++) q[g][i] = load(query + (g * VECTORS + i) * LANES) * scale;
    for (int start = 0; start < count; start += LANES) {
        Floats dots[QUERIES][LANES] = {};
        const int here = count - start < LANES ? count - start : LANES;
        for (int t = 0; t < here; t++, keys += stride) {
            Floats key = load(keys);
            for (int g = 0; g < QUERIES; g++) dots[g][t] = q[g][0] * key;
            for (int i = 1; i < VECTORS; i++) {
                key = load(keys + i * LANES);
                for (int g = 0; g < QUERIES; g++) dots[g][t] += q[g][i] * key;
            }
        }
        for (int g = 0; g < QUERIES; g++) store(scores + g * width + start, sums(dots[g]));
    }
}

template <int VECTORS, int QUERIES, typename Kept>
void gather_page(float* out, const Kept* values, int count, int stride, const float* weights, int64_t width) {
    Floats mixed[QUERIES][VECTORS];
    for (int g = 0; g < QUERIES; g++)
        for (int i = 0; i < VECTORS; i++) mixed[g][i] = load(out + (g * VECTORS + i) * LANES);
    for (int t = 0; t < count; t++, values += stride)
        for (int i = 0; i < VECTORS; i++) {
            const Floats value = load(values + i * LANES);
            for (int g = 0; g < QUERIES; g++) mixed[g][i] += weights[g * width + t] * value;
        }
    for (int g = 0; g < QUERIES; g++)
        for (int i = 0; i < VECTORS; i++) store(out + (g * VECTORS + i) * LANES, mixed[g][i]);
}

template <int VECTORS, typename Kept>
struct Pages {
    template <int QUERIES>
    static void visit(bool scoring, float* rows, const Kept* kept, int count, int stride, float* scores, int64_t width,
                      float scale) {
        if (scoring)
            score_page<VECTORS, QUERIES>(rows, kept, count, stride, scores, width, scale);
        else
            gather_page<VECTORS, QUERIES>(rows, kept, count, stride, scores, width);
    }

    static void group(bool scoring, int queries, float* rows, const Kept* kept, int count, int stride, float* scores,
                      int64_t width, float scale) {
        for (; queries >= 4; queries -= 4, rows += 4 * VECTORS * LANES, scores += 4 * width)
            visit<4>(scoring, rows, kept, count, stride, scores, width, scale);
        if (queries == 3) visit<3>(scoring, rows, kept, count, stride, scores, width, scale);
        if (queries == 2) visit<2>(scoring, rows, kept, count, stride, scores, width, scale);
        if (queries == 1) visit<1>(scoring, rows, kept, count, stride, scores, width, scale);
    }
};

// Over the first `length` of `width` scores; what lies behind becomes 0.
void softmax(float* scores, int64_t length, int64_t width) {
    for (int64_t i = length; i < width; i++) scores[i] = -INFINITY;
    Floats most = splat(-INFINITY);
    for (int64_t i = 0; i < width; i += LANES) {
        const Floats x = load(scores + i);
        most = x > most ? x : most;
    }
    const float top = largest(most);
    for (int64_t i = 0; i < width; i += LANES) store(scores + i, exponential(load(scores + i) - top));
    for (int64_t i = length; i < width; i++) scores[i] = 0.0f;
    Floats total{};
    for (int64_t i = 0; i < width; i += LANES) total += load(scores + i);
    const float inverse = 1.0f / sum(total);
    for (int64_t i = 0; i < width; i += LANES) store(scores + i, load(scores + i) * inverse);
}

template <int VECTORS, typename Kept>
void attend_row(float* query, const Kept* keys, const Kept* values, const int32_t* table, int64_t length, Shape shape,
                float* out, float* scores, int64_t width) {
    const int group = shape.heads / shape.kv_heads, stride = shape.kv_heads * shape.dim;
    const float scale = 1.0f / std::sqrt((float)shape.dim);
    for (bool scoring : {true, false}) {
        const Kept* kept = scoring ? keys : values;
        for (int64_t at = 0; at < length; at += shape.page_tokens) {
            const Kept* page = kept + (int64_t)*table++ * shape.page_tokens * stride;
            const int count = length - at < shape.page_tokens ? length - at : shape.page_tokens;
            if (at + shape.page_tokens < length) {
                const char* next = (const char*)(kept + (int64_t)*table * shape.page_tokens * stride);
                for (int64_t i = 0; i < (int64_t)sizeof(Kept) * stride * shape.page_tokens; i += 64)
                    __builtin_prefetch(next + i);
            }
            for (int head = 0; head < shape.kv_heads; head++)
                Pages<VECTORS, Kept>::group(scoring, group, (scoring ? query : out) + head * group * shape.dim,
                                            page + head * shape.dim, count, stride,
                                            scores + head * group * width + at, width, scale);
        }
        table -= (length + shape.page_tokens - 1) / shape.page_tokens;
        if (scoring)
            for (int head = 0; head < shape.heads; head++) softmax(scores + head * width, length, width);
    }
}

template <typename Kept>
bool attend_any(float* query, const Kept* keys, const Kept* values, const int32_t* table, int64_t length, Shape shape,
                float* out, float* scores, int64_t width) {
    switch (shape.dim / LANES) {
#define DIM(VECTORS) \
    case VECTORS:    \
        return attend_row<VECTORS>(query, keys, values, table, length, shape, out, scores, width), true;
        DIM(1) DIM(2) DIM(4) DIM(5) DIM(6) DIM(8)  // heads of 16, 32, 64, 80, 96 and 128
#undef DIM
    }
    return false;
}

template <typename Model, typename Kept>
int decode_rows(int64_t rows, const Model* qkv, Kept* keys, Kept* values, const int64_t* write_index,
                const int32_t* tables, int64_t table_stride, const int32_t* lengths, const float* rotation, int rotary,
                const float* weight, float eps, Shape shape, Model* out, int64_t out_stride) {
    const int kept_width = shape.kv_heads * shape.dim, query_width = shape.heads * shape.dim;
    const int product_width = query_width + 2 * kept_width;
    static thread_local std::vector<float> space;
    for (int64_t row = 0; row < rows; row++) {
        // Scores are written sixteen at a time, so a head's may run over by as many.
        const int64_t length = lengths[row], width = (length + 2 * LANES - 1) / LANES * LANES;
        const size_t needed = product_width + query_width + shape.heads * width;
        if (space.size() < needed) space.resize(2 * needed);
        float *heads = space.data(), *mixed = heads + product_width, *scores = mixed + query_width;
        const Model* own = qkv + row * product_width;
        rotate_heads(own, heads, shape.heads + shape.kv_heads, shape.dim, rotary, rotation + row * rotary, weight, eps);
        rotate_heads(own + query_width + kept_width, heads + query_width + kept_width, shape.kv_heads, shape.dim, 0,
                     rotation, (const float*)nullptr, 0.0f);
        put(heads + query_width, keys + write_index[row] * kept_width, kept_width);
        put(heads + query_width + kept_width, values + write_index[row] * kept_width, kept_width);
        std::memset(mixed, 0, query_width * sizeof(float));
        if (!attend_any(heads, (const Kept*)keys, (const Kept*)values, tables + row * table_stride, length, shape, mixed,
                        scores, width))
            return 1;
        put(mixed, out + row * out_stride, query_width);
    }
    return 0;
}

template <typename Model>
void rms_norm(int64_t rows, int64_t dim, const Model* x, const Model* weight, float eps, Model* out) {
    for (int64_t row = 0; row < rows; row++, x += dim, out += dim) {
        Floats squares{};
        for (int64_t i = 0; i < dim; i += LANES) squares += load(x + i) * load(x + i);
        const float scale = 1.0f / std::sqrt(sum(squares) / dim + eps);
        for (int64_t i = 0; i < dim; i += LANES) store(out + i, load(x + i) * scale * load(weight + i));
    }
}

template <typename Model>
void silu_gate(int64_t rows, int64_t dim, const Model* both, Model* out) {
    for (int64_t row = 0; row < rows; row++, both += 2 * dim, out += dim)
        for (int64_t i = 0; i < dim; i += LANES) {
            const Floats gate = load(both + i);
            store(out + i, gate / (exponential(-gate) + 1.0f) * load(both + dim + i));
        }
}

}  // namespace

extern "C" {

// Shapes, strides in elements and the order of arguments are `worker/native/operations.py`'s, which checks them.
#define DECODE(NAME, MODEL, KEPT)                                                                                      \
    int NAME(int64_t rows, const void* qkv, void* keys, void* values, const int64_t* write_index,                      \
             const int32_t* tables, int64_t table_stride, const int32_t* lengths, const float* rotation, int rotary,   \
             const float* weight, float eps, int heads, int kv_heads, int dim, int page_tokens, void* out,             \
             int64_t out_stride) {                                                                                     \
        return decode_rows(rows, (const MODEL*)qkv, (KEPT*)keys, (KEPT*)values, write_index, tables, table_stride,     \
                           lengths, rotation, rotary, weight, eps, Shape{heads, kv_heads, dim, page_tokens},           \
                           (MODEL*)out, out_stride);                                                                   \
    }
DECODE(decode_float32_float32, float, float)
DECODE(decode_bfloat16_float32, bf16, float)
DECODE(decode_bfloat16_bfloat16, bf16, bf16)

void rms_norm_float32(int64_t rows, int64_t dim, const void* x, const void* weight, float eps, void* out) {
    rms_norm(rows, dim, (const float*)x, (const float*)weight, eps, (float*)out);
}
void rms_norm_bfloat16(int64_t rows, int64_t dim, const void* x, const void* weight, float eps, void* out) {
    rms_norm(rows, dim, (const bf16*)x, (const bf16*)weight, eps, (bf16*)out);
}
void silu_gate_float32(int64_t rows, int64_t dim, const void* both, void* out) {
    silu_gate(rows, dim, (const float*)both, (float*)out);
}
void silu_gate_bfloat16(int64_t rows, int64_t dim, const void* both, void* out) {
    silu_gate(rows, dim, (const bf16*)both, (bf16*)out);
}
}
