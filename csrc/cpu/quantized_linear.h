// The matrix product with weights in 4 or 8 bits. Codes times codes add up in whole numbers, which no order of additions
// changes; a unit's sum becomes a float, is scaled and added to the block's, and blocks add up one after another. Few
// rows and many, with and without tiles, hence give the same bits.
#pragma once

#include "cpu/linear_tile.h"
#include "cpu/quantized.h"

namespace llmctl {
namespace {

// How far ahead of their use weights are fetched: the processor's own prefetching stops where a page of 4 KB ends.
constexpr int64_t prefetch_bytes = 2048;

// 16 scales of a unit, or as many as a vector has lanes.
template <class I>
LLMCTL_INLINE typename I::Simd::Vec load_scales(const QuantizedLinear& c, int64_t at) {
    if (c.scales_dtype == LLMCTL_F32) return I::Simd::load(static_cast<const float*>(c.scales) + at);
    if (c.scales_dtype == LLMCTL_BF16) return I::Simd::load(static_cast<const Bf16*>(c.scales) + at);
    return I::load_halves(static_cast<const uint16_t*>(c.scales) + at);
}

// What the sum of a unit begins with: minus the zero times the sum of the row's codes.
template <class I, int Bits>
LLMCTL_INLINE typename I::Vec minus_zeros(const QuantizedLinear& c, int64_t at, int32_t minus_sum) {
    // unsigned: behind the last row there is no telling how large it is
    if (c.zeros == nullptr) return I::all(static_cast<int32_t>(static_cast<uint32_t>(minus_sum) << (Bits - 1)));
    return I::mul(I::load_bytes(c.zeros + at), I::all(minus_sum));
}

// Sums of `Rows` rows over a run of 32 weights of I::lanes outputs; codes of a row are 64 bytes behind those before it.
template <class I, int Bits, int Rows>
LLMCTL_INLINE void add_run(const uint8_t* weights, const int8_t* x, typename I::Vec sums[Rows][2]) {
    constexpr int quads = 8;
#pragma GCC unroll 8
    for (int q = 0; q < (Bits == 8 ? quads : quads / 2); ++q) {
        const auto codes = I::load_codes(weights + q * 64);
        __builtin_prefetch(weights + q * 64 + prefetch_bytes);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
            const int8_t* row = x + r * 64 + q * 4;
            if constexpr (Bits == 8) {
                sums[r][q % 2] = I::template dot<8>(sums[r][q % 2], codes, row);
            } else {
                sums[r][0] = I::template dot<4>(sums[r][0], I::low(codes), row);
                sums[r][1] = I::template dot<4>(sums[r][1], I::high(codes), row + quads / 2 * 4);
            }
        }
    }
}

// `Rows` rows from `row` on, all of one row block, times I::lanes outputs of a panel, from `part` on: over one block.
template <class I, int Bits, int Rows>
LLMCTL_INLINE void block_sums(const QuantizedLinear& c, const QuantizedRows& x, int64_t row, int64_t panel, int64_t part,
                              int64_t block, typename I::Simd::Vec total[Rows]) {
    using S = typename I::Simd;
    const int64_t rows = row / row_block, in_block = row % row_block;
    const int64_t run_bytes = quantized_run * quantized_panel * Bits / 8;
    const uint8_t* weights = c.codes + panel * c.panel_bytes() + block * 4 * run_bytes + part * 4;
    const int8_t* codes = x.tiles(rows, block) + in_block * 64;
    const int64_t runs = c.unit / quantized_run;
    const int32_t* minus_sums = x.sums_of(rows, block) + in_block;
    int64_t at = c.unit_at(panel, block) + part;
    for (int r = 0; r < Rows; ++r) total[r] = S::zero();
    for (int64_t run = 0; run < 4; at += quantized_panel, minus_sums += row_block) {
        typename I::Vec sums[Rows][2];
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
            sums[r][0] = I::all(0);
            sums[r][1] = minus_zeros<I, Bits>(c, at, minus_sums[r]);
        }
        for (int64_t last = run + runs; run < last; ++run) {
            add_run<I, Bits, Rows>(weights + run * run_bytes, codes + run / 2 * tile_bytes + run % 2 * 32, sums);
        }
        const auto scales = load_scales<I>(c, at);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
            const auto sum = I::to_float(I::add(sums[r][0], sums[r][1]));
            total[r] = S::fma(sum, scales, total[r]);
        }
    }
}

template <class I, int Bits, int Rows>
void panel_sums(const QuantizedLinear& c, const QuantizedRows& x, int64_t row, int64_t panel, float* to) {
    using S = typename I::Simd;
    constexpr int parts = quantized_panel / I::lanes;
    typename S::Vec sums[Rows][parts];
    for (auto& of_row : sums) {
        for (auto& part : of_row) part = S::zero();
    }
    for (int64_t block = 0; block < c.n_blocks; ++block) {
        const float* scales = x.scales_of(row / row_block, block) + row % row_block;
#pragma GCC unroll 4
        for (int part = 0; part < parts; ++part) {
            typename S::Vec total[Rows];
            block_sums<I, Bits, Rows>(c, x, row, panel, part * I::lanes, block, total);
#pragma GCC unroll 8
            for (int r = 0; r < Rows; ++r) sums[r][part] = S::fma(total[r], S::all(scales[r]), sums[r][part]);
        }
    }
    for (int r = 0; r < Rows; ++r) {
        for (int part = 0; part < parts; ++part) S::store(to + r * linear_max_outs + part * I::lanes, sums[r][part]);
    }
}

template <class I, int Bits, int Rows>
LLMCTL_INLINE void panel_sums_of(int64_t n_rows, const QuantizedLinear& c, const QuantizedRows& x, int64_t row,
                                 int64_t panel, float* to) {
    if constexpr (Rows > 1) {
        if (n_rows < Rows) return panel_sums_of<I, Bits, Rows - 1>(n_rows, c, x, row, panel, to);
    }
    panel_sums<I, Bits, Rows>(c, x, row, panel, to);
}

template <class I, class Element>
LLMCTL_INLINE void write_rows(const QuantizedLinear& c, const LinearPiece& piece, const float* sums) {
    for (int64_t row = piece.first_row; row < piece.last_row; ++row, sums += linear_max_outs) {
        write_row<typename I::Simd, Element>(c.linear, piece, row, sums);
    }
}

// The piece in steps of at most MaxRows rows, a divisor of 16.
template <class I, class Element, int MaxRows>
void quantized_linear_piece(const QuantizedLinear& c, const QuantizedRows& x, const LinearPiece& piece) {
    alignas(64) float sums[quantized_max_rows * linear_max_outs];
    for (int64_t out = piece.first_out; out < piece.last_out; out += quantized_panel) {
        for (int64_t row = piece.first_row; row < piece.last_row; row += MaxRows) {
            const int64_t left = piece.last_row - row, panel = out / quantized_panel;
            float* to = sums + (row - piece.first_row) * linear_max_outs + (out - piece.first_out);
            if (c.bits == 4) panel_sums_of<I, 4, MaxRows>(left, c, x, row, panel, to);
            if (c.bits == 8) panel_sums_of<I, 8, MaxRows>(left, c, x, row, panel, to);
        }
    }
    write_rows<I, Element>(c, piece, sums);
}

}  // namespace
}  // namespace llmctl
