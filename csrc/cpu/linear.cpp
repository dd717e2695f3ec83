// The C face of the matrix product: checks, and pieces for the threads.
#include <algorithm>

#include "boundary.h"
#include "cpu/dtype.h"
#include "cpu/kernels.h"
#include "cpu/linear_pieces.h"
#include "cpu/pool.h"
#include "cpu/scratch.h"
#include "llmctl.h"

namespace llmctl {
namespace {

constexpr int64_t weight_bytes_per_piece = 128 << 10;  // of few rows: enough to be worth a thread's while
constexpr int64_t work_per_piece = 1 << 16;            // multiplications that are
constexpr int64_t packed_weight_bytes = 8 << 20;       // that threads share: of a cache of theirs

int64_t pieces(int64_t total, int64_t size) { return (total + size - 1) / size; }

// Outputs per piece: a multiple of the vector and of the tile.
int64_t outs_per_piece(const Linear& c, int64_t weight_bits) {
    if (c.n_rows > 16) return linear_max_outs;
    const int64_t cached = 8 * weight_bytes_per_piece / std::max<int64_t>(1, c.n_in * weight_bits);
    const int64_t worthwhile = work_per_piece / std::max<int64_t>(1, c.n_in * c.n_rows);
    return std::clamp<int64_t>(std::max(cached, worthwhile) / 16 * 16, 16, linear_max_outs);
}

}  // namespace

void for_linear_pieces(const Linear& c, int64_t weight_bits, const std::function<void(const LinearPiece&)>& work) {
    if (c.n_rows == 0 || c.n_out == 0) return;
    const int64_t outs = outs_per_piece(c, weight_bits);
    const int64_t row_pieces = pieces(c.n_rows, linear_max_rows);
    const int64_t rows = (pieces(c.n_rows, row_pieces) + 5) / 6 * 6;
    parallel_for(row_pieces * pieces(c.n_out, outs), [&](int64_t i) {
        const int64_t row = i % row_pieces * rows, out = i / row_pieces * outs;
        if (row >= c.n_rows) return;
        work({row, std::min(row + rows, c.n_rows), out, std::min(out + outs, c.n_out)});
    });
}

namespace {

// Outputs per piece: as many as let a thread's weights and rows stay in the second-level cache, and a few for each thread.
int64_t tile_outs(const Linear& c) {
    const int64_t shares = 3 * threads();
    if (c.n_rows > tile_side) return std::clamp<int64_t>(c.n_out / shares / 32 * 32, 32, 128);
    const int64_t worthwhile = work_per_piece / std::max<int64_t>(1, c.n_in * c.n_rows) / 16 * 16;
    return std::max<int64_t>(16, worthwhile);
}

void run_on_tiles(const TileProduct& kernel, const Linear& c, int64_t element_bytes) {
    thread_local Scratch memory;
    constexpr int64_t stretch = tile_step * tile_steps;
    const int64_t blocks = pieces(c.n_rows, tile_side);
    char* packed = memory.room(pieces(blocks, 2) * 2 * tile_side * pieces(c.n_in, stretch) * stretch * element_bytes);
    parallel_for(blocks, [&](int64_t i) { kernel.pack(c, i, packed); });
    const int64_t outs = tile_outs(c), out_pieces = pieces(c.n_out, outs);
    parallel_for(pieces(c.n_rows, tiles_max_rows) * out_pieces, [&](int64_t i) {
        const int64_t row = i / out_pieces * tiles_max_rows, out = i % out_pieces * outs;
        kernel.multiply(c, packed, {row, std::min(row + tiles_max_rows, c.n_rows), out, std::min(out + outs, c.n_out)});
    });
}

// Weights are packed, some at a time, and rows of x taken as they lie: so are those of the outputs then.
void run_swapped(const LinearTiles& tiles, const Linear& c) {
    const int64_t size = tiles.element_bytes, row_bytes = std::max<int64_t>(1, c.n_in * size);
    const int64_t at_once = std::max(packed_weight_bytes / row_bytes / tiles_max_rows, int64_t{1}) * tiles_max_rows;
    for (int64_t out = 0; out < c.n_out; out += at_once) {
        const auto* weight = static_cast<const char*>(c.weight) + out * c.weight_stride * size;
        const auto* bias = c.bias ? static_cast<const char*>(c.bias) + out * size : nullptr;
        auto* to = static_cast<char*>(c.out) + out * size;
        run_on_tiles(tiles.swapped,
                     {weight, c.x, bias, to, std::min(at_once, c.n_out - out), c.n_in, c.n_rows, c.weight_stride,
                      c.x_stride, c.out_stride},
                     size);
    }
}

void run_on_tiles(const LinearTiles& tiles, const Linear& c) {
    if (c.n_rows == 0 || c.n_out == 0) return;
    // Floats are worth it: to pack a row of them takes long, and so do the lanes of an output to be turned about.
    if (tiles.element_bytes == sizeof(float) && c.n_rows >= tiles_max_rows) return run_swapped(tiles, c);
    run_on_tiles(c.n_rows > tile_side ? tiles.many : tiles.few, c, tiles.element_bytes);
}

}  // namespace

void run_linear(int32_t dtype, const Linear& call, bool high) {
    const bool is_float = dtype == LLMCTL_F32;
    const LinearTiles& tiles = is_float ? kernels().linear_tiles_f32 : kernels().linear_tiles_bf16;
    if ((high || !is_float) && tiles.element_bytes != 0) return run_on_tiles(tiles, call);
    const LinearKernel kernel = is_float ? kernels().linear_f32 : kernels().linear_bf16;
    for_linear_pieces(call, is_float ? 32 : 16, [&](const LinearPiece& piece) { kernel(call, piece); });
}

}  // namespace llmctl

int llmctl_linear(int32_t dtype, int32_t high, const void* x, int64_t x_stride, const void* weight, int64_t weight_stride,
                  const void* bias, void* out, int64_t out_stride, int64_t n_rows, int64_t n_in, int64_t n_out) {
    using namespace llmctl;
    return guarded([&] {
        check_dtype(dtype);
        if (n_rows < 0 || n_in < 0 || n_out < 0) throw std::invalid_argument("a size is below 0");
        run_linear(dtype, {x, weight, bias, out, n_rows, n_in, n_out, x_stride, weight_stride, out_stride}, high != 0);
    });
}
