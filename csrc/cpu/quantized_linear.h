// The matrix product with weights in 4 or 8 bits: a tile's weights become floats in the first-level cache, once for all
// rows, and go the way of any others. So few rows and many give the same bits here too.
#pragma once

#include "cpu/linear_tile.h"
#include "cpu/quantized.h"

namespace llmctl {
namespace {

LLMCTL_INLINE float scale_of(const QuantizedLinear& c, int64_t group) {
    return c.scales_are_bf16 ? load(static_cast<const Bf16*>(c.scales)[group])
                             : static_cast<const float*>(c.scales)[group];
}

LLMCTL_INLINE float zero_of(const QuantizedLinear& c, int64_t group) {
    return c.zeros ? c.zeros[group] : static_cast<float>(1 << (c.bits - 1));
}

// Turns codes into elements; an instruction set may have a faster way to the same bits.
template <class S, class Element>
struct Dequantizer {
    // A run of weights of one group. In four bits a block of 64 has the first 32 in the lower halves of its bytes, the
    // others in the upper.
    static LLMCTL_INLINE void run(int bits, const uint8_t* codes, int64_t i, float scale, float zero, Element* to) {
        const auto scales = S::all(scale), zeros = S::all(zero);
        const uint8_t* from = bits == 8 ? codes + i : codes + i / 64 * 32;
        for (int lane = 0; lane < quantized_run; lane += S::lanes) {
            const auto code = bits == 8     ? S::load_bytes(from + lane)
                              : i % 64 != 0 ? S::load_upper(from + lane)
                                            : S::load_lower(from + lane);
            S::store(to + i + lane, S::mul(S::sub(code, zeros), scales));
        }
    }

    // The weights from `begin` to `end`, all of one group; begin is a multiple of 32, and up to 31 behind end are
    // written.
    static LLMCTL_INLINE void group(int bits, const uint8_t* codes, int64_t begin, int64_t end, float scale, float zero,
                                    Element* to) {
        for (int64_t i = begin; i < end; i += quantized_run) run(bits, codes, i, scale, zero, to);
    }
};

// The weights [k, k + n) of one output as elements; k is a multiple of 64.
template <class S, class Element>
LLMCTL_INLINE void dequantize(const QuantizedLinear& c, int64_t out, int64_t k, int64_t n, Element* to) {
    const uint8_t* codes = c.codes + out * c.row_bytes + k * c.bits / 8;
    // what this place of the next tile has will be needed soon
    for (int64_t i = 0; i < n * c.bits / 8; i += 64) S::prefetch(codes + outs_per_tile * c.row_bytes + i);
    int64_t group = k / c.group_size, end = (group + 1) * c.group_size - k;
    for (int64_t begin = 0; begin < n; begin = end, end += c.group_size, ++group) {
        const int64_t at = out * c.n_groups + group;
        Dequantizer<S, Element>::group(c.bits, codes, begin, end < n ? end : n, scale_of(c, at), zero_of(c, at), to);
    }
}

template <class Dot, int Rows>
LLMCTL_INLINE void linear_tile_of(int64_t n_rows, const typename Dot::Element* x, int64_t x_stride,
                                  const typename Dot::Element* const w[outs_per_tile], int64_t n, bool more,
                                  float* sums) {
    if constexpr (Rows > 1) {
        if (n_rows < Rows) return linear_tile_of<Dot, Rows - 1>(n_rows, x, x_stride, w, n, more, sums);
    }
    linear_tile<Dot, Rows, false>(x, x_stride, w, n, 0, more, sums, linear_max_outs);
}

template <class Dot, int MaxRows>
void quantized_linear_piece(const QuantizedLinear& c, const LinearPiece& piece) {
    using Element = typename Dot::Element;
    using S = typename Dot::Simd;
    constexpr int64_t block = block_length<Element>;
    const int64_t n_rows = piece.last_row - piece.first_row;
    const Element* x = static_cast<const Element*>(c.linear.x) + piece.first_row * c.linear.x_stride;
    alignas(64) float sums[linear_max_rows * linear_max_outs];
    alignas(64) Element panel[outs_per_tile][block];
    if (c.linear.n_in == 0) __builtin_memset(sums, 0, sizeof sums);
    for (int64_t out = piece.first_out; out < piece.last_out; out += outs_per_tile) {
        for (int64_t k = 0; k < c.linear.n_in; k += block) {
            const int64_t n = c.linear.n_in - k < block ? c.linear.n_in - k : block;
            const Element* w[outs_per_tile];
            for (int o = 0; o < outs_per_tile; ++o) {
                w[o] = panel[o];
                if (out + o < piece.last_out) dequantize<S>(c, out + o, k, n, panel[o]);
                if (out + o >= piece.last_out) w[o] = panel[0];  // sums that nobody reads
            }
            for (int64_t r = 0; r < n_rows; r += MaxRows) {
                linear_tile_of<Dot, MaxRows>(n_rows - r, x + r * c.linear.x_stride + k, c.linear.x_stride, w, n, k > 0,
                                             sums + r * linear_max_outs + (out - piece.first_out));
            }
        }
    }
    for (int64_t r = 0; r < n_rows; ++r) {
        write_row<S, Element>(c.linear, piece, piece.first_row + r, sums + r * linear_max_outs);
    }
}

}  // namespace
}  // namespace llmctl
