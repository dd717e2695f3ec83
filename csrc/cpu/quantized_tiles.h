// The matrix product with weights in few bits on AMX tiles, for many rows: the same whole numbers as with few, and the same
// steps in floats after them.
//
// The tile unit works by itself, so while it multiplies one block the vector unit scales and adds up the one before.
#pragma once

#include "cpu/piece_scratch.h"
#include "cpu/quantized_linear.h"
#include "cpu/simd/amx.h"
#include "cpu/simd/int_avx512_vnni.h"

namespace llmctl {
namespace {

// The products of two tiles of rows (or of the two terms of one) and two panels of weights, each 16 x 16, for one block.
struct TileSums {
    alignas(64) int32_t sum[4][2][2][256];  // unit, rows, panel
};

// The codes of a block of a panel less their zeros, [32 quads][16 outputs][4].
LLMCTL_INLINE void unpack_block(const QuantizedLinear& c, int64_t panel, int64_t block, int8_t* to) {
    const __m512i low = _mm512_set1_epi8(15);
    const uint8_t* from = c.codes + panel * c.panel_bytes() + block * (quantized_block * quantized_panel / 2);
    __m512i zeros = _mm512_set1_epi8(8);
    for (int64_t run = 0; run < 4; ++run) {
        if (c.zeros != nullptr) {
            const uint8_t* at = c.zeros + c.unit_at(panel, block) + run * quantized_run / c.unit * quantized_panel;
            zeros = _mm512_mullo_epi32(Avx512Int::load_bytes(at), _mm512_set1_epi32(0x01010101));
        }
        for (int64_t q = 0; q < 4; ++q, from += 64) {
            const __m512i codes = _mm512_loadu_si512(from);
            const __m512i upper = _mm512_and_si512(_mm512_srli_epi16(codes, 4), low);
            _mm512_store_si512(to + (run * 8 + q) * 64, _mm512_sub_epi8(_mm512_and_si512(codes, low), zeros));
            _mm512_store_si512(to + (run * 8 + q + 4) * 64, _mm512_sub_epi8(upper, zeros));
        }
    }
}

// A strip: up to two tiles of rows times up to two panels, over all blocks. In 4 bits the tiles are of two row blocks, in 8
// the two terms of one.
template <int Bits, int Unit, int Tiles, int Panels>
struct Strip {
    static constexpr int units = quantized_block / Unit, steps = Unit == 128 ? 2 : 1;
    static constexpr int64_t columns = Unit == 32 ? 32 : 64;
    static constexpr int row_blocks = Bits == 4 ? Tiles : 1;

    const QuantizedLinear& c;
    const QuantizedRows& x;
    int64_t rows;              // the first row block
    int64_t panel;             // the first panel
    const int8_t* weights[2];  // of each panel
    int64_t n_rows;            // of the strip
    float* sums;               // [n_rows, linear_max_outs]

    // The tiles' products for one unit, left in tiles 0 to 3.
    LLMCTL_INLINE void multiply(int64_t block, int unit) const {
        tile_zero<0>();
        if constexpr (Panels == 2) tile_zero<1>();
        if constexpr (Tiles == 2) tile_zero<2>();
        if constexpr (Tiles == 2 && Panels == 2) tile_zero<3>();
#pragma GCC unroll 2
        for (int step = 0; step < steps; ++step) {
            const int64_t k = unit * Unit + step * 64;
            const int8_t* codes = x.tiles(rows, block) + k / 64 * x.terms * tile_bytes + k % 64;
            const int64_t second = Bits == 8 ? tile_bytes : x.tiles(1, 0) - x.tiles(0, 0);
            const int64_t at = block * quantized_block * quantized_panel + k * quantized_panel;
            tile_load<4>(codes, 64);
            tile_load<6>(weights[0] + at, 64);
            dot<0, 4, 6>();
            if constexpr (Panels == 2) {
                tile_load<7>(weights[1] + at, 64);
                dot<1, 4, 7>();
            }
            if constexpr (Tiles == 2) {
                tile_load<5>(codes + second, 64);
                dot<2, 5, 6>();
                if constexpr (Panels == 2) dot<3, 5, 7>();
            }
        }
    }

    template <int C, int A, int B>
    static LLMCTL_INLINE void dot() {
        if constexpr (Bits == 4) tile_dot_signed<C, A, B>();
        if constexpr (Bits == 8) tile_dot_unsigned<C, A, B>();
    }

    LLMCTL_INLINE void store(TileSums& to, int unit) const {
        tile_store<0>(to.sum[unit][0][0], 64);
        if constexpr (Panels == 2) tile_store<1>(to.sum[unit][0][1], 64);
        if constexpr (Tiles == 2) tile_store<2>(to.sum[unit][1][0], 64);
        if constexpr (Tiles == 2 && Panels == 2) tile_store<3>(to.sum[unit][1][1], 64);
    }

