// Root-mean-square normalization of rows, arXiv:1910.07467.
#pragma once

#include <cstdint>

#include "cpu/bf16.h"

namespace llmctl {
namespace {

// out = x / sqrt(mean(x^2) + eps) * (offset + weight), rounded once; weight may be null for ones (and no offset).
template <class S, class Element>
void rms_norm_row(const void* x_row, const void* weights, float offset, float eps, void* out_row, int64_t n) {
    const Element *x = static_cast<const Element*>(x_row), *weight = static_cast<const Element*>(weights);
    Element* out = static_cast<Element*>(out_row);
    typename S::Vec squares[4] = {S::zero(), S::zero(), S::zero(), S::zero()};
    const int64_t whole = n / S::lanes * S::lanes;
    const int left = static_cast<int>(n - whole);
    for (int64_t i = 0; i < whole; i += S::lanes) {
        const auto v = S::load(x + i);
        auto& sum = squares[i / S::lanes % 4];
        sum = S::fma(v, v, sum);
    }
    if (left) {
        const auto v = S::load_some(x + whole, left);
        squares[0] = S::fma(v, v, squares[0]);
    }
    float sums[4];
    S::sums(squares, sums);
    const float mean = ((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(n);
    const auto scale = S::all(1.0f / __builtin_sqrtf(mean + eps)), shift = S::all(offset);
    for (int64_t i = 0; i < whole; i += S::lanes) {
        const auto v = S::mul(S::load(x + i), scale);
        S::store(out + i, weight ? S::mul(v, S::add(shift, S::load(weight + i))) : v);
    }
    if (left) {
        const auto v = S::mul(S::load_some(x + whole, left), scale);
        const auto y = weight ? S::mul(v, S::add(shift, S::load_some(weight + whole, left))) : v;
        S::store_some(out + whole, y, left);
    }
}

}  // namespace
}  // namespace llmctl
