// Owns all layers of a decode step in one call: the functions beside this file in the order in which the models call
// them one by one, over the same numbers and with the same results.

#pragma once

#include <vector>

#include "attention.h"
#include "product.h"
#include "rows.h"
#include "team.h"
#include "units.h"

namespace {

// As worker/native/stack.py lays them out.
struct Linear {
    const void *weight, *bias;
    int64_t inputs, outputs, format, rounds_inputs;  // whether inputs are rounded to int8: then weights are in a file's blocks
};

// Attention, then a gated MLP, each behind its RMS norm and added to the residual stream.
struct GatedLayer {
    const void* attention_norm;
    Linear qkv;
    const float* qk_weight;
    Linear out;
    const void* mlp_norm;
    Linear gate_up, down;
    void *keys, *values;
    int64_t window;
    double cap;
};

// One layer norm feeds attention and MLP side by side; a product over both adds them to the residual stream.
struct ParallelLayer {
    const void *norm, *norm_bias;
    Linear qkv, fc1, out;
    void *keys, *values;
    int64_t window;
    double cap;
};

struct Step {
    int64_t rows, dim;
    const int64_t* write_index;
    const Run* runs;
    const int32_t* tables;
    int64_t table_stride;
    const int32_t* lengths;
    const float* rotation;
    int32_t rotary;
    float eps, qk_eps;
    int32_t heads, kv_heads, head_dim, page_tokens, keeps_float;
};

// Memory for rounded inputs that all threads share, the calling thread's, kept from step to step.
class Rounded {
public:
    static constexpr int64_t ALIGNMENT = 64;
    void reserve(int64_t rows, const Linear& linear) {
        const int64_t bytes = linear.rounds_inputs ? activation_bytes(rows, linear.inputs) + ALIGNMENT : 0;
        if ((int64_t)memory.size() < bytes) memory.resize(bytes);
    }
    void* address() { return (void*)(((uintptr_t)memory.data() + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT); }
    static Rounded& own() {
        static thread_local Rounded memory;
        return memory;
    }

private:
    std::vector<uint8_t> memory;
};

constexpr int64_t FEW_ROWS = 4;  // which each thread rounds for itself in less time than the others would have to be waited for

template <typename Model>
void* round_inputs(Team& team, Rounded& shared, const Linear& linear, int64_t rows, const Model* x) {
    const auto quantise_rows = std::is_same<Model, float>::value ? quantise_rows_float32 : quantise_rows_bfloat16;
    if (team.count() > 1 && rows <= FEW_ROWS) {
        Rounded& own = Rounded::own();
        if (&own != &shared) own.reserve(rows, linear);
        quantise_rows(rows, linear.inputs, x, own.address(), 0, rows);
        return own.address();
    }
    team.share(rows, 1, [&](int64_t first, int64_t last) {
        quantise_rows(rows, linear.inputs, x, shared.address(), first, last);
    });
    return shared.address();
}

// `rounded` holds room for these rows.
template <typename Model>
void multiply(Team& team, Rounded& rounded, const Linear& linear, int64_t rows, const Model* x, const Model* residual, Model* out,
              int64_t out_stride, int kind, const Linear* after = nullptr, float* unrounded = nullptr) {
    const Product<Model> product{linear.inputs, linear.outputs, x,    (const Model*)linear.bias,        residual, out,
                                 out_stride,    kind,           unrounded, after ? after->weight : nullptr};
    const int64_t panels = (linear.outputs + PANEL - 1) / PANEL;
    if (linear.rounds_inputs) {
        void* memory = round_inputs(team, rounded, linear, rows, x);
        return team.share(panels, 64 / PANEL, [&](int64_t first, int64_t last) {
            const auto multiply_blocks = std::is_same<Model, float>::value ? multiply_blocks_float32 : multiply_blocks_bfloat16;
            multiply_blocks(linear.format, rows, memory, &product, linear.weight, first, last);
        });
    }
    team.share(panels, 64 / PANEL, [&](int64_t first, int64_t last) {
        const auto multiply_panels = std::is_same<Model, float>::value ? multiply_panels_float32 : multiply_panels_bfloat16;
        multiply_panels(linear.format, rows, &product, linear.weight, first, last);
    });
}

inline Rows rows_of(const Step& step) { return {step.rows, step.runs, step.tables, step.table_stride, step.lengths}; }

// A step's plans, one for each window that its layers have; made before the threads start. The calling thread's alone, kept for
// their memory.
class Plans {
public:
    template <typename Layer>
    void make(const Step& step, const Layer* layers, int64_t count) {
        used = 0;
        for (const Layer* layer = layers; layer < layers + count; layer++) {
            if (find(layer->window)) continue;
            if (used == plans.size()) plans.emplace_back();
            windows.resize(plans.size());
            windows[used] = layer->window;
            plans[used++].plan(rows_of(step), shape(step, *layer), pool ? pool->count : 1);
        }
    }
    Parts* find(int64_t window) {
        for (size_t i = 0; i < used; i++)
            if (windows[i] == window) return &plans[i];
        return nullptr;
    }
    template <typename Layer>
    static Shape shape(const Step& step, const Layer& layer) {
        return {step.heads, step.kv_heads, step.head_dim, step.page_tokens, (int)layer.window, (float)layer.cap};
    }
    static Plans& own() {
        static thread_local Plans plans;
        return plans;
    }

private:
    std::vector<Parts> plans;
    std::vector<int64_t> windows;
    size_t used = 0;
};

template <typename Model, typename Layer>
void attend(Team& team, Plans& plans, const Step& step, const Layer& layer, const float* qk_weight, const Model* qkv, Model* out,
            int64_t stride) {
    const Shape shape = Plans::shape(step, layer);
    Parts& plan = *plans.find(layer.window);
    const auto attend_in = [&](auto* keys, auto* values) {
        attend_rows(team, plan, step.rows, qkv, keys, values, step.write_index, step.rotation, step.rotary, qk_weight, step.qk_eps,
                    shape, out, stride);
    };
    if (step.keeps_float) return attend_in((float*)layer.keys, (float*)layer.values);
    return attend_in((bf16*)layer.keys, (bf16*)layer.values);
}

template <typename Model>
void share_rms_norm(Team& team, int64_t rows, int64_t dim, const Model* x, const void* weight, float eps, Model* out) {
    team.share(rows, 1, [&](int64_t first, int64_t last) {
        rms_norm(last - first, dim, x + first * dim, (const Model*)weight, eps, out + first * dim);
    });
}

// Buffers one behind another in memory that is kept from step to step.
template <typename Model>
struct Space {
    Model* take(int64_t count) {
        Model* at = next;
        next += count;
        return at;
    }
    explicit Space(int64_t count) {
        static thread_local std::vector<Model> memory;
        if ((int64_t)memory.size() < count) memory.resize(count);
        next = memory.data();
    }
    Model* next;
};

// hidden (rows, dim), changed in place.
template <typename Model>
int run_layers(const Step& step, const GatedLayer* layers, int64_t count, Model* hidden) {
    if (!can_attend(step.head_dim)) return 1;
    const int64_t rows = step.rows, dim = step.dim, inner_dim = layers->gate_up.outputs / 2;
    Space<Model> space(rows * (dim + layers->qkv.outputs + layers->out.inputs + inner_dim));
    Model *normed = space.take(rows * dim), *qkv = space.take(rows * layers->qkv.outputs);
    Model *mixed = space.take(rows * layers->out.inputs), *inner = space.take(rows * inner_dim);
    const Model* nothing = nullptr;
    Plans& plans = Plans::own();
    plans.make(step, layers, count);
    Rounded& rounded = Rounded::own();
    for (const GatedLayer* layer = layers; layer < layers + count; layer++)
        for (const Linear* linear : {&layer->qkv, &layer->out, &layer->gate_up, &layer->down}) rounded.reserve(rows, *linear);
    together([&](Team& team) {
        for (const GatedLayer* layer = layers; layer < layers + count; layer++) {
            const Linear* next = layer + 1 < layers + count ? &layer[1].qkv : nullptr;
            share_rms_norm(team, rows, dim, hidden, layer->attention_norm, step.eps, normed);
            multiply(team, rounded, layer->qkv, rows, normed, nothing, qkv, layer->qkv.outputs, PLAIN, &layer->out);
            attend(team, plans, step, *layer, layer->qk_weight, qkv, mixed, layer->out.inputs);
            multiply(team, rounded, layer->out, rows, mixed, hidden, hidden, dim, ADD, &layer->gate_up);
            share_rms_norm(team, rows, dim, hidden, layer->mlp_norm, step.eps, normed);
            multiply(team, rounded, layer->gate_up, rows, normed, nothing, inner, inner_dim, GATE, &layer->down);
            multiply(team, rounded, layer->down, rows, inner, hidden, hidden, dim, ADD, next);
        }
    });
    return 0;
}

template <typename Model>
int run_layers(const Step& step, const ParallelLayer* layers, int64_t count, Model* hidden) {
    if (!can_attend(step.head_dim)) return 1;
    const int64_t rows = step.rows, dim = step.dim, both_dim = layers->out.inputs;
    const int64_t mixed_dim = (int64_t)step.heads * step.head_dim;
    Space<Model> space(rows * (dim + layers->qkv.outputs + both_dim));
    Model *normed = space.take(rows * dim), *qkv = space.take(rows * layers->qkv.outputs);
    Model* both = space.take(rows * both_dim);
    const Model* nothing = nullptr;
    Plans& plans = Plans::own();
    plans.make(step, layers, count);
    Rounded& rounded = Rounded::own();
    for (const ParallelLayer* layer = layers; layer < layers + count; layer++)
        for (const Linear* linear : {&layer->qkv, &layer->fc1, &layer->out}) rounded.reserve(rows, *linear);
    together([&](Team& team) {
        for (const ParallelLayer* layer = layers; layer < layers + count; layer++) {
            const Linear* next = layer + 1 < layers + count ? &layer[1].qkv : nullptr;
            team.share(rows, 1, [&](int64_t first, int64_t last) {
                layer_norm(last - first, dim, hidden + first * dim, (const Model*)layer->norm, (const Model*)layer->norm_bias,
                           step.eps, normed + first * dim);
            });
            multiply(team, rounded, layer->qkv, rows, normed, nothing, qkv, layer->qkv.outputs, PLAIN, &layer->fc1);
            attend(team, plans, step, *layer, nullptr, qkv, both, both_dim);
            multiply(team, rounded, layer->fc1, rows, normed, nothing, both + mixed_dim, both_dim, GELU, &layer->out);
            multiply(team, rounded, layer->out, rows, both, hidden, hidden, dim, ADD, next);
        }
    });
    return 0;
}

}  // namespace
