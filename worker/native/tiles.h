// Owns bf16 products on matrix registers (AMX).

#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "product.h"

namespace {

// A tile of weights: 16 outputs by 32 inputs, as 16 rows of one pair of inputs for each output.
constexpr int64_t TILE = 16 * 32;

// Whether the system lets this process use the registers: it must be asked first.
inline bool grants_tiles() {
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return granted;
}

struct alignas(64) Tiles {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles 0 to 3 hold sums, 4 and 5 rows of x, 6 and 7 weights.
inline void configure(int first, int second) {
    Tiles tiles;
    for (int t = 0; t < 8; t++) {
        tiles.bytes[t] = 64;
        tiles.rows[t] = 16;
    }
    tiles.rows[0] = tiles.rows[1] = tiles.rows[4] = first;
    tiles.rows[2] = tiles.rows[3] = tiles.rows[5] = second;
    _tile_loadconfig(&tiles);
}

template <bool TWO_ROWS, bool TWO_COLUMNS>
void multiply_tiles(const bf16* x, int64_t inputs, const bf16* weight, int64_t weight_step, float* sums) {
    _tile_zero(0);
    if (TWO_COLUMNS) _tile_zero(1);
    if (TWO_ROWS) _tile_zero(2);
    if (TWO_ROWS && TWO_COLUMNS) _tile_zero(3);
    for (int64_t i = 0; i < inputs; i += 32, weight += TILE) {
        _tile_loadd(4, x + i, inputs * 2);
        _tile_loadd(6, weight, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (TWO_COLUMNS) {
            _tile_loadd(7, weight + weight_step, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (TWO_ROWS) {
            _tile_loadd(5, x + 16 * inputs + i, inputs * 2);
            _tile_dpbf16ps(2, 5, 6);
            if (TWO_COLUMNS) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 128);
    if (TWO_COLUMNS) _tile_stored(1, sums + 16, 128);
    if (TWO_ROWS) _tile_stored(2, sums + 16 * 32, 128);
    if (TWO_ROWS && TWO_COLUMNS) _tile_stored(3, sums + 16 * 32 + 16, 128);
}

// weight (outputs, inputs) → packed (outputs / 16, inputs / 32, 16 pairs, 16 outputs, 2)
inline void pack_tiles(int64_t outputs, int64_t inputs, const bf16* weight, bf16* packed) {
    for (int64_t block = 0; block < outputs; block += 16)
        for (int64_t i = 0; i < inputs; i += 2)
            for (int64_t o = block; o < block + 16; o++)
                for (int64_t p = 0; p < 2; p++) *packed++ = weight[o * inputs + i + p];
}

// Columns from `begin_column` to `end_column`, multiples of PANEL or the last.
inline void multiply_all_tiles(int64_t rows, const Product<bf16>& product, const bf16* weight, int64_t begin_column, int64_t end_column) {
    alignas(64) float sums[32 * 32];
    const int64_t inputs = product.inputs, step = 16 * inputs;
    for (int64_t begin = 0; begin < rows; begin += 64) {  // so few rows that sums of all columns stay in the cache
        const int64_t end = begin + 64 < rows ? begin + 64 : rows;
        int configured = 0;
        for (int64_t column = begin_column; column < end_column; column += 32) {
            const bool wide = column + 32 <= end_column;
            for (int64_t row = begin; row < end; row += 32) {
                const int count = end - row < 32 ? end - row : 32;
                if (count != configured) {
                    configure(count < 16 ? count : 16, count > 16 ? count - 16 : 1);
                    configured = count;
                }
                const bf16 *from = product.x + row * inputs, *with = weight + column * inputs;
                if (count > 16)
                    (wide ? multiply_tiles<true, true> : multiply_tiles<true, false>)(from, inputs, with, step, sums);
                else
                    (wide ? multiply_tiles<false, true> : multiply_tiles<false, false>)(from, inputs, with, step, sums);
                for (int r = 0; r < count; r++) {
                    Floats pair[2] = {load(sums + r * 32), load(sums + r * 32 + 16)};
                    finish(product, row + r, column, pair, wide ? 2 : 1);
                }
            }
        }
    }
    _tile_release();
}

}  // namespace
