// 4 whole numbers one by one, and products of bytes added up in them.
#pragma once

#include "cpu/simd/scalar.h"

namespace llmctl {
namespace {

struct ScalarInt {
    using Simd = Scalar;
    struct Vec {
        int32_t lane[4];
    };
    struct Codes {
        uint8_t byte[16];
    };
    static constexpr int lanes = 4;

    static LLMCTL_INLINE Vec all(int32_t x) { return {{x, x, x, x}}; }
    static LLMCTL_INLINE Vec load_bytes(const uint8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
    static LLMCTL_INLINE Vec add(Vec a, Vec b) {
        return each([&](int i) { return a.lane[i] + b.lane[i]; });
    }
    static LLMCTL_INLINE Vec mul(Vec a, Vec b) {
        return each([&](int i) { return a.lane[i] * b.lane[i]; });
    }
    static LLMCTL_INLINE Simd::Vec to_float(Vec a) {
        Simd::Vec x;
        for (int i = 0; i < lanes; ++i) x.lane[i] = static_cast<float>(a.lane[i]);
        return x;
    }
    static LLMCTL_INLINE Simd::Vec load_halves(const uint16_t* p) {
        Simd::Vec x;
        for (int i = 0; i < lanes; ++i) x.lane[i] = half(p[i]);
        return x;
    }

    static LLMCTL_INLINE Codes load_codes(const uint8_t* p) {
        Codes codes;
        std::memcpy(codes.byte, p, sizeof codes.byte);
        return codes;
    }
    static LLMCTL_INLINE Codes low(Codes a) {
        for (uint8_t& x : a.byte) x &= 15;
        return a;
    }
    static LLMCTL_INLINE Codes high(Codes a) {
        for (uint8_t& x : a.byte) x >>= 4;
        return a;
    }
    // Lane by lane, sum + four codes, below 2^Bits, times four signed numbers.
    template <int Bits>
    static LLMCTL_INLINE Vec dot(Vec sum, const Codes& codes, const int8_t* x) {
        return each([&](int i) {
            const uint8_t* w = codes.byte + 4 * i;
            return sum.lane[i] + w[0] * x[0] + w[1] * x[1] + w[2] * x[2] + w[3] * x[3];
        });
    }

private:
    template <class Body>
    static LLMCTL_INLINE Vec each(Body body) {
        return {{body(0), body(1), body(2), body(3)}};
    }
    static LLMCTL_INLINE float half(uint16_t x) {
        const uint32_t exponent = x >> 10 & 31, fraction = x & 1023;
        const float small = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24
        const uint32_t bits = exponent == 31 ? 0x7f800000 | fraction << 13 : (exponent + 112) << 23 | fraction << 13;
        float value;
        std::memcpy(&value, &bits, 4);
        value = exponent == 0 ? small : value;
        return x >> 15 ? -value : value;
    }
};

}  // namespace
}  // namespace llmctl
