// Owns packing the blocks of a file whose words hold the very bits that a packed panel has: nothing is taken apart, bytes change places.

#pragma once

#include "formats.h"

namespace {

// Of ggml's Q4_0 and Q4_1 byte j has q of input j below and of input 16 + j above. A packed word has eight neighbours: in byte j
// input j below, input 4 + j above.
inline void place_nibbles(const uint8_t* q, uint8_t* to) {
    for (int64_t at = 0; at < 2; at++, q += 8) {
        uint32_t front, back;
        std::memcpy(&front, q, 4);
        std::memcpy(&back, q + 4, 4);
        const uint32_t low = (front & 0x0f0f0f0f) | (back & 0x0f0f0f0f) << 4;
        const uint32_t high = (front >> 4 & 0x0f0f0f0f) | (back & 0xf0f0f0f0);
        std::memcpy(to + at * PANEL * 4, &low, 4);
        std::memcpy(to + (2 + at) * PANEL * 4, &high, 4);
    }
}

inline void place_bytes(const uint8_t* q, uint8_t* to) {
    for (int64_t word = 0; word < 8; word++) std::memcpy(to + word * PANEL * 4, q + word * 4, 4);
}

// blocks (outputs, inputs / 32, bytes of a block) → panels `first` to `last` of `packed`; the last one is filled up with zeros.
template <typename Format>
void pack_file_panels(int64_t outputs, int64_t inputs, const uint8_t* blocks, uint8_t* packed, int64_t first, int64_t last) {
    constexpr int64_t SCALES = Format::HEAD_BYTES / Format::SCALE_BYTES, BYTES = 2 * SCALES + 4 * Format::NUM_BITS;
    const int64_t across = inputs / 32;
    packed += first * across * Format::BLOCK_BYTES;
    for (int64_t panel = first * PANEL; panel < last * PANEL; panel += PANEL)
        for (int64_t block = 0; block < across; block++, packed += Format::BLOCK_BYTES) {
            if (panel + PANEL > outputs) std::memset(packed, 0, Format::BLOCK_BYTES);
            for (int64_t o = 0; o < PANEL && panel + o < outputs; o++) {
                const uint8_t* from = blocks + ((panel + o) * across + block) * BYTES;
                for (int64_t s = 0; s < SCALES; s++) std::memcpy(packed + s * Format::SCALE_BYTES + o * 2, from + 2 * s, 2);
                uint8_t* words = packed + Format::HEAD_BYTES + o * 4;
                Format::NUM_BITS == 8 ? place_bytes(from + 2 * SCALES, words) : place_nibbles(from + 2 * SCALES, words);
            }
        }
}

}  // namespace
