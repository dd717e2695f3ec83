// A matrix product with weights in few bits, and the form in which its kernels take the other operand.
#pragma once

#include <cstdint>

#include "cpu/linear.h"
#include "llmctl.h"

namespace llmctl {

constexpr int64_t quantized_panel = 16;   // outputs whose weights lie side by side
constexpr int64_t quantized_block = 128;  // elements of a row that share a scale, and so a rounding
constexpr int64_t quantized_run = 32;     // weights of one output in a row that share a scale at least
constexpr int64_t row_block = 16;         // rows whose codes lie side by side
constexpr int64_t tile_bytes = 1024;      // row_block times 64 codes

// weight [o, k] is (code - zero) * scale of its unit; `linear` has no weights.
struct QuantizedLinear {
    Linear linear;
    int32_t bits, scales_dtype;
    const uint8_t* codes;  // the layout is that of llmctl_quantized_weight
    const void* scales;
    const uint8_t* zeros;
    int64_t unit, n_blocks;

    int64_t units() const { return quantized_block / unit; }
    int64_t panel_bytes() const { return n_blocks * quantized_block * quantized_panel * bits / 8; }
    // where the scales and zeros of a block of a panel begin
    int64_t unit_at(int64_t panel, int64_t block) const { return (panel * n_blocks + block) * units() * quantized_panel; }
};

// Rows of x in whole numbers of 8 bits: x = scale * code, with one scale for each block of a row.
struct QuantizedRows {
    int8_t* codes;        // [row blocks, blocks, 2 halves of a block, 16 rows, 64]
    float* scales;        // [row blocks, blocks, 16]; NaN where the block has NaN or infinity
    int32_t* minus_sums;  // [row blocks, blocks, units, 16]: of the codes of a unit
    int64_t n_blocks, unit;

    int8_t* tiles(int64_t rows, int64_t block) const { return codes + (rows * n_blocks + block) * 2 * tile_bytes; }
    float* scales_of(int64_t rows, int64_t block) const { return scales + (rows * n_blocks + block) * row_block; }
    int32_t* sums_of(int64_t rows, int64_t block) const {
        return minus_sums + (rows * n_blocks + block) * (quantized_block / unit) * row_block;
    }
};

// Row `row` of x [n_in] into its place.
using QuantizeRowKernel = void (*)(const void* x, int64_t n_in, const QuantizedRows& to, int64_t row);

// A piece of at most quantized_max_rows rows and linear_max_outs outputs, the first of both a multiple of 16; rows of x
// and of the codes count from 0.
using QuantizedLinearKernel = void (*)(const QuantizedLinear&, const QuantizedRows&, const LinearPiece&);
constexpr int64_t quantized_max_rows = 512;

// The product that `linear`, whose weight is not looked at, and these weights make; throws std::invalid_argument where
// they do not fit.
QuantizedLinear quantized_linear_of(const llmctl_quantized_weight& weight, const Linear& linear);

// The whole product on the threads of the pool.
void run_quantized_linear(int32_t dtype, const QuantizedLinear& call);

}  // namespace llmctl
