// The matrix product with weights in few bits on AMX tiles, for many rows: the same whole numbers as with few, and the same
// steps in floats after them.
//
// The tile unit works by itself, so while it multiplies one strip the vector unit scales and adds up the one before.
#pragma once

#include "cpu/piece_scratch.h"
#include "cpu/quantized_linear.h"
#include "cpu/simd/amx.h"
#include "cpu/simd/int_avx512_vnni.h"

namespace llmctl {
namespace {

constexpr int64_t chunk_rows = 64, chunk_panels = 4;  // a block of both and their sums stay in the first-level cache

// A tile of results of 16 rows and 16 outputs.
template <class Number>
struct alignas(64) ResultTile {
    Number at[row_block * quantized_panel];
};

// The products of two tiles of rows and two panels of weights for one block.
template <int Units>
struct TileSums {
    ResultTile<int32_t> sum[Units][2][2];  // unit, rows, panel
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

// Up to 64 rows times up to 4 panels, over all blocks.
//
// Strips of a block, each of two tiles of rows times two panels, follow each other.
template <int Bits, int Unit>
struct Chunk {
    static constexpr int units = quantized_block / Unit, steps = Unit == 128 ? 2 : 1;

    const QuantizedLinear& c;
    const QuantizedRows& x;
    const int8_t* weights;  // of the first panel
    int64_t weights_stride;  // from panel to panel
    int64_t row, n_rows;
    int64_t panel, n_panels;
    ResultTile<float>* sums;  // [chunk_rows / row_block, chunk_panels]

    struct Strip {
        int64_t block;
        int rows, panel;    // its first row block and panel, from the chunk's
        int tiles, panels;  // 1 or 2
    };

    // What it takes to scale and add up the products of a strip: whatever a processor would otherwise work out again for
    // every few rows. Behind the last row and panel everything is done as well, for nobody.
    struct Results {
        const TileSums<units>& from;
        ResultTile<float>* to;
        const float* row_scales[2];
        const int32_t* minus_sums[2];
        int64_t units_at, panel_units;
        __m512 scales[2][units];

        LLMCTL_INLINE Results(const Chunk& chunk, const Strip& strip, const TileSums<units>& from)
            : from(from), to(chunk.sums + strip.rows * chunk_panels + strip.panel) {
            const QuantizedLinear& c = chunk.c;
            const int64_t rows = chunk.row / row_block + strip.rows, second = strip.tiles == 2 ? 1 : 0;
            row_scales[0] = chunk.x.scales_of(rows, strip.block);
            row_scales[1] = chunk.x.scales_of(rows + second, strip.block);
            for (int i = 0; i < 2; ++i) {
                minus_sums[i] = chunk.x.minus_sums + ((rows + i * second) * c.n_blocks + strip.block) * units * row_block;
            }
            units_at = ((chunk.panel + strip.panel) * c.n_blocks + strip.block) * units * quantized_panel;
            panel_units = strip.panels == 2 ? c.n_blocks * units : 0;
#pragma GCC unroll 8
            for (int i = 0; i < 2 * units; ++i) {
                const int64_t at = units_at + (i / units * panel_units + i % units) * quantized_panel;
                scales[i / units][i % units] = load_scales<Avx512Int>(c, at);
            }
        }

        // The `quarter` of the rows of one 16 x 16.
        LLMCTL_INLINE void add_up(const QuantizedLinear& c, int of_rows, int of_panel, int quarter) const {
            float* sums = to[of_rows * chunk_panels + of_panel].at;
#pragma GCC unroll 4
            for (int r = 4 * quarter; r < 4 * quarter + 4; ++r) {
                __m512 total = _mm512_setzero_ps();
#pragma GCC unroll 4
                for (int unit = 0; unit < units; ++unit) {
                    __m512i sum = _mm512_load_si512(from.sum[unit][of_rows][of_panel].at + r * 16);
                    if constexpr (Bits == 8) {
                        const int64_t at = units_at + (of_panel * panel_units + unit) * quantized_panel;
                        const int32_t minus_sum = minus_sums[of_rows][unit * row_block + r];
                        sum = _mm512_add_epi32(sum, minus_zeros<Avx512Int, 8>(c, at, minus_sum));
                    }
                    total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scales[of_panel][unit], total);
                }
                const __m512 before = _mm512_load_ps(sums + r * 16);
                _mm512_store_ps(sums + r * 16, _mm512_fmadd_ps(total, _mm512_set1_ps(row_scales[of_rows][r]), before));
            }
        }

