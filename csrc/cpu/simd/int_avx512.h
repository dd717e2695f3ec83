// 16 whole numbers in an AVX-512 register, and products of bytes added up in them.
#pragma once

#include "cpu/simd/avx512.h"

namespace llmctl {
namespace {

struct Avx512Int {
    using Simd = Avx512;
    using Vec = __m512i;
    using Codes = __m512i;
    static constexpr int lanes = 16;

    static LLMCTL_INLINE Vec all(int32_t x) { return _mm512_set1_epi32(x); }
    static LLMCTL_INLINE Vec load_bytes(const uint8_t* p) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static LLMCTL_INLINE Vec add(Vec a, Vec b) { return _mm512_add_epi32(a, b); }
    static LLMCTL_INLINE Vec mul(Vec a, Vec b) { return _mm512_mullo_epi32(a, b); }
    static LLMCTL_INLINE Simd::Vec to_float(Vec a) { return _mm512_cvtepi32_ps(a); }
    static LLMCTL_INLINE Simd::Vec load_halves(const uint16_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }

    static LLMCTL_INLINE Codes load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static LLMCTL_INLINE Codes low(Codes a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
    static LLMCTL_INLINE Codes high(Codes a) { return low(_mm512_srli_epi16(a, 4)); }
    // Lane by lane, sum + four codes, below 2^Bits, times four signed numbers.
    template <int Bits>
    static LLMCTL_INLINE Vec dot(Vec sum, Codes codes, const int8_t* x) {
        int32_t four;
        std::memcpy(&four, x, 4);
        const __m512i xs = all(four);
        if constexpr (Bits == 4) {
            const __m512i pairs = _mm512_maddubs_epi16(codes, xs);
            return add(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
        } else {  // pairs of products do not fit 16 bits: the even bytes by themselves, then the odd ones
            const __m512i even = _mm512_madd_epi16(_mm512_and_si512(codes, _mm512_set1_epi16(255)),
                                                   _mm512_srai_epi16(_mm512_slli_epi16(xs, 8), 8));
            const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(codes, 8), _mm512_srai_epi16(xs, 8));
            return add(sum, add(even, odd));
        }
    }
};

}  // namespace
}  // namespace llmctl
