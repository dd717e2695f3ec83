// Activations of a feed-forward layer, and their product with the other branch of a gated one.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/exp.h"
#include "llmctl.h"

namespace llmctl {
namespace {

// erf to 4 units in the last place: a quotient of polynomials in x^2 (those of Eigen and XLA) on [-4, 4], 1 beyond.
template <class S>
LLMCTL_INLINE typename S::Vec erf(typename S::Vec x) {
    x = S::min(S::all(4.0f), S::max(S::all(-4.0f), x));
    const auto y = S::mul(x, x);
    constexpr float over[] = {-2.72614225801306e-10f, 2.77068142495902e-08f,  -2.10102402082508e-06f,
                              -5.69250639462346e-05f, -7.34990630326855e-04f, -2.95459980854025e-03f,
                              -1.60960333262415e-02f};
    constexpr float under[] = {-1.45660718464996e-05f, -2.13374055278905e-04f, -1.68282697438203e-03f,
                               -7.37332916720468e-03f, -1.42647390514189e-02f};
    auto p = S::zero(), q = S::zero();
    for (const float c : over) p = S::fma(p, y, S::all(c));
    for (const float c : under) q = S::fma(q, y, S::all(c));
    return S::div(S::mul(x, p), q);
}

template <class S, int Kind>
LLMCTL_INLINE typename S::Vec activation(typename S::Vec x) {
    const auto one = S::all(1.0f);
    if constexpr (Kind == LLMCTL_SILU) {
        const auto e = exp<S>(S::min(S::all(88.0f), S::sub(S::zero(), x)));
        return S::div(x, S::add(one, e));
    } else if constexpr (Kind == LLMCTL_GELU) {
        return S::mul(S::mul(S::all(0.5f), x), S::add(one, erf<S>(S::mul(x, S::all(0.70710678f)))));
    } else if constexpr (Kind == LLMCTL_GELU_TANH) {
        const auto inner = S::fma(S::mul(S::mul(x, x), x), S::all(0.044715f), x);
        return S::mul(S::mul(S::all(0.5f), x), S::add(one, tanh<S>(S::mul(inner, S::all(0.79788456f)))));
    } else {
        return S::max(S::zero(), x);
    }
}

// An activation and its derivative.
template <class S>
struct ValueAndSlope {
    typename S::Vec value, slope;
};

template <class S, int Kind>
LLMCTL_INLINE ValueAndSlope<S> activation_and_slope(typename S::Vec x) {
    const auto one = S::all(1.0f), half = S::all(0.5f);
    if constexpr (Kind == LLMCTL_SILU) {
        const auto e = exp<S>(S::min(S::all(88.0f), S::sub(S::zero(), x)));
        const auto share = S::div(one, S::add(one, e));
        return {S::mul(x, share), S::mul(share, S::fma(x, S::sub(one, share), one))};
    } else if constexpr (Kind == LLMCTL_GELU) {
        const auto below = S::mul(half, S::add(one, erf<S>(S::mul(x, S::all(0.70710678f)))));
        const auto density = S::mul(S::all(0.39894228f), exp<S>(S::mul(S::all(-0.5f), S::mul(x, x))));
        return {S::mul(x, below), S::fma(x, density, below)};
    } else if constexpr (Kind == LLMCTL_GELU_TANH) {
        const auto square = S::mul(x, x);
        const auto inner = S::fma(S::mul(square, x), S::all(0.044715f), x);
        const auto t = tanh<S>(S::mul(inner, S::all(0.79788456f)));
        const auto below = S::mul(half, S::add(one, t));
        const auto rate = S::mul(S::all(0.79788456f), S::fma(square, S::all(0.134145f), one));
        const auto curve = S::mul(S::mul(half, x), S::sub(one, S::mul(t, t)));
        return {S::mul(x, below), S::fma(curve, rate, below)};
    } else {
        return {S::max(S::zero(), x), S::zero_below(one, x, S::all(1e-45f))};
    }
}

// Of y = activation(x) * up: the gradients of x and up from that of y.
template <class S, class Element, int Kind>
void gated_gradient(const GatedGradient& c, int64_t first, int64_t n) {
    const auto at = [&](const void* p) { return static_cast<const Element*>(p) + first; };
    const Element *grad = at(c.grad), *x = at(c.x), *up = at(c.up);
    auto *grad_x = static_cast<Element*>(c.grad_x) + first, *grad_up = static_cast<Element*>(c.grad_up) + first;
    int64_t i = 0;
    for (; i + S::lanes <= n; i += S::lanes) {
        const auto g = S::load(grad + i);
        const auto y = activation_and_slope<S, Kind>(S::load(x + i));
        S::store(grad_up + i, S::mul(g, y.value));
        S::store(grad_x + i, S::mul(S::mul(g, S::load(up + i)), y.slope));
    }
    if (const int left = static_cast<int>(n - i)) {
        const auto g = S::load_some(grad + i, left);
        const auto y = activation_and_slope<S, Kind>(S::load_some(x + i, left));
        S::store_some(grad_up + i, S::mul(g, y.value), left);
        S::store_some(grad_x + i, S::mul(S::mul(g, S::load_some(up + i, left)), y.slope), left);
    }
}

template <class S, class Element>
void gated_gradient_kernel(int32_t kind, const GatedGradient& c, int64_t first, int64_t n) {
    switch (kind) {
        case LLMCTL_SILU:
            return gated_gradient<S, Element, LLMCTL_SILU>(c, first, n);
        case LLMCTL_GELU:
            return gated_gradient<S, Element, LLMCTL_GELU>(c, first, n);
        case LLMCTL_GELU_TANH:
            return gated_gradient<S, Element, LLMCTL_GELU_TANH>(c, first, n);
        case LLMCTL_RELU:
            return gated_gradient<S, Element, LLMCTL_RELU>(c, first, n);
    }
}

// out = activation(x) * up, or without the product where up is null, for n elements.
template <class S, class Element, int Kind>
void activate(const Element* x, const Element* up, Element* out, int64_t n) {
    int64_t i = 0;
    for (; i + S::lanes <= n; i += S::lanes) {
        const auto y = activation<S, Kind>(S::load(x + i));
        S::store(out + i, up ? S::mul(y, S::load(up + i)) : y);
    }
    if (const int left = static_cast<int>(n - i)) {
        const auto y = activation<S, Kind>(S::load_some(x + i, left));
        S::store_some(out + i, up ? S::mul(y, S::load_some(up + i, left)) : y, left);
    }
}

template <class S, class Element>
void activation_kernel(int32_t kind, const void* x, const void* up, void* out, int64_t first, int64_t n) {
    const Element* from = static_cast<const Element*>(x) + first;
    const Element* other = up ? static_cast<const Element*>(up) + first : nullptr;
    Element* to = static_cast<Element*>(out) + first;
    switch (kind) {
        case LLMCTL_SILU:
            return activate<S, Element, LLMCTL_SILU>(from, other, to, n);
        case LLMCTL_GELU:
            return activate<S, Element, LLMCTL_GELU>(from, other, to, n);
        case LLMCTL_GELU_TANH:
            return activate<S, Element, LLMCTL_GELU_TANH>(from, other, to, n);
        case LLMCTL_RELU:
            return activate<S, Element, LLMCTL_RELU>(from, other, to, n);
    }
}

}  // namespace
}  // namespace llmctl
