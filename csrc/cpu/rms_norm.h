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

// With t = grad * (offset + weight) and r = 1 / sqrt(mean(x^2) + eps): grad_x = r (t - x r^2 mean(t x)), rounded once. grad * x r
// is added to weight_sums.
template <class S, class Element>
void rms_norm_gradient_row(const void* grad_row, const void* x_row, const void* weights, float offset, float eps,
                           void* out_row, float* weight_sums, int64_t n) {
    const Element *grad = static_cast<const Element*>(grad_row), *x = static_cast<const Element*>(x_row);
    const Element* weight = static_cast<const Element*>(weights);
    Element* out = static_cast<Element*>(out_row);
    const auto shift = S::all(offset);
    typename S::Vec sums[4] = {S::zero(), S::zero(), S::zero(), S::zero()};  // of x^2 and t x, each twice
    const int64_t whole = n / S::lanes * S::lanes;
    const int left = static_cast<int>(n - whole);
    for (int64_t i = 0; i < whole; i += S::lanes) {
        const auto v = S::load(x + i), t = S::mul(S::load(grad + i), S::add(shift, S::load(weight + i)));
        const int64_t which = i / S::lanes % 2;
        sums[which] = S::fma(v, v, sums[which]);
        sums[2 + which] = S::fma(t, v, sums[2 + which]);
    }
    if (left) {
        const auto v = S::load_some(x + whole, left);
        const auto t = S::mul(S::load_some(grad + whole, left), S::add(shift, S::load_some(weight + whole, left)));
        sums[0] = S::fma(v, v, sums[0]);
        sums[2] = S::fma(t, v, sums[2]);
    }
    float found[4];
    S::sums(sums, found);
    const float size = static_cast<float>(n), scale = 1.0f / __builtin_sqrtf((found[0] + found[1]) / size + eps);
    const auto r = S::all(scale), along = S::all(scale * scale * ((found[2] + found[3]) / size));
    const auto gradient = [&](typename S::Vec g, typename S::Vec v, typename S::Vec w) LLMCTL_INLINED {
        const auto t = S::mul(g, S::add(shift, w));
        return S::mul(r, S::sub(t, S::mul(v, along)));
    };
    for (int64_t i = 0; i < whole; i += S::lanes) {
        const auto g = S::load(grad + i), v = S::load(x + i);
        S::store(out + i, gradient(g, v, S::load(weight + i)));
        if (weight_sums) S::store(weight_sums + i, S::fma(g, S::mul(v, r), S::load(weight_sums + i)));
    }
    if (left) {
        const auto g = S::load_some(grad + whole, left), v = S::load_some(x + whole, left);
        S::store_some(out + whole, gradient(g, v, S::load_some(weight + whole, left)), left);
        if (weight_sums) {
            const auto sum = S::fma(g, S::mul(v, r), S::load_some(weight_sums + whole, left));
            S::store_some(weight_sums + whole, sum, left);
        }
    }
}

}  // namespace
}  // namespace llmctl
