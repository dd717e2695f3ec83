// The product of bfloat16 matrices on AMX tiles, from one row to many with the same bits.
//
// A tile of 16 outputs x 32 weights is taken as it lies in memory, one of 32 elements x up to 16 rows of x is packed in
// pairs, and their product is a tile of outputs x rows. Each element of it adds up the steps of 32 in their order,
// whatever is computed beside it; where a tile is put aside between steps it is a float as before.
#pragma once

#include "cpu/linear_tile.h"
#include "cpu/piece_scratch.h"
#include "cpu/simd/amx.h"
#include "cpu/simd/avx512_bf16.h"
#include "cpu/simd/transpose.h"

namespace llmctl {
namespace {

constexpr int64_t tile_elements = tile_side * tile_step, pair_elements = 2 * tile_elements;
constexpr int64_t steps_at_a_time = tile_steps;  // their weights, of 32 outputs, stay in the first-level cache

// 32 elements of up to 16 rows as the pairs of a tile with `columns` columns, what is missing being 0.
LLMCTL_INLINE void pack_tile(const Bf16* x, int64_t stride, int64_t n_rows, int64_t n, int64_t columns, Bf16* to) {
    const auto mask = static_cast<__mmask32>(n >= tile_step ? ~0u : (1u << n) - 1);
    __m512i rows[16];
#pragma GCC unroll 16
    for (int64_t r = 0; r < 16; ++r) {
        rows[r] = r < n_rows ? _mm512_maskz_loadu_epi16(mask, x + r * stride) : _mm512_setzero_si512();
    }
    transpose(rows);
    const auto some = static_cast<__mmask16>((1u << columns) - 1);
#pragma GCC unroll 16
    for (int64_t pair = 0; pair < 16; ++pair) _mm512_mask_storeu_epi32(to + pair * 2 * columns, some, rows[pair]);
}

LLMCTL_INLINE int64_t steps_of(const Linear& c) { return (c.n_in + tile_step - 1) / tile_step; }

// Where two row blocks' tiles of a step lie in packed rows: stretch by stretch of steps, so that a piece goes through them
// in the order of their addresses.
LLMCTL_INLINE int64_t pair_at(const Linear& c, int64_t pair, int64_t step) {
    const int64_t pairs = (c.n_rows + 2 * tile_side - 1) / (2 * tile_side), stretch = step / steps_at_a_time;
    return ((stretch * pairs + pair) * steps_at_a_time + step % steps_at_a_time) * pair_elements;
}

// n_steps tiles of 16 outputs x 32 weights, two tiles apart, with 0 behind the last of either.
LLMCTL_INLINE void copy_weights(const Linear& c, int64_t out, int64_t k, int64_t n_steps, Bf16* to) {
    const Bf16* from = static_cast<const Bf16*>(c.weight) + out * c.weight_stride + k;
    for (int64_t o = 0; o < tile_side; ++o, from += c.weight_stride, to += tile_step) {
        const int64_t n = out + o < c.n_out ? c.n_in - k : 0;  // left in the row
        for (int64_t step = 0; step < n_steps; ++step) {
            const int64_t left = n - step * tile_step;
            const auto mask = static_cast<__mmask32>(left >= tile_step ? ~0u : left > 0 ? (1u << left) - 1 : 0);
            const __m512i row = _mm512_maskz_loadu_epi16(mask, from + step * tile_step);
            _mm512_store_si512(to + step * pair_elements, row);
        }
    }
}

// Sums [16 outputs, `columns` rows] of which n_rows and as many outputs as there are go, with the bias, to where they
// belong.
LLMCTL_INLINE void write_tile(const Linear& c, const float* sums, int64_t columns, int64_t row, int64_t n_rows,
                              int64_t out) {
    const int64_t left = c.n_out - out;
    const auto outs = static_cast<__mmask16>(left >= 16 ? 0xffff : (1u << left) - 1);
    const auto of_rows = static_cast<__mmask16>((1u << columns) - 1);
    __m512i x[16];
#pragma GCC unroll 16
    for (int64_t o = 0; o < 16; ++o) x[o] = _mm512_maskz_loadu_epi32(of_rows, sums + o * columns);
    transpose(x);
    const auto* bias = static_cast<const Bf16*>(c.bias);
    const __m512i bits = bias ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(outs, bias + out)) : __m512i{};
    const auto added = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    Bf16* to = static_cast<Bf16*>(c.out) + row * c.out_stride + out;
#pragma GCC unroll 16
    for (int64_t r = 0; r < 16; ++r) {
        if (r >= n_rows) break;
        const __m512 sum = _mm512_castsi512_ps(x[r]);
        const auto rounded = (__m256i)_mm512_cvtneps_pbh(bias ? _mm512_add_ps(sum, added) : sum);
        _mm256_mask_storeu_epi16(to + r * c.out_stride, outs, rounded);
    }
}

// Up to 16 rows times 16 outputs. The weights come from memory: what is needed `ahead` elements later is asked for.
LLMCTL_INLINE void few_rows_panel(const Linear& c, const Bf16* x, int64_t columns, int64_t out) {
    constexpr int64_t ahead = 16 * tile_step;
    alignas(64) Bf16 edge[tile_elements];
    alignas(64) float sums[tile_side * tile_side];
    const Bf16* weight = static_cast<const Bf16*>(c.weight) + out * c.weight_stride;
    const bool is_whole = out + tile_side <= c.n_out;
    tile_zero<0>();
    for (int64_t k = 0; k < c.n_in; k += tile_step, x += tile_step * columns) {
        if (is_whole && k + tile_step <= c.n_in) {
            const int64_t next = k + ahead < c.n_in ? k + ahead : tile_side * c.weight_stride + k + ahead - c.n_in;
#pragma GCC unroll 16
            for (int64_t o = 0; o < tile_side; ++o) Avx512::prefetch(weight + o * c.weight_stride + next);
            tile_load<4>(weight + k, c.weight_stride * 2);
        } else {
            copy_weights(c, out, k, 1, edge);
            tile_load<4>(edge, tile_step * 2);
        }
        tile_load<6>(x, columns * 4);
        tile_dot_bf16<0, 4, 6>();
    }
    tile_store<0>(sums, columns * 4);
    write_tile(c, sums, columns, 0, c.n_rows, out);
}

// Some steps of two panels times two row blocks, whose tiles lie in pairs; the sums [2 panels, 2 row blocks, 16, 16] go on
// from where they were.
LLMCTL_INLINE void multiply_steps(const Bf16* weights, const Bf16* x, int64_t n_steps, bool more, float* sums) {
    if (more) {
        tile_load<0>(sums, 64);
        tile_load<1>(sums + 256, 64);
        tile_load<2>(sums + 512, 64);
        tile_load<3>(sums + 768, 64);
    } else {
        tile_zero<0>();
        tile_zero<1>();
        tile_zero<2>();
        tile_zero<3>();
    }
    for (int64_t step = 0; step < n_steps; ++step, weights += pair_elements, x += pair_elements) {
        tile_load<4>(weights, 64);
        tile_load<6>(x, 64);
        tile_dot_bf16<0, 4, 6>();
        tile_load<7>(x + tile_elements, 64);
        tile_dot_bf16<1, 4, 7>();
        tile_load<5>(weights + tile_elements, 64);
        tile_dot_bf16<2, 5, 6>();
        tile_dot_bf16<3, 5, 7>();
    }
    tile_store<0>(sums, 64);
    tile_store<1>(sums + 256, 64);
    tile_store<2>(sums + 512, 64);
    tile_store<3>(sums + 768, 64);
}

// Many rows: stretches of steps, whose weights are copied tile by tile and serve all rows of the piece. A last panel or
// row block without a partner has one whose sums nobody reads.
inline void many_rows_piece(const Linear& c, const Bf16* x, const LinearPiece& piece) {
    const int64_t n_steps = steps_of(c);
    const int64_t panels = (piece.last_out - piece.first_out + tile_side - 1) / tile_side;
    const int64_t blocks = (piece.last_row - piece.first_row + tile_side - 1) / tile_side;
    const int64_t panel_pairs = (panels + 1) / 2, block_pairs = (blocks + 1) / 2;
    char* memory = piece_scratch(steps_at_a_time * pair_elements * 2 + panel_pairs * block_pairs * 4096);
    auto* weights = reinterpret_cast<Bf16*>(memory);
    auto* sums = reinterpret_cast<float*>(weights + steps_at_a_time * pair_elements);
    const int64_t first_pair = piece.first_row / (2 * tile_side);
    for (int64_t first = 0; first < n_steps; first += steps_at_a_time) {
        const int64_t n = n_steps - first < steps_at_a_time ? n_steps - first : steps_at_a_time;
        float* to = sums;
        for (int64_t panel = 0; panel < panels; panel += 2) {
            const int64_t out = piece.first_out + panel * tile_side;
            copy_weights(c, out, first * tile_step, n, weights);
            if (panel + 1 < panels) copy_weights(c, out + tile_side, first * tile_step, n, weights + tile_elements);
            for (int64_t pair = 0; pair < block_pairs; ++pair, to += 1024) {
                multiply_steps(weights, x + pair_at(c, first_pair + pair, first), n, first > 0, to);
            }
        }
    }
    for (int64_t panel = 0; panel < panels; ++panel) {
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t row = piece.first_row + block * tile_side, left = piece.last_row - row;
            const float* of_pair = sums + (panel / 2 * block_pairs + block / 2) * 1024;
            write_tile(c, of_pair + (panel % 2 * 2 + block % 2) * 256, tile_side, row, left < 16 ? left : 16,
                       piece.first_out + panel * tile_side);
        }
    }
}

