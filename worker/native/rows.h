// Owns what works along a row on a CPU: norms, the SiLU gate, the largest of its logits.

#pragma once

#include <cmath>

#include "vectors.h"

namespace {

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
        for (int64_t i = 0; i < dim; i += LANES) store(out + i, silu(load(both + i)) * load(both + dim + i));
}

template <typename Model>
void layer_norm(int64_t rows, int64_t dim, const Model* x, const Model* weight, const Model* bias, float eps, Model* out) {
    for (int64_t row = 0; row < rows; row++, x += dim, out += dim) {
        Floats total{}, squares{};
        for (int64_t i = 0; i < dim; i += LANES) total += load(x + i);
        const float mean = sum(total) / dim;
        for (int64_t i = 0; i < dim; i += LANES) {
            const Floats away = load(x + i) - mean;
            squares += away * away;
        }
        const float scale = 1.0f / std::sqrt(sum(squares) / dim + eps);
        for (int64_t i = 0; i < dim; i += LANES)
            store(out + i, (load(x + i) - mean) * scale * load(weight + i) + load(bias + i));
    }
}

// The largest of each row and the first place it stands at; NaN, and any place, of a row that holds one.
void largest_of_rows(int64_t rows, int64_t count, const float* x, int64_t stride, float* values, int64_t* places) {
    Ints lanes;
    for (int lane = 0; lane < LANES; lane++) lanes[lane] = lane;
    for (int64_t row = 0; row < rows; row++, x += stride) {
        Floats most = splat(-INFINITY);
        Ints at = lanes, spoilt{};
        const int64_t whole = count / LANES * LANES;
        for (int64_t i = 0; i < whole; i += LANES) {
            const Floats here = load(x + i);
            at = here > most ? lanes + (int32_t)i : at;
            most = here > most ? here : most;
            spoilt |= here != here;
        }
        float top = -INFINITY;
        int64_t place = 0;
        bool is_number = true;
        for (int lane = 0; lane < LANES && whole; lane++) {
            if (most[lane] > top || (most[lane] == top && at[lane] < place)) top = most[lane], place = at[lane];
            is_number = is_number && !spoilt[lane];
        }
        for (int64_t i = whole; i < count; i++) {
            if (x[i] > top) top = x[i], place = i;
            is_number = is_number && x[i] == x[i];
        }
        values[row] = is_number ? top : NAN;
        places[row] = place;
    }
}

}  // namespace