    // Scales and adds up what the tiles gave for 16 rows and one panel.
    LLMCTL_INLINE void add_up(const TileSums& from, int64_t block, int of_rows, int of_panel) const {
        const int64_t left = n_rows - of_rows * row_block, n = left < row_block ? left : row_block;
        const float* row_scales = x.scales_of(rows + of_rows, block);
        const int32_t* minus_sums = x.sums_of(rows + of_rows, block);
        const int64_t at = c.unit_at(panel + of_panel, block);
        float* to = sums + of_rows * row_block * linear_max_outs + of_panel * quantized_panel;
        __m512 scales[units];
#pragma GCC unroll 4
        for (int unit = 0; unit < units; ++unit) scales[unit] = load_scales<Avx512Int>(c, at + unit * quantized_panel);
        for (int64_t r = 0; r < n; ++r, to += linear_max_outs) {
            __m512 total = _mm512_setzero_ps();
#pragma GCC unroll 4
            for (int unit = 0; unit < units; ++unit) {
                __m512i sum = _mm512_load_si512(from.sum[unit][of_rows][of_panel] + r * 16);
                if constexpr (Bits == 8) {
                    const __m512i second = _mm512_load_si512(from.sum[unit][1][of_panel] + r * 16);
                    const int64_t unit_at = at + unit * quantized_panel;
                    sum = _mm512_add_epi32(Avx512Int::times_128(sum), second);
                    sum = _mm512_add_epi32(sum, minus_zeros<Avx512Int, 8>(c, unit_at, minus_sums[unit * row_block + r]));
                }
                total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scales[unit], total);
            }
            _mm512_storeu_ps(to, _mm512_fmadd_ps(total, _mm512_set1_ps(row_scales[r]), _mm512_loadu_ps(to)));
        }
    }

    // The share of a block's additions that is done while a unit of the next is multiplied.
    LLMCTL_INLINE void add_up_share(const TileSums& from, int64_t block, int unit) const {
        constexpr int shares = row_blocks * Panels;
#pragma GCC unroll 4
        for (int share = 0; share < shares; ++share) {
            if (share % units == unit) add_up(from, block, share / Panels, share % Panels);
        }
    }

    void run() const {
        TileSums buffers[2];
        for (int64_t r = 0; r < n_rows; ++r) __builtin_memset(sums + r * linear_max_outs, 0, Panels * 64);
        for (int64_t block = 0; block < c.n_blocks; ++block) {
#pragma GCC unroll 4
            for (int unit = 0; unit < units; ++unit) {
                multiply(block, unit);
                if (block > 0) add_up_share(buffers[1 - block % 2], block - 1, unit);
                store(buffers[block % 2], unit);
            }
        }
        for (int unit = 0; unit < units && c.n_blocks > 0; ++unit) {
            add_up_share(buffers[1 - c.n_blocks % 2], c.n_blocks - 1, unit);
        }
    }
};

template <int Bits, int Unit, int Panels>
void tiles_of_panels(const QuantizedLinear& c, const QuantizedRows& x, const LinearPiece& piece, int64_t panel,
                     float* sums) {
    const int8_t* weights[2];
    for (int p = 0; p < Panels; ++p) weights[p] = reinterpret_cast<const int8_t*>(c.codes) + (panel + p) * c.panel_bytes();
    if constexpr (Bits == 4) {
        const int64_t panel_bytes = c.n_blocks * quantized_block * quantized_panel;
        auto* memory = reinterpret_cast<int8_t*>(piece_scratch(Panels * panel_bytes));
        for (int p = 0; p < Panels; ++p) {
            int8_t* to = memory + p * panel_bytes;
            weights[p] = to;
            for (int64_t block = 0; block < c.n_blocks; ++block) {
                unpack_block(c, panel + p, block, to + block * quantized_block * quantized_panel);
            }
        }
    }
    constexpr int64_t step = Bits == 4 ? 2 * row_block : row_block;
    for (int64_t row = piece.first_row; row < piece.last_row; row += step) {
        const int64_t left = piece.last_row - row, n = left < step ? left : step;
        float* to = sums + (row - piece.first_row) * linear_max_outs;
        if (Bits == 8 || n > row_block) {
            Strip<Bits, Unit, 2, Panels>{c, x, row / row_block, panel, {weights[0], weights[1]}, n, to}.run();
        } else {
            Strip<Bits, Unit, 1, Panels>{c, x, row / row_block, panel, {weights[0], weights[1]}, n, to}.run();
        }
    }
}

template <int Bits, int Unit>
void tiles_of_piece(const QuantizedLinear& c, const QuantizedRows& x, const LinearPiece& piece, float* sums) {
    Tiles tiles(Unit == 32 ? 32 : 64);
    const int64_t last = (piece.last_out + quantized_panel - 1) / quantized_panel;
    for (int64_t panel = piece.first_out / quantized_panel; panel < last; panel += 2, sums += 2 * quantized_panel) {
        if (panel + 1 < last) {
            tiles_of_panels<Bits, Unit, 2>(c, x, piece, panel, sums);
        } else {
            tiles_of_panels<Bits, Unit, 1>(c, x, piece, panel, sums);
        }
    }
}

// Up to so many rows take less time without tiles: measured.
LLMCTL_INLINE int64_t rows_without_tiles(int32_t bits) { return bits == 4 ? 8 : 2; }

template <class I, class Element>
void quantized_tiles_piece(const QuantizedLinear& c, const QuantizedRows& x, const LinearPiece& piece) {
    if (piece.last_row - piece.first_row <= rows_without_tiles(c.bits)) {
        return quantized_linear_piece<I, Element, 8>(c, x, piece);
    }
    alignas(64) float sums[quantized_max_rows * linear_max_outs];
    if (c.bits == 4) {
        if (c.unit == 32) tiles_of_piece<4, 32>(c, x, piece, sums);
        if (c.unit == 64) tiles_of_piece<4, 64>(c, x, piece, sums);
        if (c.unit == 128) tiles_of_piece<4, 128>(c, x, piece, sums);
    } else {
        if (c.unit == 32) tiles_of_piece<8, 32>(c, x, piece, sums);
        if (c.unit == 64) tiles_of_piece<8, 64>(c, x, piece, sums);
        if (c.unit == 128) tiles_of_piece<8, 128>(c, x, piece, sums);
    }
    write_rows<I, Element>(c, piece, sums);
}

}  // namespace
}  // namespace llmctl
