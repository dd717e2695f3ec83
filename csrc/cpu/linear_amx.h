// The product of matrices on AMX tiles, from one row to many with the same bits.
//
// A tile of 16 outputs x 32 weights is taken as it lies in memory, one of 32 elements x up to 16 rows of x is packed in
// pairs, and their product is a tile of outputs x rows. Each element of it adds up the steps of 32 in their order,
// whatever is computed beside it; where a tile is put aside between steps it is a float as before.
//
// A float is the sum of two bfloat16 to 17 bits: three of the four products of these two parts are added up, and the one
// of both lower parts, below 2^-16 of the whole, is left out.
#pragma once

#include "cpu/linear_tile.h"
#include "cpu/piece_scratch.h"
#include "cpu/simd/amx.h"
#include "cpu/simd/avx512_bf16.h"
#include "cpu/simd/transpose.h"

namespace llmctl {
namespace {

constexpr int64_t tile_elements = tile_side * tile_step, pair_elements = 2 * tile_elements;

// The bfloat16 that an element is the sum of.
template <class Element>
constexpr int64_t parts_of = sizeof(Element) / sizeof(Bf16);
// Their weights, of 32 outputs, stay in the first-level cache.
template <class Element>
constexpr int64_t steps_at_a_time = tile_steps / parts_of<Element>;

struct Parts {
    __m512i high, low;
};

// The first n of 32 elements, and 0 behind them.
LLMCTL_INLINE Parts load_parts(const Bf16* from, int64_t n) {
    const auto mask = static_cast<__mmask32>(n >= 32 ? ~0u : n > 0 ? (1u << n) - 1 : 0);
    return {_mm512_maskz_loadu_epi16(mask, from), __m512i{}};
}
LLMCTL_INLINE __m512 load_floats(const float* from, int64_t n) {
    return n >= 16 ? _mm512_loadu_ps(from)
                   : _mm512_maskz_loadu_ps(static_cast<__mmask16>(n > 0 ? (1u << n) - 1 : 0), from);
}
// What is not finite has no lower part.
constexpr int nan_or_infinite = 0x99;
LLMCTL_INLINE __m512 lower_part(__m512 x, __m256i high) {
    const __m512 rounded = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
    const __m512 left = _mm512_sub_ps(x, rounded);
    return _mm512_maskz_mov_ps(static_cast<__mmask16>(~_mm512_fpclass_ps_mask(left, nan_or_infinite)), left);
}
LLMCTL_INLINE Parts load_parts(const float* from, int64_t n) {
    const __m512 a = load_floats(from, n), b = load_floats(from + 16, n - 16);
    const auto high = (__m512i)_mm512_cvtne2ps_pbh(b, a);
    const __m512 low_a = lower_part(a, _mm512_castsi512_si256(high));
    const __m512 low_b = lower_part(b, _mm512_extracti64x4_epi64(high, 1));
    return {high, (__m512i)_mm512_cvtne2ps_pbh(low_b, low_a)};
}

LLMCTL_INLINE void store_turned(__m512i rows[16], int64_t columns, Bf16* to) {
    transpose(rows);
    const auto some = static_cast<__mmask16>((1u << columns) - 1);
#pragma GCC unroll 16
    for (int64_t pair = 0; pair < 16; ++pair) _mm512_mask_storeu_epi32(to + pair * 2 * columns, some, rows[pair]);
}

// 32 elements of up to 16 rows as the pairs of a tile with `columns` columns, what is missing being 0; the lower parts
// `low` elements behind the higher ones.
template <class Element>
LLMCTL_INLINE void pack_tile(const Element* x, int64_t stride, int64_t n_rows, int64_t n, int64_t columns, Bf16* to,
                             int64_t low) {
    __m512i high_rows[16], low_rows[16];
#pragma GCC unroll 16
    for (int64_t r = 0; r < 16; ++r) {
        const Parts parts = r < n_rows ? load_parts(x + r * stride, n) : Parts{};
        high_rows[r] = parts.high;
        low_rows[r] = parts.low;
    }
    store_turned(high_rows, columns, to);
    if constexpr (parts_of<Element> == 2) store_turned(low_rows, columns, to + low);
}

LLMCTL_INLINE int64_t steps_of(const Linear& c) { return (c.n_in + tile_step - 1) / tile_step; }

// Where two row blocks' tiles of a step lie in packed rows: stretch by stretch of steps, so that a piece goes through them
// in the order of their addresses.
template <class Element>
LLMCTL_INLINE int64_t pair_at(const Linear& c, int64_t pair, int64_t step) {
    constexpr int64_t steps = steps_at_a_time<Element>;
    const int64_t pairs = (c.n_rows + 2 * tile_side - 1) / (2 * tile_side), stretch = step / steps;
    return ((stretch * pairs + pair) * steps + step % steps) * parts_of<Element> * pair_elements;
}

// n_steps tiles of 16 outputs x 32 weights, two tiles apart for each part, with 0 behind the last of either.
template <class Element>
LLMCTL_INLINE void copy_weights(const Linear& c, int64_t out, int64_t k, int64_t n_steps, Bf16* to) {
    const Element* from = static_cast<const Element*>(c.weight) + out * c.weight_stride + k;
    for (int64_t o = 0; o < tile_side; ++o, from += c.weight_stride, to += tile_step) {
        const int64_t n = out + o < c.n_out ? c.n_in - k : 0;  // left in the row
        for (int64_t step = 0; step < n_steps; ++step) {
            const Parts row = load_parts(from + step * tile_step, n - step * tile_step);
            Bf16* at = to + step * parts_of<Element> * pair_elements;
            _mm512_store_si512(at, row.high);
            if constexpr (parts_of<Element> == 2) _mm512_store_si512(at + pair_elements, row.low);
        }
    }
}

LLMCTL_INLINE void write_outputs(Bf16* to, __mmask16 outs, __m512 sum) {
    _mm256_mask_storeu_epi16(to, outs, (__m256i)_mm512_cvtneps_pbh(sum));
}
LLMCTL_INLINE void write_outputs(float* to, __mmask16 outs, __m512 sum) { _mm512_mask_storeu_ps(to, outs, sum); }

LLMCTL_INLINE __m512 load_bias(const Bf16* from, __mmask16 outs) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(outs, from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
LLMCTL_INLINE __m512 load_bias(const float* from, __mmask16 outs) { return _mm512_maskz_loadu_ps(outs, from); }

// Sums [16 outputs, `columns` rows] of which n_rows and as many outputs as there are go, with the bias, to where they
// belong.
template <class Element>
LLMCTL_INLINE void write_tile(const Linear& c, const float* sums, int64_t columns, int64_t row, int64_t n_rows,
                              int64_t out) {
    const int64_t left = c.n_out - out;
    const auto outs = static_cast<__mmask16>(left >= 16 ? 0xffff : (1u << left) - 1);
    const auto of_rows = static_cast<__mmask16>((1u << columns) - 1);
    __m512i x[16];
#pragma GCC unroll 16
    for (int64_t o = 0; o < 16; ++o) x[o] = _mm512_maskz_loadu_epi32(of_rows, sums + o * columns);
    transpose(x);
    const auto* bias = static_cast<const Element*>(c.bias);
    const __m512 added = bias ? load_bias(bias + out, outs) : __m512{};
    Element* to = static_cast<Element*>(c.out) + row * c.out_stride + out;
#pragma GCC unroll 16
    for (int64_t r = 0; r < 16; ++r) {
        if (r >= n_rows) break;
        const __m512 sum = _mm512_castsi512_ps(x[r]);
        write_outputs(to + r * c.out_stride, outs, bias ? _mm512_add_ps(sum, added) : sum);
    }
}

// The same of sums [16 rows, 16 outputs] where x and the weights have changed places: c.weight is x, and c.x the weights.
template <class Element>
LLMCTL_INLINE void write_swapped_tile(const Linear& c, const float* sums, int64_t out, int64_t n_outs, int64_t row) {
    const auto outs = static_cast<__mmask16>((1u << n_outs) - 1);
    const auto* bias = static_cast<const Element*>(c.bias);
    const __m512 added = bias ? load_bias(bias + out, outs) : __m512{};
    Element* to = static_cast<Element*>(c.out) + row * c.out_stride + out;
    const int64_t n_rows = c.n_out - row < tile_side ? c.n_out - row : tile_side;
    for (int64_t r = 0; r < n_rows; ++r, to += c.out_stride) {
        const __m512 sum = _mm512_load_ps(sums + r * tile_side);
        write_outputs(to, outs, bias ? _mm512_add_ps(sum, added) : sum);
    }
}

// One step's tiles of weights [high, low] and of x [high, low], `low` elements behind, are multiplied into tile Sum.
template <class Element, int Sum>
LLMCTL_INLINE void multiply_few(const Bf16* weights, int64_t weight_stride, const Bf16* x, int64_t columns) {
    tile_load<4>(weights, weight_stride * 2);
    if constexpr (parts_of<Element> == 2) {
        tile_load<7>(x + tile_step * columns, columns * 4);
        tile_dot_bf16<Sum, 4, 7>();
    }
    tile_load<6>(x, columns * 4);
    tile_dot_bf16<Sum, 4, 6>();
    if constexpr (parts_of<Element> == 2) {
        tile_load<5>(weights + pair_elements, weight_stride * 2);
        tile_dot_bf16<Sum, 5, 6>();
    }
}

// Up to 16 rows times 16 outputs. The weights come from memory: what is needed `ahead` elements later is asked for.
template <class Element>
LLMCTL_INLINE void few_rows_panel(const Linear& c, const Bf16* x, int64_t columns, int64_t out) {
    constexpr int64_t ahead = 16 * tile_step;
    alignas(64) Bf16 copied[parts_of<Element> * pair_elements];
    alignas(64) float sums[tile_side * tile_side];
    const Element* weight = static_cast<const Element*>(c.weight) + out * c.weight_stride;
    const bool is_whole = out + tile_side <= c.n_out;
    tile_zero<0>();
    for (int64_t k = 0; k < c.n_in; k += tile_step, x += parts_of<Element> * tile_step * columns) {
        const bool is_inside = is_whole && k + tile_step <= c.n_in;
        if (is_inside) {
            const int64_t next = k + ahead < c.n_in ? k + ahead : tile_side * c.weight_stride + k + ahead - c.n_in;
#pragma GCC unroll 16
            for (int64_t o = 0; o < tile_side; ++o) {
                Avx512::prefetch(weight + o * c.weight_stride + next);
                if constexpr (parts_of<Element> == 2) Avx512::prefetch(weight + o * c.weight_stride + next + 16);
            }
        }
        if constexpr (parts_of<Element> == 1) {
            if (is_inside) {
                multiply_few<Element, 0>(weight + k, c.weight_stride, x, columns);
                continue;
            }
        }
        copy_weights<Element>(c, out, k, 1, copied);
        multiply_few<Element, 0>(copied, tile_step, x, columns);
    }
    tile_store<0>(sums, columns * 4);
    write_tile<Element>(c, sums, columns, 0, c.n_rows, out);
}

// Two tiles of weights times two of x; either may be in its registers already.
template <bool LoadWeights, bool LoadX>
LLMCTL_INLINE void multiply_pair(const Bf16* weights, const Bf16* x) {
    if constexpr (LoadWeights) tile_load<4>(weights, 64);
    if constexpr (LoadX) tile_load<6>(x, 64);
    tile_dot_bf16<0, 4, 6>();
    if constexpr (LoadX) tile_load<7>(x + tile_elements, 64);
    tile_dot_bf16<1, 4, 7>();
    if constexpr (LoadWeights) tile_load<5>(weights + tile_elements, 64);
    tile_dot_bf16<2, 5, 6>();
    tile_dot_bf16<3, 5, 7>();
}

// Some steps of two panels times two row blocks, whose tiles lie in pairs; the sums [2 panels, 2 row blocks, 16, 16] go on
// from where they were.
template <class Element, bool Swapped>
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
    constexpr int64_t elements = parts_of<Element> * pair_elements;
    for (int64_t step = 0; step < n_steps; ++step, weights += elements, x += elements) {
        if constexpr (parts_of<Element> == 1) {
            multiply_pair<true, true>(weights, x);
        } else if constexpr (Swapped) {
            multiply_pair<true, true>(weights + pair_elements, x);
            multiply_pair<true, false>(weights, x);
            multiply_pair<false, true>(weights, x + pair_elements);
        } else {
            multiply_pair<true, true>(weights, x + pair_elements);
            multiply_pair<false, true>(weights, x);
            multiply_pair<true, false>(weights + pair_elements, x);
        }
    }
    tile_store<0>(sums, 64);
    tile_store<1>(sums + 256, 64);
    tile_store<2>(sums + 512, 64);
    tile_store<3>(sums + 768, 64);
}

// Many rows: stretches of steps, whose weights are copied tile by tile and serve all rows of the piece. A last panel or
// row block without a partner has one whose sums nobody reads.
template <class Element, bool Swapped>
void many_rows_piece(const Linear& c, const void* packed, const LinearPiece& piece) {
    const Tiles tiles(64);
    const auto* x = static_cast<const Bf16*>(packed);
    const int64_t n_steps = steps_of(c);
    const int64_t panels = (piece.last_out - piece.first_out + tile_side - 1) / tile_side;
    const int64_t blocks = (piece.last_row - piece.first_row + tile_side - 1) / tile_side;
    const int64_t panel_pairs = (panels + 1) / 2, block_pairs = (blocks + 1) / 2;
    constexpr int64_t stretch = steps_at_a_time<Element>, elements = stretch * parts_of<Element> * pair_elements;
    char* memory = piece_scratch(elements * 2 + panel_pairs * block_pairs * 4096);
    auto* weights = reinterpret_cast<Bf16*>(memory);
    auto* sums = reinterpret_cast<float*>(weights + elements);
    const int64_t first_pair = piece.first_row / (2 * tile_side);
    for (int64_t first = 0; first < n_steps; first += stretch) {
        const int64_t n = n_steps - first < stretch ? n_steps - first : stretch;
        float* to = sums;
        for (int64_t panel = 0; panel < panels; panel += 2) {
            const int64_t out = piece.first_out + panel * tile_side;
            copy_weights<Element>(c, out, first * tile_step, n, weights);
            if (panel + 1 < panels) {
                copy_weights<Element>(c, out + tile_side, first * tile_step, n, weights + tile_elements);
            }
            for (int64_t pair = 0; pair < block_pairs; ++pair, to += 1024) {
                const Bf16* rows = x + pair_at<Element>(c, first_pair + pair, first);
                multiply_steps<Element, Swapped>(weights, rows, n, first > 0, to);
            }
        }
    }
    for (int64_t panel = 0; panel < panels; ++panel) {
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t row = piece.first_row + block * tile_side, left = piece.last_row - row;
            const float* of_pair = sums + (panel / 2 * block_pairs + block / 2) * 1024;
            const float* of_tile = of_pair + (panel % 2 * 2 + block % 2) * 256;
            const int64_t n_rows = left < tile_side ? left : tile_side, out = piece.first_out + panel * tile_side;
            if constexpr (Swapped) {
                write_swapped_tile<Element>(c, of_tile, row, n_rows, out);
            } else {
                write_tile<Element>(c, of_tile, tile_side, row, n_rows, out);
            }
        }
    }
}

template <class Element>
void few_rows_piece(const Linear& c, const void* packed, const LinearPiece& piece) {
    const Tiles tiles(64, static_cast<int>(c.n_rows));
    const auto* x = static_cast<const Bf16*>(packed);
    for (int64_t out = piece.first_out; out < piece.last_out; out += tile_side) {
        few_rows_panel<Element>(c, x, c.n_rows, out);
    }
}

template <class Element>
void pack_few_rows(const Linear& c, int64_t, void* packed) {
    const auto* x = static_cast<const Element*>(c.x);
    auto* to = static_cast<Bf16*>(packed);
    const int64_t elements = tile_step * c.n_rows;
    for (int64_t k = 0; k < c.n_in; k += tile_step, to += parts_of<Element> * elements) {
        pack_tile(x + k, c.x_stride, c.n_rows, c.n_in - k, c.n_rows, to, elements);
    }
}

template <class Element>
void pack_row_block(const Linear& c, int64_t block, void* packed) {
    const int64_t row = block * tile_side, n_rows = c.n_rows - row < tile_side ? c.n_rows - row : tile_side;
    const Element* x = static_cast<const Element*>(c.x) + row * c.x_stride;
    for (int64_t step = 0; step < steps_of(c); ++step, x += tile_step) {
        const int64_t at = pair_at<Element>(c, block / 2, step) + block % 2 * tile_elements;
        pack_tile(x, c.x_stride, n_rows, c.n_in - step * tile_step, tile_side, static_cast<Bf16*>(packed) + at,
                  pair_elements);
    }
}

template <class Element>
constexpr LinearTiles linear_tiles = {
    {pack_few_rows<Element>, few_rows_piece<Element>},
    {pack_row_block<Element>, many_rows_piece<Element, false>},
    {pack_row_block<Element>, many_rows_piece<Element, true>},
    sizeof(Element),
};

}  // namespace
}  // namespace llmctl
