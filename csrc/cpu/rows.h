// What the kernels that work row by row share: exp, one function per instruction set, rows for the threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/bf16.h"
#include "cpu/dtype.h"
#include "cpu/pool.h"

// One function, compiled for each level of x86-64 and chosen by the loader from what the processor has.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define LLMCTL_FOR_EACH_ISA __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LLMCTL_FOR_EACH_ISA
#endif

namespace llmctl {

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

// Calls body(first, last) for stretches of [0, n_rows) on the threads of the pool.
template <class Body>
void for_rows(int64_t n_rows, const Body& body) {
    constexpr int64_t rows_at_a_time = 8;
    parallel_for((n_rows + rows_at_a_time - 1) / rows_at_a_time,
                 [&](int64_t i) { body(i * rows_at_a_time, std::min((i + 1) * rows_at_a_time, n_rows)); });
}

}  // namespace llmctl
