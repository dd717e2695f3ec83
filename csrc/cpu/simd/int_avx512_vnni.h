// The same with one instruction for four products and their sum.
#pragma once

#include "cpu/simd/int_avx512.h"

namespace llmctl {
namespace {

struct Avx512Vnni : Avx512Int {
    template <int Bits>
    static LLMCTL_INLINE Vec dot(Vec sum, Codes codes, const int8_t* x) {
        int32_t four;
        std::memcpy(&four, x, 4);
        return _mm512_dpbusd_epi32(sum, codes, all(four));
    }
};

// With another type's floats: how it rounds to bfloat16.
template <class S>
struct Avx512VnniOf : Avx512Vnni {
    using Simd = S;
};

}  // namespace
}  // namespace llmctl