        // A strip has at most 4 results of 16 x 16, a quarter of which is added up at a time: so many in each of the 8
        // turns that a unit of the next strip gives.
        LLMCTL_INLINE void add_up_share(const QuantizedLinear& c, int unit, int turn) const {
            constexpr int quarters = 4 * 2 * 2, turns = 8 * units;
            const int at = unit * 8 + turn;
#pragma GCC unroll 2
            for (int i = at * quarters / turns; i < (at + 1) * quarters / turns; ++i) {
                add_up(c, i / 4 / 2, i / 4 % 2, i % 4);
            }
        }
    };

    // Multiplies a strip. The results of the one before it are added up meanwhile, a few rows after each operation on tiles:
    // a processor does not look so far ahead that it would find them by itself.
    template <int Tiles, int Panels>
    void step(const Strip& strip, TileSums<units>& to, const Strip& before, const TileSums<units>& from) const {
        const Results results(*this, before, from);
        const int8_t* tiles = x.tiles(row / row_block + strip.rows, strip.block);
        const int64_t second = x.tiles(1, 0) - x.tiles(0, 0);
        const int8_t* panels = weights + strip.panel * weights_stride + strip.block * quantized_block * quantized_panel;
        const int64_t next_panel = weights_stride;
#pragma GCC unroll 4
        for (int unit = 0; unit < units; ++unit) {
            const auto add = [&](int turn) LLMCTL_INLINED { results.add_up_share(c, unit, turn); };
            tile_zero<0>();
            if constexpr (Panels == 2) tile_zero<1>();
            if constexpr (Tiles == 2) tile_zero<2>();
            if constexpr (Tiles == 2 && Panels == 2) tile_zero<3>();
#pragma GCC unroll 2
            for (int step = 0; step < steps; ++step) {
                const int64_t k = unit * Unit + step * 64;
                const int8_t* codes = tiles + k / 64 * tile_bytes + k % 64;
                const bool is_last = step == steps - 1;
                tile_load<4>(codes, 64);
                tile_load<6>(panels + k * quantized_panel, 64);
                dot<0, 4, 6>();
                if (is_last) add(0);
                if constexpr (Panels == 2) {
                    tile_load<7>(panels + next_panel + k * quantized_panel, 64);
                    dot<1, 4, 7>();
                }
                if (is_last) add(1);
                if constexpr (Tiles == 2) {
                    tile_load<5>(codes + second, 64);
                    dot<2, 5, 6>();
                }
                if (is_last) add(2);
                if constexpr (Tiles == 2 && Panels == 2) dot<3, 5, 7>();
                if (is_last) add(3);
            }
            tile_store<0>(to.sum[unit][0][0].at, 64);
            add(4);
            if constexpr (Panels == 2) tile_store<1>(to.sum[unit][0][1].at, 64);
            add(5);
            if constexpr (Tiles == 2) tile_store<2>(to.sum[unit][1][0].at, 64);
            add(6);
            if constexpr (Tiles == 2 && Panels == 2) tile_store<3>(to.sum[unit][1][1].at, 64);
            add(7);
        }
    }

    template <int C, int A, int B>
    static LLMCTL_INLINE void dot() {
        if constexpr (Bits == 4) tile_dot_signed<C, A, B>();
        if constexpr (Bits == 8) tile_dot_unsigned<C, A, B>();
    }

    // Strips of two tiles and two panels as far as there are so many.
    void run() const {
        TileSums<units> buffers[2];
        int turn = 0;
        Strip before{0, 0, 0, 1, 1};
        const int n_row_blocks = static_cast<int>((n_rows + row_block - 1) / row_block);
        for (int64_t block = 0; block < c.n_blocks; ++block) {
            for (int rows = 0; rows < n_row_blocks; rows += 2) {
                for (int at = 0; at < n_panels; at += 2, turn ^= 1) {
                    const int tiles = n_row_blocks - rows > 1 ? 2 : 1, panels = n_panels - at > 1 ? 2 : 1;
                    const Strip strip{block, rows, at, tiles, panels};
                    TileSums<units>&to = buffers[turn], &from = buffers[turn ^ 1];
                    if (tiles == 2 && panels == 2) step<2, 2>(strip, to, before, from);
                    if (tiles == 2 && panels == 1) step<2, 1>(strip, to, before, from);
                    if (tiles == 1 && panels == 2) step<1, 2>(strip, to, before, from);
                    if (tiles == 1 && panels == 1) step<1, 1>(strip, to, before, from);
                    // there was none before the first: what it added up is forgotten
                    if (block == 0 && rows == 0 && at == 0) clear();
                    before = strip;
                }
            }
        }
        if (c.n_blocks == 0) return clear();
        const Results results(*this, before, buffers[turn ^ 1]);
#pragma GCC unroll 4
        for (int unit = 0; unit < units; ++unit) {
#pragma GCC unroll 8
            for (int turn = 0; turn < 8; ++turn) results.add_up_share(c, unit, turn);
        }
    }

