// 16 floats in an AVX-512 register. Included by files that are compiled for AVX-512 alone.
#pragma once

#include <immintrin.h>

#include "cpu/bf16.h"

namespace llmctl {
namespace {

struct Avx512 {
    using Vec = __m512;
    static constexpr int lanes = 16;

    static LLMCTL_INLINE Vec zero() { return _mm512_setzero_ps(); }
    static LLMCTL_INLINE Vec all(float x) { return _mm512_set1_ps(x); }

    static LLMCTL_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
    static LLMCTL_INLINE Vec load(const Bf16* p) {
        return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    // Bytes as floats: all of them, their lower or their upper four bits.
    static LLMCTL_INLINE Vec load_bytes(const uint8_t* p) { return _mm512_cvtepi32_ps(bytes(p)); }
    static LLMCTL_INLINE Vec load_lower(const uint8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_and_si512(bytes(p), _mm512_set1_epi32(15)));
    }
    static LLMCTL_INLINE Vec load_upper(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_srli_epi32(bytes(p), 4)); }
    // The first n lanes, 0 < n < lanes; the others are 0, and nothing behind the n is read or written.
    static LLMCTL_INLINE Vec load_some(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
    static LLMCTL_INLINE Vec load_some(const Bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
    static LLMCTL_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
    static LLMCTL_INLINE void store(Bf16* p, Vec x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }
    static LLMCTL_INLINE void store_some(float* p, Vec x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }
    static LLMCTL_INLINE void store_some(Bf16* p, Vec x, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow(x)); }

    static LLMCTL_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
    static LLMCTL_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
    static LLMCTL_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
    static LLMCTL_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
    static LLMCTL_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
    // Where one of both is NaN the result is b, so that limits(x) = min(limit, x) keeps NaN.
    static LLMCTL_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
    static LLMCTL_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
    static LLMCTL_INLINE Vec round(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
    // a * 2^k for whole k of at most 127 in absolute value
    static LLMCTL_INLINE Vec scale_by_power(Vec a, Vec k) { return _mm512_scalef_ps(a, k); }

    // The sums over all lanes of four vectors, each in the same order of additions.
    static LLMCTL_INLINE void sums(const Vec x[4], float to[4]) {
        const Vec ab = add(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
        const Vec cd = add(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
        const __m512d lower = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        const __m512d upper = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        const Vec abcd = add(_mm512_castpd_ps(lower), _mm512_castpd_ps(upper));
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
        _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
    }
    // x where y >= limit or is NaN, 0 elsewhere
    static LLMCTL_INLINE Vec zero_below(Vec x, Vec y, Vec limit) {
        return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, limit, _CMP_NLT_UQ), x);
    }
    static LLMCTL_INLINE bool any_at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ) != 0; }
    static LLMCTL_INLINE bool any_nan(Vec a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) != 0; }
    static LLMCTL_INLINE float highest(Vec x) { return _mm512_reduce_max_ps(x); }
    static LLMCTL_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

private:
    static LLMCTL_INLINE __m512i bytes(const uint8_t* p) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static LLMCTL_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
    static LLMCTL_INLINE Vec widen(__m256i x) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
    }
    // To the nearest, ties to even; NaN stays NaN.
    static LLMCTL_INLINE __m256i narrow(Vec x) {
        const __m512i bits = _mm512_castps_si512(x), upper = _mm512_srli_epi32(bits, 16);
        const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
        const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __m512i quiet = _mm512_or_si512(upper, _mm512_set1_epi32(0x40));
        const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), is_nan, quiet));
    }
};

}  // namespace
}  // namespace llmctl
