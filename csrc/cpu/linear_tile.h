// A matrix product whose every element is summed in one order, whatever is computed beside it.
//
// Both operands lie row by row along the summed dimension, so a tile of rows times outputs is a set of dot products in
// registers: lane i of a sum takes the elements i, i + step, ... of one block of the summed dimension; then the lanes
// are added up, and the blocks one after another. Tiles of any size, down to one row, do just this for each element.
#pragma once

#include "cpu/linear.h"
#include "cpu/simd/dot.h"

namespace llmctl {
namespace {

constexpr int outs_per_tile = 4;
// One block of a tile's rows and weights stays in the first-level cache.
template <class Element>
constexpr int64_t block_length = 4096 / sizeof(Element);

// acc += products of `Rows` rows of x and four of weight, which `load` takes from their addresses.
template <class Dot, int Rows, bool Prefetch, class Load>
LLMCTL_INLINE void multiply_step(typename Dot::Simd::Vec acc[Rows][outs_per_tile], const typename Dot::Element* x,
                                 int64_t x_stride, const typename Dot::Element* const w[outs_per_tile], int64_t k,
                                 int64_t ahead, const Load& load) {
    typename Dot::Operand ws[outs_per_tile];
#pragma GCC unroll 8
    for (int o = 0; o < outs_per_tile; ++o) {
        ws[o] = load(w[o] + k);
        if constexpr (Prefetch) Dot::Simd::prefetch(w[o] + k + ahead);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
        const typename Dot::Operand xs = load(x + r * x_stride + k);
#pragma GCC unroll 8
        for (int o = 0; o < outs_per_tile; ++o) acc[r][o] = Dot::multiply_add(xs, ws[o], acc[r][o]);
    }
}

// sums[r][o] becomes, or if `more` grows by, the product of row r of x and row o of w over n elements.
template <class Dot, int Rows, bool Prefetch>
void linear_tile(const typename Dot::Element* x, int64_t x_stride, const typename Dot::Element* const w[outs_per_tile],
                 int64_t n, int64_t ahead, bool more, float* sums, int64_t sums_stride) {
    using S = typename Dot::Simd;
    using Pointer = const typename Dot::Element*;
    typename S::Vec acc[Rows][outs_per_tile];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
        for (int o = 0; o < outs_per_tile; ++o) acc[r][o] = S::zero();
    }
    int64_t k = 0;
    for (; k + Dot::step <= n; k += Dot::step) {
        const auto load = [](Pointer p) LLMCTL_INLINED { return Dot::load(p); };
        multiply_step<Dot, Rows, Prefetch>(acc, x, x_stride, w, k, ahead, load);
    }
    if (const int left = static_cast<int>(n - k)) {
        const auto load = [left](Pointer p) LLMCTL_INLINED { return Dot::load_some(p, left); };
        multiply_step<Dot, Rows, Prefetch>(acc, x, x_stride, w, k, ahead, load);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
        float block[outs_per_tile];
        S::sums(acc[r], block);
        float* to = sums + r * sums_stride;
        for (int o = 0; o < outs_per_tile; ++o) to[o] = more ? to[o] + block[o] : block[o];
    }
}

// `Rows` rows times a stretch of outputs, over the block of the summed dimension that begins at k.
template <class Dot, int Rows>
void linear_block(const Linear& c, int64_t row, int64_t k, int64_t first_out, int64_t last_out, int64_t outs_ahead,
                  float* sums, int64_t sums_stride) {
    using Element = typename Dot::Element;
    const Element* x = static_cast<const Element*>(c.x) + row * c.x_stride + k;
    const Element* weight = static_cast<const Element*>(c.weight) + k;
    const int64_t n = c.n_in - k < block_length<Element> ? c.n_in - k : block_length<Element>;
    const auto tile = outs_ahead ? linear_tile<Dot, Rows, true> : linear_tile<Dot, Rows, false>;
    for (int64_t out = first_out; out < last_out; out += outs_per_tile, sums += outs_per_tile) {
        const Element* w[outs_per_tile];  // behind the last output the last one again, whose sums nobody reads
        for (int o = 0; o < outs_per_tile; ++o) {
            w[o] = weight + (out + o < last_out ? out + o : last_out - 1) * c.weight_stride;
        }
        tile(x, c.x_stride, w, n, outs_ahead * c.weight_stride, k > 0, sums, sums_stride);
    }
}

template <class Dot, int Rows>
LLMCTL_INLINE void linear_block_of(int64_t n_rows, const Linear& c, int64_t row, int64_t k, int64_t first_out,
                                   int64_t last_out, int64_t outs_ahead, float* sums, int64_t sums_stride) {
    if constexpr (Rows > 1) {
        if (n_rows < Rows) {
            return linear_block_of<Dot, Rows - 1>(n_rows, c, row, k, first_out, last_out, outs_ahead, sums,
                                                  sums_stride);
        }
    }
    linear_block<Dot, Rows>(c, row, k, first_out, last_out, outs_ahead, sums, sums_stride);
}

// One row of sums, with the bias, to where it belongs.
template <class S, class Element>
LLMCTL_INLINE void write_row(const Linear& c, const LinearPiece& piece, int64_t row, const float* sums) {
    Element* out = static_cast<Element*>(c.out) + row * c.out_stride + piece.first_out;
    const Element* bias = c.bias ? static_cast<const Element*>(c.bias) + piece.first_out : nullptr;
    const int64_t n = piece.last_out - piece.first_out;
    int64_t i = 0;
    for (; i + S::lanes <= n; i += S::lanes) {
        const auto value = S::load(sums + i);
        S::store(out + i, bias ? S::add(value, S::load(bias + i)) : value);
    }
    if (const int left = static_cast<int>(n - i)) {
        const auto value = S::load_some(sums + i, left);
        S::store_some(out + i, bias ? S::add(value, S::load_some(bias + i, left)) : value, left);
    }
}

template <class Dot, int MaxRows>
void linear_piece(const Linear& c, const LinearPiece& piece) {
    constexpr int64_t block = block_length<typename Dot::Element>;
    const int64_t n_rows = piece.last_row - piece.first_row;
    alignas(64) float sums[linear_max_rows * linear_max_outs];
    if (c.n_in == 0) std::memset(sums, 0, sizeof sums);
    if (n_rows <= MaxRows) {  // the weights are read once: in the order of their addresses
        for (int64_t out = piece.first_out; out < piece.last_out; out += outs_per_tile) {
            const int64_t last = out + outs_per_tile < piece.last_out ? out + outs_per_tile : piece.last_out;
            for (int64_t k = 0; k < c.n_in; k += block) {
                linear_block_of<Dot, MaxRows>(n_rows, c, piece.first_row, k, out, last, outs_per_tile,
                                              sums + (out - piece.first_out), linear_max_outs);
            }
        }
    } else {
        for (int64_t k = 0; k < c.n_in; k += block) {
            for (int64_t r = 0; r < n_rows; r += MaxRows) {
                linear_block_of<Dot, MaxRows>(n_rows - r, c, piece.first_row + r, k, piece.first_out, piece.last_out,
                                              r == 0 ? outs_per_tile : 0, sums + r * linear_max_outs, linear_max_outs);
            }
        }
    }
    for (int64_t r = 0; r < n_rows; ++r) {
        write_row<typename Dot::Simd, typename Dot::Element>(c, piece, piece.first_row + r, sums + r * linear_max_outs);
    }
}

}  // namespace
}  // namespace llmctl