    void clear() const {
        __builtin_memset(static_cast<void*>(sums), 0, chunk_rows / row_block * chunk_panels * sizeof *sums);
    }
};

// The sums of a chunk, with the bias, to where they belong.
template <class I, class Element>
LLMCTL_INLINE void write_chunk(const QuantizedLinear& c, const LinearPiece& piece, const ResultTile<float>* sums) {
    alignas(64) float of_row[chunk_panels * quantized_panel];
    for (int64_t row = piece.first_row, i = 0; row < piece.last_row; ++row, ++i) {
        for (int64_t p = 0; p < chunk_panels; ++p) {
            const float* from = sums[i / row_block * chunk_panels + p].at + i % row_block * quantized_panel;
            _mm512_store_ps(of_row + p * quantized_panel, _mm512_load_ps(from));
        }
        write_row<typename I::Simd, Element>(c.linear, piece, row, of_row);
    }
}

template <class I, class Element, int Bits, int Unit>
void tiles_of_piece(const QuantizedLinear& c, const QuantizedRows& x, const LinearPiece& piece) {
    Tiles tiles(Unit == 32 ? 32 : 64);
    const int64_t panel = piece.first_out / quantized_panel;
    const int64_t n_panels = (piece.last_out + quantized_panel - 1) / quantized_panel - panel;
    const auto* weights = reinterpret_cast<const int8_t*>(c.codes) + panel * c.panel_bytes();
    int64_t stride = c.panel_bytes();
    if constexpr (Bits == 4) {
        stride = c.n_blocks * quantized_block * quantized_panel;
        auto* memory = reinterpret_cast<int8_t*>(piece_scratch(n_panels * stride));
        for (int64_t p = 0; p < n_panels; ++p) {
            for (int64_t block = 0; block < c.n_blocks; ++block) {
                unpack_block(c, panel + p, block, memory + p * stride + block * quantized_block * quantized_panel);
            }
        }
        weights = memory;
    }
    ResultTile<float> sums[chunk_rows / row_block * chunk_panels];
    for (int64_t row = piece.first_row; row < piece.last_row; row += chunk_rows) {
        const int64_t left = piece.last_row - row, n = left < chunk_rows ? left : chunk_rows;
        Chunk<Bits, Unit>{c, x, weights, stride, row, n, panel, n_panels, sums}.run();
        write_chunk<I, Element>(c, {row, row + n, piece.first_out, piece.last_out}, sums);
    }
}

// Up to so many rows take less time without tiles: measured.
constexpr int64_t rows_without_tiles = 8;

template <class I, class Element>
void quantized_tiles_piece(const QuantizedLinear& c, const QuantizedRows& x, const LinearPiece& piece) {
    if (piece.last_row - piece.first_row <= rows_without_tiles) {
        return quantized_linear_piece<I, Element, 8>(c, x, piece);
    }
    if (c.bits == 4) {
        if (c.unit == 32) tiles_of_piece<I, Element, 4, 32>(c, x, piece);
        if (c.unit == 64) tiles_of_piece<I, Element, 4, 64>(c, x, piece);
        if (c.unit == 128) tiles_of_piece<I, Element, 4, 128>(c, x, piece);
    } else {
        if (c.unit == 32) tiles_of_piece<I, Element, 8, 32>(c, x, piece);
        if (c.unit == 64) tiles_of_piece<I, Element, 8, 64>(c, x, piece);
        if (c.unit == 128) tiles_of_piece<I, Element, 8, 128>(c, x, piece);
    }
}

}  // namespace
}  // namespace llmctl
