// Products of pairs of bfloat16, added up in floats.
#pragma once

#include "cpu/simd/avx512.h"

namespace llmctl {
namespace {

// AVX-512 with the processor's own rounding to bfloat16.
struct Avx512Bf16 : Avx512 {
    using Avx512::store;
    using Avx512::store_some;
    static LLMCTL_INLINE void store(Bf16* p, Vec x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
    }
    static LLMCTL_INLINE void store_some(Bf16* p, Vec x, int n) {
        const auto mask = static_cast<__mmask16>((1u << n) - 1);
        _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(x));
    }
};

struct Bf16Dot {
    using Simd = Avx512Bf16;
    using Element = Bf16;
    using Operand = __m512bh;
    static constexpr int step = 32;

    static LLMCTL_INLINE Operand load(const Bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static LLMCTL_INLINE Operand load_some(const Bf16* p, int n) {
        return (__m512bh)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1u << n) - 1), p);
    }
    static LLMCTL_INLINE __m512 multiply_add(Operand a, Operand b, __m512 sum) { return _mm512_dpbf16_ps(sum, a, b); }
};

}  // namespace
}  // namespace llmctl
