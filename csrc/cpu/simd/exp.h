// Exponential functions of vectors.
#pragma once

#include "cpu/bf16.h"

namespace llmctl {
namespace {

// exp(x) for x <= 88, to 2 units in the last place; 0 below -87, where floats lose precision. NaN stays NaN.
template <class S>
LLMCTL_INLINE typename S::Vec exp(typename S::Vec x) {
    const auto lowest = S::all(-87.0f);
    const auto kept = S::max(lowest, x);
    const auto k = S::round(S::mul(kept, S::all(1.44269504f)));
    // x - k ln 2, in two parts
    auto r = S::fma(k, S::all(-0.693145752f), kept);
    r = S::fma(k, S::all(-1.42860677e-6f), r);
    auto p = S::fma(S::all(1.38888889e-3f), r, S::all(8.33333333e-3f));
    p = S::fma(p, r, S::all(4.16666667e-2f));
    p = S::fma(p, r, S::all(1.66666667e-1f));
    p = S::fma(p, r, S::all(0.5f));
    p = S::fma(p, r, S::all(1.0f));
    p = S::fma(p, r, S::all(1.0f));
    return S::zero_below(S::scale_by_power(p, k), x, lowest);
}

template <class S>
LLMCTL_INLINE typename S::Vec tanh(typename S::Vec x) {
    const auto one = S::all(1.0f);
    // 1 - 2 / (exp(2x) + 1), whose limits are those of tanh
    const auto e = exp<S>(S::min(S::all(80.0f), S::add(x, x)));
    return S::sub(one, S::div(S::all(2.0f), S::add(e, one)));
}

// exp of one number, by the same steps.
template <class S>
LLMCTL_INLINE float exp_one(float x) {
    float values[S::lanes];
    S::store(values, exp<S>(S::all(x)));
    return values[0];
}

}  // namespace
}  // namespace llmctl
