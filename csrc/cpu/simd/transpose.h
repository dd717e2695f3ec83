// 16 x 16 elements of 32 bits, turned about. Included by files that are compiled for AVX-512 alone.
#pragma once

#include <immintrin.h>

#include "cpu/bf16.h"

namespace llmctl {
namespace {

LLMCTL_INLINE void transpose(__m512i x[16]) {
    __m512i y[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {  // x[i + j]: column 4 q + j of rows i to i + 3, in quarter q
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const __m512i ab = _mm512_shuffle_i32x4(x[j], x[4 + j], 0x88), cd = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x88);
        const __m512i ef = _mm512_shuffle_i32x4(x[j], x[4 + j], 0xdd), gh = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xdd);
        y[j] = _mm512_shuffle_i32x4(ab, cd, 0x88);
        y[8 + j] = _mm512_shuffle_i32x4(ab, cd, 0xdd);
        y[4 + j] = _mm512_shuffle_i32x4(ef, gh, 0x88);
        y[12 + j] = _mm512_shuffle_i32x4(ef, gh, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = y[i];
}

}  // namespace
}  // namespace llmctl
