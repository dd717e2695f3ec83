// 4 floats one by one, in what every processor can do; the compiler may put them into a register of its own.
#pragma once

#include "cpu/bf16.h"

namespace llmctl {
namespace {

struct Scalar {
    struct Vec {
        float lane[4];
    };
    static constexpr int lanes = 4;

    static LLMCTL_INLINE Vec zero() { return all(0.0f); }
    static LLMCTL_INLINE Vec all(float x) { return {{x, x, x, x}}; }

    template <class T>
    static LLMCTL_INLINE Vec load(const T* p) {
        return each([=](int i) { return llmctl::load(p[i]); });
    }
    // Bytes as floats: all of them, their lower or their upper four bits.
    static LLMCTL_INLINE Vec load_bytes(const uint8_t* p) {
        return each([=](int i) { return static_cast<float>(p[i]); });
    }
    static LLMCTL_INLINE Vec load_lower(const uint8_t* p) {
        return each([=](int i) { return static_cast<float>(p[i] & 15); });
    }
    static LLMCTL_INLINE Vec load_upper(const uint8_t* p) {
        return each([=](int i) { return static_cast<float>(p[i] >> 4); });
    }
    // The first n lanes, 0 < n < lanes; the others are 0, and nothing behind the n is read or written.
    template <class T>
    static LLMCTL_INLINE Vec load_some(const T* p, int n) {
        return each([=](int i) { return i < n ? llmctl::load(p[i]) : 0.0f; });
    }
    template <class T>
    static LLMCTL_INLINE void store(T* p, Vec x) {
        store_some(p, x, lanes);
    }
    template <class T>
    static LLMCTL_INLINE void store_some(T* p, Vec x, int n) {
        for (int i = 0; i < n; ++i) llmctl::store(p[i], x.lane[i]);
    }

    static LLMCTL_INLINE Vec add(Vec a, Vec b) {
        return each([&](int i) { return a.lane[i] + b.lane[i]; });
    }
    static LLMCTL_INLINE Vec sub(Vec a, Vec b) {
        return each([&](int i) { return a.lane[i] - b.lane[i]; });
    }
    static LLMCTL_INLINE Vec mul(Vec a, Vec b) {
        return each([&](int i) { return a.lane[i] * b.lane[i]; });
    }
    static LLMCTL_INLINE Vec div(Vec a, Vec b) {
        return each([&](int i) { return a.lane[i] / b.lane[i]; });
    }
    static LLMCTL_INLINE Vec fma(Vec a, Vec b, Vec c) { return add(mul(a, b), c); }
    // Where one of both is NaN the result is b, so that limits(x) = min(limit, x) keeps NaN.
    static LLMCTL_INLINE Vec max(Vec a, Vec b) {
        return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
    }
    static LLMCTL_INLINE Vec min(Vec a, Vec b) {
        return each([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
    }
    // For absolute values below 2^22: a sum so large has no room for a fraction.
    static LLMCTL_INLINE Vec round(Vec a) { return sub(add(a, all(12582912.0f)), all(12582912.0f)); }
    // a * 2^k for whole k of at most 127 in absolute value
    static LLMCTL_INLINE Vec scale_by_power(Vec a, Vec k) {
        return each([&](int i) {
            const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(k.lane[i]) + 127) << 23;
            float power;
            std::memcpy(&power, &bits, 4);
            return a.lane[i] * power;
        });
    }

    // The sums over all lanes of four vectors, each in the same order of additions.
    static LLMCTL_INLINE void sums(const Vec x[4], float to[4]) {
        for (int i = 0; i < 4; ++i) to[i] = (x[i].lane[0] + x[i].lane[1]) + (x[i].lane[2] + x[i].lane[3]);
    }
    // x where y >= limit or is NaN, 0 elsewhere
    static LLMCTL_INLINE Vec zero_below(Vec x, Vec y, Vec limit) {
        return each([&](int i) { return y.lane[i] < limit.lane[i] ? 0.0f : x.lane[i]; });
    }
    static LLMCTL_INLINE bool any_at_least(Vec a, Vec b) {
        bool found = false;
        for (int i = 0; i < lanes; ++i) found |= a.lane[i] >= b.lane[i];
        return found;
    }
    static LLMCTL_INLINE bool any_nan(Vec a) {
        bool found = false;
        for (int i = 0; i < lanes; ++i) found |= a.lane[i] != a.lane[i];
        return found;
    }
    static LLMCTL_INLINE float highest(Vec x) {
        const float a = x.lane[0] > x.lane[1] ? x.lane[0] : x.lane[1];
        const float b = x.lane[2] > x.lane[3] ? x.lane[2] : x.lane[3];
        return a > b ? a : b;
    }
    static LLMCTL_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

private:
    template <class Body>
    static LLMCTL_INLINE Vec each(Body body) {
        return {{body(0), body(1), body(2), body(3)}};
    }
};

}  // namespace
}  // namespace llmctl
