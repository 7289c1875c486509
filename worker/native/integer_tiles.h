// Owns integer products of weights of 4 bits on matrix registers (AMX): the whole sums of a block by tiles, what they add to the
// results by vectors as integer_products.h does, to the same last bit. (Of 8 bits a group is so short that vectors are as quick.)

#pragma once

#include <vector>

#include "integer_products.h"
#include "tiles.h"

namespace {

constexpr int TILE_ROWS = 16;
constexpr int64_t AHEAD_BLOCKS = 2, KEPT_BLOCKS = 4;  // sums wait in memory until the tiles are done with them

// Tile 0 holds sums, 4 rows of activations, 6 a block of 16 outputs' weights.
template <typename Format>
inline void configure_integers() {
    Tiles tiles;
    for (int t = 0; t < 8; t++) {
        tiles.bytes[t] = 64;
        tiles.rows[t] = TILE_ROWS;
    }
    tiles.bytes[4] = Format::BLOCK;
    tiles.rows[6] = Format::BLOCK / 4;
    _tile_loadconfig(&tiles);
}

// A panel's weights as signed bytes, blocks one behind another: (BLOCK / 4, PANEL) words of four inputs each.
template <typename Format>
void expand_bytes(int64_t inputs, const uint8_t* panel, uint8_t* to) {
    for (int64_t i = 0; i < inputs; i += Format::BLOCK, panel += Format::BLOCK_BYTES)
        for (int64_t j = 0; j < Format::BLOCK; j += Format::STEP) {
            const uint8_t* at = Format::words(panel) + j / Format::STEP * PANEL * 4;
            for (int64_t part = 0; part < Format::STEP / 4; part++)
                for (int v = 0; v < VECTORS; v++, to += LANES * 4) {
                    const __m512i four = (__m512i)Format::four(load_words(at + v * LANES * 4), part);
                    _mm512_store_si512(to, _mm512_sub_epi8(four, _mm512_set1_epi8(Format::LESS)));
                }
        }
}

// sums (TILE_ROWS) of the rows from `row` on by the LANES outputs whose expanded weights begin at `bytes` and whose scales are those of vector `v` of the panel.
template <typename Format>
__attribute__((noinline)) void sum_tiles(const Activations& x, int64_t row, const uint8_t* panel, int v, const uint8_t* bytes,
                                         Floats* to) {
    const int64_t inputs = x.inputs;
    const int8_t* q = x.q + row * inputs;
    alignas(64) int32_t dots[KEPT_BLOCKS][TILE_ROWS * LANES];
    Floats sums[TILE_ROWS] = {};
    const int64_t blocks = inputs / Format::BLOCK;
    const auto multiply = [&](int64_t block) __attribute__((always_inline)) {
        _tile_zero(0);
        _tile_loadd(4, q + block * Format::BLOCK, inputs);
        _tile_loadd(6, bytes + block * Format::BLOCK * PANEL, PANEL * 4);
        _tile_dpbssd(0, 4, 6);
        _tile_stored(0, dots[block % KEPT_BLOCKS], LANES * 4);
    };
    for (int64_t block = 0; block < AHEAD_BLOCKS && block < blocks; block++) multiply(block);
    for (int64_t block = 0; block < blocks; block++, panel += Format::BLOCK_BYTES) {
        if (block + AHEAD_BLOCKS < blocks) multiply(block + AHEAD_BLOCKS);
        Format scales;
        scales.open_scales(panel);
        const int32_t* own = dots[block % KEPT_BLOCKS];
        const float* facts = x.facts + block * FACTS * x.stride + row;
        Places<0, TILE_ROWS>::each([&](auto place) {
            constexpr int r = decltype(place)::value;
            Ints dot;
            std::memcpy(&dot, own + r * LANES, sizeof dot);
            add_group<Format>(sums[r], dot, scales.scale[v], scales.least[v], facts + r, x.stride);
        });
    }
    Places<0, TILE_ROWS>::each([&](auto place) { to[decltype(place)::value] = sums[decltype(place)::value]; });
}

// Panels `first` to `last` of the outputs, of as many rows as fill tiles; gives that number.
template <typename Format, typename Real>
int64_t multiply_integer_tiles(int64_t rows, const Activations& x, const Product<Real>& product, const uint8_t* packed, int64_t first,
                               int64_t last) {
    const int64_t inputs = product.inputs, panel_bytes = inputs / Format::BLOCK * Format::BLOCK_BYTES;
    const int64_t whole = rows / TILE_ROWS * TILE_ROWS;
    if (!whole || !grants_tiles()) return 0;
    static thread_local std::vector<uint8_t> memory;
    if ((int64_t)memory.size() < inputs * PANEL + 64) memory.resize(inputs * PANEL + 64);
    uint8_t* const expanded = (uint8_t*)(((uintptr_t)memory.data() + 63) / 64 * 64);
    configure_integers<Format>();
    for (int64_t panel = first; panel < last; panel++) {
        const uint8_t* weight = packed + panel * panel_bytes;
        expand_bytes<Format>(inputs, weight, expanded);
        for (int64_t row = 0; row < whole; row += TILE_ROWS) {
            Floats sums[VECTORS][TILE_ROWS];
            for (int v = 0; v < VECTORS; v++) sum_tiles<Format>(x, row, weight, v, expanded + v * LANES * 4, sums[v]);
            for (int r = 0; r < TILE_ROWS; r++) {
                Floats done[VECTORS];
                for (int v = 0; v < VECTORS; v++) done[v] = sums[v][r];
                finish(product, row + r, panel * PANEL, done, VECTORS);
            }
        }
    }
    _tile_release();
    return whole;
}

}  // namespace
