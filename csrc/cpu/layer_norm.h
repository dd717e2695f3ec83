// Layer normalization of rows, arXiv:1607.06450, and the sums that a layer's branches add to.
#pragma once

#include <cstdint>

#include "cpu/bf16.h"

namespace llmctl {
namespace {

// The sum of f(x) over a row, in an order that depends on its length alone.
template <class S, class Element, class Map>
LLMCTL_INLINE float sum_of(const Element* x, int64_t n, const Map& f) {
    typename S::Vec parts[4] = {S::zero(), S::zero(), S::zero(), S::zero()};
    int64_t i = 0;
    for (; i + S::lanes <= n; i += S::lanes) {
        auto& sum = parts[i / S::lanes % 4];
        sum = S::add(sum, f(S::load(x + i)));
    }
    float sums[4];
    S::sums(parts, sums);
    float total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (; i < n; ++i) {
        float lanes[S::lanes];
        S::store(lanes, f(S::all(load(x[i]))));
        total += lanes[0];
    }
    return total;
}

// out = (x - mean) / sqrt(variance + eps) * weight + bias, rounded once; bias may be null, out may be x.
template <class S, class Element>
void layer_norm_row(const void* x_row, const void* weights, const void* biases, float eps, void* out_row, int64_t n) {
    const Element *x = static_cast<const Element*>(x_row), *weight = static_cast<const Element*>(weights);
    const Element* bias = static_cast<const Element*>(biases);
    Element* out = static_cast<Element*>(out_row);
    const auto itself = [](typename S::Vec v) LLMCTL_INLINED { return v; };
    const auto mean = S::all(sum_of<S>(x, n, itself) / static_cast<float>(n));
    const auto squared = [&](typename S::Vec v) LLMCTL_INLINED {
        const auto d = S::sub(v, mean);
        return S::mul(d, d);
    };
    const float variance = sum_of<S>(x, n, squared) / static_cast<float>(n);
    const auto scale = S::all(1.0f / __builtin_sqrtf(variance + eps));
    int64_t i = 0;
    for (; i + S::lanes <= n; i += S::lanes) {
        const auto v = S::mul(S::sub(S::load(x + i), mean), scale);
        S::store(out + i, S::fma(v, S::load(weight + i), bias ? S::load(bias + i) : S::zero()));
    }
    if (const int left = static_cast<int>(n - i)) {
        const auto v = S::mul(S::sub(S::load_some(x + i, left), mean), scale);
        const auto shift = bias ? S::load_some(bias + i, left) : S::zero();
        S::store_some(out + i, S::fma(v, S::load_some(weight + i, left), shift), left);
    }
}

// x += y, rounded to their type.
template <class S, class Element>
void add_row(void* to, const void* from, int64_t n) {
    Element* x = static_cast<Element*>(to);
    const Element* y = static_cast<const Element*>(from);
    int64_t i = 0;
    for (; i + S::lanes <= n; i += S::lanes) S::store(x + i, S::add(S::load(x + i), S::load(y + i)));
    if (const int left = static_cast<int>(n - i)) {
        S::store_some(x + i, S::add(S::load_some(x + i, left), S::load_some(y + i, left)), left);
    }
}

// x *= scale, rounded to its type.
template <class S, class Element>
void scale_row(void* to, float scale, int64_t n) {
    Element* x = static_cast<Element*>(to);
    const auto factor = S::all(scale);
    int64_t i = 0;
    for (; i + S::lanes <= n; i += S::lanes) S::store(x + i, S::mul(S::load(x + i), factor));
    if (const int left = static_cast<int>(n - i)) {
        S::store_some(x + i, S::mul(S::load_some(x + i, left), factor), left);
    }
}

}  // namespace
}  // namespace llmctl
