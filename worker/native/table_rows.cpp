// Owns the unit that reads rows of a packed weight back: a table of words that is the head's weight too. Each number is the one that
// the weight was packed from, or the file's own dequantisation of it: build.py has this unit compiled without fused operations.

#include "units.h"
#include "vectors.h"

#if defined(DEGAS_MULTIPLIES)

#include "panels.h"

namespace {

template <typename Format>
void read_row(int64_t inputs, const uint8_t* packed, int64_t row, float* to) {
    const int64_t panel_bytes = inputs / Format::BLOCK * Format::BLOCK_BYTES, place = row % PANEL;
    const uint8_t* block = packed + row / PANEL * panel_bytes;
    const int vector = place / LANES, lane = place % LANES;
    for (int64_t i = 0; i < inputs; i += Format::BLOCK, block += Format::BLOCK_BYTES) {
        Format of;
        of.open(block);
        for (int64_t j = 0; j < Format::BLOCK; j += Format::STEP) {
            const Words words = load_words(Format::words(block) + (j / Format::STEP * PANEL + vector * LANES) * 4);
            Places<0, Format::STEP>::each([&](auto at) {
                *to++ = of.template weight<decltype(at)::value>(words, vector)[lane];
            });
        }
    }
}

#if defined(__AVX512F__)
// What `pack_tiles` makes: (outputs / 16, inputs / 2, 16 outputs, 2) bf16.
inline void read_tile_row(int64_t inputs, const uint16_t* packed, int64_t row, float* to) {
    packed += row / 16 * inputs * 16 + row % 16 * 2;
    for (int64_t i = 0; i < inputs; i += 2, packed += 32)
        for (int64_t p = 0; p < 2; p++) {
            const uint32_t bits = (uint32_t)packed[p] << 16;
            std::memcpy(to + i + p, &bits, 4);
        }
}
#endif

template <typename Format>
void read_rows(int64_t inputs, const uint8_t* packed, const int64_t* rows, int64_t count, float* to) {
    for (int64_t r = 0; r < count; r++) read_row<Format>(inputs, packed, rows[r], to + r * inputs);
}

}  // namespace

extern "C" {
int reads_table_rows() { return 1; }
void read_table_rows(int format, int are_tiles, int64_t inputs, const void* packed, const int64_t* rows, int64_t count, float* to) {
    const uint8_t* from = (const uint8_t*)packed;
#if defined(__AVX512F__)
    if (are_tiles) {
        for (int64_t r = 0; r < count; r++) read_tile_row(inputs, (const uint16_t*)packed, rows[r], to + r * inputs);
        return;
    }
#endif
    switch (format) {
        case SAME: return read_rows<Fp32>(inputs, from, rows, count, to);
        case BF16: return read_rows<Bf16>(inputs, from, rows, count, to);
        case INT8: return read_rows<Int8>(inputs, from, rows, count, to);
        case INT4: return read_rows<Int4>(inputs, from, rows, count, to);
        case INT4_MIN: return read_rows<Int4Min>(inputs, from, rows, count, to);
        case INT4_REAL: return read_rows<Int4Real>(inputs, from, rows, count, to);
        case INT8_REAL: return read_rows<Int8Real>(inputs, from, rows, count, to);
        case INT8_OFFSET: return read_rows<Int8Offset>(inputs, from, rows, count, to);
        case INT8_FINE: return read_rows<Int8Fine>(inputs, from, rows, count, to);
    }
}
}

#else

extern "C" {
int reads_table_rows() { return 0; }
void read_table_rows(int, int, int64_t, const void*, const int64_t*, int64_t, float*) {}
}

#endif
