// The running sums of a dot product in plain float arithmetic, for elements of either type.
#pragma once

#include "cpu/bf16.h"

namespace llmctl {
namespace {

template <class S, class T>
struct FloatDot {
    using Simd = S;
    using Element = T;
    using Operand = typename S::Vec;
    static constexpr int step = S::lanes;

    static LLMCTL_INLINE Operand load(const T* p) { return S::load(p); }
    static LLMCTL_INLINE Operand load_some(const T* p, int n) { return S::load_some(p, n); }
    static LLMCTL_INLINE Operand multiply_add(Operand a, Operand b, Operand sum) { return S::fma(a, b, sum); }
};

}  // namespace
}  // namespace llmctl
