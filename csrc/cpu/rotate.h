// Rotary positions: pairs (i, i + dims / 2) of a head, turned by their angle.
#pragma once

#include <cstdint>

#include "cpu/bf16.h"

namespace llmctl {
namespace {

// The first `dims` elements of one head, given the cosines and sines of its token; the others are copied. Rounded once.
template <class S, class Element>
void rotate_head(const void* from, const void* cosines, const void* sines, void* to, int64_t head_dim, int64_t dims) {
    const Element* x = static_cast<const Element*>(from);
    const Element *cos = static_cast<const Element*>(cosines), *sin = static_cast<const Element*>(sines);
    Element* out = static_cast<Element*>(to);
    const int64_t half = dims / 2;
    int64_t i = 0;
    for (; i + S::lanes <= half; i += S::lanes) {
        const auto a = S::load(x + i), b = S::load(x + half + i);
        const auto minus_b = S::sub(S::zero(), b);
        S::store(out + i, S::fma(a, S::load(cos + i), S::mul(minus_b, S::load(sin + i))));
        S::store(out + half + i, S::fma(b, S::load(cos + half + i), S::mul(a, S::load(sin + half + i))));
    }
    if (const int left = static_cast<int>(half - i)) {
        const auto a = S::load_some(x + i, left), b = S::load_some(x + half + i, left);
        const auto minus_b = S::sub(S::zero(), b);
        const auto first = S::fma(a, S::load_some(cos + i, left), S::mul(minus_b, S::load_some(sin + i, left)));
        const auto second =
            S::fma(b, S::load_some(cos + half + i, left), S::mul(a, S::load_some(sin + half + i, left)));
        S::store_some(out + i, first, left);
        S::store_some(out + half + i, second, left);
    }
    for (i = dims; i < head_dim; ++i) out[i] = x[i];
}

}  // namespace
}  // namespace llmctl
