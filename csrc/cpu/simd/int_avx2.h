// 8 whole numbers in an AVX2 register, and products of bytes added up in them.
#pragma once

#include "cpu/simd/avx2.h"

namespace llmctl {
namespace {

struct Avx2Int {
    using Simd = Avx2;
    using Vec = __m256i;
    using Codes = __m256i;
    static constexpr int lanes = 8;

    static LLMCTL_INLINE Vec all(int32_t x) { return _mm256_set1_epi32(x); }
    static LLMCTL_INLINE Vec load_bytes(const uint8_t* p) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    }
    static LLMCTL_INLINE Vec add(Vec a, Vec b) { return _mm256_add_epi32(a, b); }
    static LLMCTL_INLINE Vec mul(Vec a, Vec b) { return _mm256_mullo_epi32(a, b); }
    static LLMCTL_INLINE Simd::Vec to_float(Vec a) { return _mm256_cvtepi32_ps(a); }
    static LLMCTL_INLINE Simd::Vec load_halves(const uint16_t* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }

    static LLMCTL_INLINE Codes load_codes(const uint8_t* p) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    }
    static LLMCTL_INLINE Codes low(Codes a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
    static LLMCTL_INLINE Codes high(Codes a) { return low(_mm256_srli_epi16(a, 4)); }
    // Lane by lane, sum + four codes, below 2^Bits, times four signed numbers.
    template <int Bits>
    static LLMCTL_INLINE Vec dot(Vec sum, Codes codes, const int8_t* x) {
        int32_t four;
        std::memcpy(&four, x, 4);
        const __m256i xs = all(four);
        if constexpr (Bits == 4) {
            const __m256i pairs = _mm256_maddubs_epi16(codes, xs);
            return add(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        } else {  // pairs of products do not fit 16 bits: the even bytes by themselves, then the odd ones
            const __m256i even = _mm256_madd_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(255)),
                                                   _mm256_srai_epi16(_mm256_slli_epi16(xs, 8), 8));
            const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), _mm256_srai_epi16(xs, 8));
            return add(sum, add(even, odd));
        }
    }
};

}  // namespace
}  // namespace llmctl
