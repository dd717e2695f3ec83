// 8 floats in an AVX2 register, with FMA. Included by files that are compiled for AVX2 alone.
#pragma once

#include <immintrin.h>

#include "cpu/bf16.h"

namespace llmctl {
namespace {

struct Avx2 {
    using Vec = __m256;
    static constexpr int lanes = 8;

    static LLMCTL_INLINE Vec zero() { return _mm256_setzero_ps(); }
    static LLMCTL_INLINE Vec all(float x) { return _mm256_set1_ps(x); }

    static LLMCTL_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
    static LLMCTL_INLINE Vec load(const Bf16* p) {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    }
    // Bytes as floats: all of them, their lower or their upper four bits.
    static LLMCTL_INLINE Vec load_bytes(const uint8_t* p) { return _mm256_cvtepi32_ps(bytes(p)); }
    static LLMCTL_INLINE Vec load_lower(const uint8_t* p) {
        return _mm256_cvtepi32_ps(_mm256_and_si256(bytes(p), _mm256_set1_epi32(15)));
    }
    static LLMCTL_INLINE Vec load_upper(const uint8_t* p) { return _mm256_cvtepi32_ps(_mm256_srli_epi32(bytes(p), 4)); }
    // The first n lanes, 0 < n < lanes; the others are 0, and nothing behind the n is read or written.
    template <class T>
    static LLMCTL_INLINE Vec load_some(const T* p, int n) {
        T padded[lanes] = {};
        for (int i = 0; i < n; ++i) padded[i] = p[i];
        return load(padded);
    }
    static LLMCTL_INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
    static LLMCTL_INLINE void store(Bf16* p, Vec x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x)); }
    template <class T>
    static LLMCTL_INLINE void store_some(T* p, Vec x, int n) {
        T padded[lanes];
        store(padded, x);
        for (int i = 0; i < n; ++i) p[i] = padded[i];
    }

    static LLMCTL_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
    static LLMCTL_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
    static LLMCTL_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
    static LLMCTL_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
    static LLMCTL_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
    // Where one of both is NaN the result is b, so that limits(x) = min(limit, x) keeps NaN.
    static LLMCTL_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
    static LLMCTL_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
    static LLMCTL_INLINE Vec round(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    // a * 2^k for whole k of at most 127 in absolute value
    static LLMCTL_INLINE Vec scale_by_power(Vec a, Vec k) {
        const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(k), _mm256_set1_epi32(127));
        return mul(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
    }

    // The sums over all lanes of four vectors, each in the same order of additions.
    static LLMCTL_INLINE void sums(const Vec x[4], float to[4]) {
        const Vec ab = add(_mm256_unpacklo_ps(x[0], x[1]), _mm256_unpackhi_ps(x[0], x[1]));
        const Vec cd = add(_mm256_unpacklo_ps(x[2], x[3]), _mm256_unpackhi_ps(x[2], x[3]));
        const __m256d lower = _mm256_unpacklo_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));
        const __m256d upper = _mm256_unpackhi_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));
        const Vec abcd = add(_mm256_castpd_ps(lower), _mm256_castpd_ps(upper));
        _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
    }
    // x where y >= limit or is NaN, 0 elsewhere
    static LLMCTL_INLINE Vec zero_below(Vec x, Vec y, Vec limit) {
        return _mm256_and_ps(_mm256_cmp_ps(y, limit, _CMP_NLT_UQ), x);
    }
    static LLMCTL_INLINE bool any_at_least(Vec a, Vec b) {
        return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)) != 0;
    }
    static LLMCTL_INLINE bool any_nan(Vec a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)) != 0; }
    static LLMCTL_INLINE float highest(Vec x) {
        __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        half = _mm_max_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
    }
    static LLMCTL_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

private:
    static LLMCTL_INLINE __m256i bytes(const uint8_t* p) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    }
    // To the nearest, ties to even; NaN stays NaN.
    static LLMCTL_INLINE __m128i narrow(Vec x) {
        const __m256i bits = _mm256_castps_si256(x), upper = _mm256_srli_epi32(bits, 16);
        const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
        const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
        const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        const __m256i chosen = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), quiet, is_nan);
        return _mm_packus_epi32(_mm256_castsi256_si128(chosen), _mm256_extracti128_si256(chosen, 1));
    }
};

}  // namespace
}  // namespace llmctl
