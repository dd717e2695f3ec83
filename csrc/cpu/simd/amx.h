// The tile registers. Included by files that are compiled for AMX alone.
#pragma once

#include "cpu/bf16.h"

namespace llmctl {
namespace {

// While it lives, tiles 0 to 3 are 16 rows of `columns` sums, 4 and 5 are 16 rows of `depth` bytes (a multiple of 4), and 6
// and 7 have a row for each four of these bytes.
class Tiles {
public:
    explicit Tiles(int depth, int columns = 16) {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int tile = 0; tile < 8; ++tile) {
            config.row_bytes[tile] = static_cast<uint16_t>(tile == 4 || tile == 5 ? depth : columns * 4);
            config.rows[tile] = static_cast<uint8_t>(tile < 6 ? 16 : depth / 4);
        }
        asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
    }
    ~Tiles() { asm volatile("tilerelease"); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

// In assembler, as the compiler's intrinsics neither take a template's numbers nor say that they touch memory.
template <int Tile>
LLMCTL_INLINE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}
template <int Tile>
LLMCTL_INLINE void tile_load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(Tile), "r"(from), "r"(stride) : "memory");
}
template <int Tile>
LLMCTL_INLINE void tile_store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(Tile), "r"(to), "r"(stride) : "memory");
}
// C += A B for signed bytes; for A of signed and B of unsigned ones; for pairs of bfloat16.
template <int C, int A, int B>
LLMCTL_INLINE void tile_dot_signed() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
LLMCTL_INLINE void tile_dot_unsigned() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
LLMCTL_INLINE void tile_dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

}  // namespace
}  // namespace llmctl