inline void linear_on_tiles(const Linear& c, const void* packed, const LinearPiece& piece) {
    const auto* x = static_cast<const Bf16*>(packed);
    if (c.n_rows > tile_side) {
        Tiles tiles(64);
        return many_rows_piece(c, x, piece);
    }
    Tiles tiles(64, static_cast<int>(c.n_rows));
    for (int64_t out = piece.first_out; out < piece.last_out; out += tile_side) few_rows_panel(c, x, c.n_rows, out);
}

// The few rows of a product, or a row block of many.
inline void pack_for_tiles(const Linear& c, int64_t block, void* packed) {
    auto* to = static_cast<Bf16*>(packed);
    const int64_t row = block * tile_side, n_rows = c.n_rows - row < tile_side ? c.n_rows - row : tile_side;
    const Bf16* x = static_cast<const Bf16*>(c.x) + row * c.x_stride;
    for (int64_t step = 0; step < steps_of(c); ++step, x += tile_step) {
        const int64_t n = c.n_in - step * tile_step;
        if (c.n_rows > tile_side) {
            Bf16* at = to + pair_at(c, block / 2, step) + block % 2 * tile_elements;
            pack_tile(x, c.x_stride, n_rows, n, tile_side, at);
        } else {
            pack_tile(x, c.x_stride, n_rows, n, n_rows, to + step * tile_step * n_rows);
        }
    }
}

}  // namespace
}  // namespace llmctl
