// Codes of 4 or 8 bits to bfloat16, 32 at a time.
#pragma once

#include "cpu/quantized_linear.h"
#include "cpu/simd/avx512_bf16.h"

namespace llmctl {
namespace {

template <>
struct Dequantizer<Avx512Bf16, Bf16> {
    static LLMCTL_INLINE void group(int bits, const uint8_t* codes, int64_t begin, int64_t end, float scale, float zero,
                                    Bf16* to) {
        bits == 8 ? bytes(codes, begin, end, scale, zero, to) : halves(codes, begin, end, scale, zero, to);
    }

private:
    static LLMCTL_INLINE __m512 product(__m512i codes, __m512 zeros, __m512 scales) {
        return _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(codes), zeros), scales);
    }

    static LLMCTL_INLINE void bytes(const uint8_t* codes, int64_t begin, int64_t end, float scale, float zero,
                                    Bf16* to) {
        const __m512 scales = _mm512_set1_ps(scale), zeros = _mm512_set1_ps(zero);
        for (int64_t i = begin; i < end; i += 32) {
            const auto* from = reinterpret_cast<const __m128i*>(codes + i);
            const __m512 first = product(_mm512_cvtepu8_epi32(_mm_loadu_si128(from)), zeros, scales);
            const __m512 second = product(_mm512_cvtepu8_epi32(_mm_loadu_si128(from + 1)), zeros, scales);
            _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(second, first));
        }
    }

    // Four bits have 16 values: a group's are worked out once and looked up.
    static LLMCTL_INLINE void halves(const uint8_t* codes, int64_t begin, int64_t end, float scale, float zero,
                                     Bf16* to) {
        const __m512i all = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512 values = product(all, _mm512_set1_ps(zero), _mm512_set1_ps(scale));
        const __m512i table = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(values));
        const __m512i low = _mm512_set1_epi16(15);
        for (int64_t i = begin; i < end;) {
            const auto* from = reinterpret_cast<const __m256i*>(codes + i / 64 * 32);
            const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(from));
            if (i % 64 == 0) {
                _mm512_storeu_si512(to + i, _mm512_permutexvar_epi16(_mm512_and_si512(words, low), table));
                i += 32;
            }
            if (i < end) {
                _mm512_storeu_si512(to + i, _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table));
                i += 32;
            }
        }
    }
};

}  // namespace
}  // namespace llmctl
