// What the kernels that work row by row share: element types, exp, one function per instruction set, threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

#include "llmctl.h"

// One function, compiled for each level of x86-64 and chosen by the loader from what the processor has.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define LLMCTL_FOR_EACH_ISA __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LLMCTL_FOR_EACH_ISA
#endif
// Of a template that such functions call: it must be compiled into each of them.
#define LLMCTL_INLINE __attribute__((always_inline)) inline

namespace llmctl {

struct Bf16 {
    uint16_t bits;
};

LLMCTL_INLINE float load(float x) { return x; }

LLMCTL_INLINE float load(Bf16 x) {
    const uint32_t bits = uint32_t{x.bits} << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

LLMCTL_INLINE void store(float& to, float value) { to = value; }

// To the nearest, ties to even.
LLMCTL_INLINE void store(Bf16& to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    to.bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// exp(x) for x <= 0, to 2 units in the last place: 2^k times a polynomial on [-ln 2 / 2, ln 2 / 2].
LLMCTL_INLINE float exp_of_negative(float x) {
    x = x < -87.0f ? -87.0f : x;
    const int k = static_cast<int>(x * 1.44269504f - 0.5f);
    const float r = (x - static_cast<float>(k) * 0.693145752f) - static_cast<float>(k) * 1.42860677e-6f;
    float p = 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const int32_t exponent = (k + 127) << 23;
    float scale;
    std::memcpy(&scale, &exponent, 4);
    return p * scale;
}

inline void check_dtype(int32_t dtype) {
    if (dtype != LLMCTL_F32 && dtype != LLMCTL_BF16) throw std::invalid_argument("expected float32 or bfloat16");
}

// Calls body(first, last) for stretches of [0, n_rows) on up to n_threads threads.
template <class Body>
void for_rows(int64_t n_rows, int32_t n_threads, const Body& body) {
    constexpr int64_t rows_at_a_time = 8;
    std::atomic<int64_t> next{0};
    auto work = [&] {
        for (int64_t first; (first = next.fetch_add(rows_at_a_time)) < n_rows;) {
            body(first, std::min(first + rows_at_a_time, n_rows));
        }
    };
    std::vector<std::thread> threads;
    try {
        while (static_cast<int32_t>(threads.size()) + 1 < n_threads) threads.emplace_back(work);
    } catch (const std::system_error&) {
        // The system gives no more threads; those there are do the work.
    }
    work();
    for (std::thread& thread : threads) thread.join();
}

}  // namespace llmctl
