// A row of activations in whole numbers.
#pragma once

#include <limits>

#include "cpu/bf16.h"
#include "cpu/quantized.h"

namespace llmctl {
namespace {

// The elements as floats, 0 behind the last; gives the largest absolute value, NaN where one is NaN or infinite.
template <class S, class Element>
LLMCTL_INLINE float read_block(const Element* x, int64_t n, float* to) {
    auto largest = S::zero(), poison = S::zero();
    for (int64_t i = 0; i < quantized_block; i += S::lanes) {
        const auto value = i + S::lanes <= n ? S::load(x + i)
                           : i < n           ? S::load_some(x + i, static_cast<int>(n - i))
                                             : S::zero();
        S::store(to + i, value);
        largest = S::max(largest, S::max(value, S::sub(S::zero(), value)));
        poison = S::fma(value, S::zero(), poison);
    }
    return S::any_nan(poison) ? std::numeric_limits<float>::quiet_NaN() : S::highest(largest);
}

// Whole numbers nearest to the product, rounded to a float, of each value and the factor; ties to even.
template <class S>
LLMCTL_INLINE void round_all(float* values, float factor, int32_t* to) {
    for (int64_t i = 0; i < quantized_block; i += S::lanes) {
        S::store(values + i, S::round(S::mul(S::load(values + i), S::all(factor))));
    }
    for (int64_t i = 0; i < quantized_block; ++i) to[i] = static_cast<int32_t>(values[i]);
}

LLMCTL_INLINE void store_codes(const int32_t* codes, int8_t* tiles) {
    for (int64_t half = 0; half < 2; ++half, codes += 64, tiles += tile_bytes) {
        for (int64_t i = 0; i < 64; ++i) tiles[i] = static_cast<int8_t>(codes[i]);
    }
}

template <class S, class Element>
void quantize_row(const void* row, int64_t n_in, const QuantizedRows& to, int64_t r) {
    const Element* x = static_cast<const Element*>(row);
    constexpr float levels = 127.0f;
    alignas(64) float values[quantized_block];
    alignas(64) int32_t codes[quantized_block];
    for (int64_t block = 0; block < to.n_blocks; ++block) {
        const int64_t k = block * quantized_block;
        const float largest = read_block<S>(x + k, n_in - k, values);
        const bool is_something = largest > 1e-30f;  // below, the factor would overflow
        if (is_something) {
            round_all<S>(values, levels / largest, codes);
        } else {
            std::memset(codes, 0, sizeof codes);
        }
        store_codes(codes, to.tiles(r / row_block, block) + r % row_block * 64);
        to.scales_of(r / row_block, block)[r % row_block] = largest == largest && !is_something ? 0.0f : largest / levels;
        int32_t* sums = to.sums_of(r / row_block, block) + r % row_block;
        for (int64_t begin = 0; begin < quantized_block; begin += to.unit, sums += row_block) {
            int32_t sum = 0;
            for (int64_t i = 0; i < to.unit; ++i) sum += codes[begin + i];
            *sums = -sum;
        }
    }
}

}  // namespace
}  // namespace llmctl
