// out = x weight^T + bias: what is multiplied, and the piece of it that a thread does at a time.
#pragma once

#include <cstdint>

namespace llmctl {

// x [n_rows, n_in], weight [n_out, n_in], bias [n_out] or null, out [n_rows, n_out]; strides count elements from row to
// row.
struct Linear {
    const void* x;
    const void* weight;
    const void* bias;
    void* out;
    int64_t n_rows, n_in, n_out;
    int64_t x_stride, weight_stride, out_stride;
};

// A stretch of rows and of outputs, none empty. Its sums lie in a thread's stack, its weights in the second-level
// cache.
struct LinearPiece {
    int64_t first_row, last_row, first_out, last_out;
};
constexpr int64_t linear_max_rows = 192, linear_max_outs = 64;

using LinearKernel = void (*)(const Linear&, const LinearPiece&);

// On a tile unit. First each block of tile_side rows of x is packed, then come pieces of the product.
struct TileProduct {
    void (*pack)(const Linear&, int64_t block, void* packed);
    void (*multiply)(const Linear&, const void* packed, const LinearPiece&);
};

// Of at most tile_side rows; of many; of many where x and the weights have changed places, though neither the outputs nor
// the bias have. All give the same bits. Many rows are packed into memory for an even number of blocks of n_in, filled
// up to a multiple of tile_step * tile_steps, columns of element_bytes each; their pieces have at most tiles_max_rows
// rows, the first row and output multiples of 2 * tile_side.
struct LinearTiles {
    TileProduct few, many, swapped;
    int64_t element_bytes;  // 0 where there is no such unit
};
constexpr int64_t tile_side = 16, tile_step = 32, tile_steps = 8, tiles_max_rows = 512;

// The whole product on the threads of the pool; dtype (LLMCTL_F32, LLMCTL_BF16) is that of all four. `high` lets floats be
// multiplied as the sums of two bfloat16 each where that is faster.
void run_linear(int32_t dtype, const Linear& call, bool high = false);

}  // namespace llmctl
