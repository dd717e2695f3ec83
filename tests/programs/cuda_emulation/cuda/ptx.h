// What csrc/cuda/ptx.h offers, for the emulation: fragments lie in a warp's lanes as the PTX ISA says.
#pragma once

#include <cuda_runtime.h>

#include "cuda/device.h"

namespace llmctl {
namespace cuda {

template <class T>
T* dynamic_shared() {
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(emulation::block->shared.data()) + 127) / 128 * 128);
}

inline void copy_16_bytes_async(void* to, const void* from) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) std::abort();
    std::memcpy(to, from, 16);
}
inline void copy_4_bytes_async(void* to, const void* from) { std::memcpy(to, from, 4); }
inline void commit_copies() {}
template <int Pending>
void wait_for_copies() {}

template <int N>
Words<N> load_again(const void* from) {
    if (reinterpret_cast<uintptr_t>(from) % (4 * N)) std::abort();
    return *static_cast<const Words<N>*>(from);
}
inline Words<4> load_16_bytes_once(const void* from) { return load_again<4>(from); }

inline float half_to_float(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent == 31   ? fraction ? NAN : INFINITY
                       : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                       : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
    return bits & 0x8000 ? -size : size;
}

inline float half_of(uint32_t pair, int which) { return __uint_as_float(which ? pair & 0xFFFF0000u : pair << 16); }

inline uint32_t add_bf16_pair(uint32_t a, uint32_t b) {
    return bf16_pair(half_of(a, 0) + half_of(b, 0), half_of(a, 1) + half_of(b, 1));
}

// 9.7.14 of the PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type".
inline void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Brought {
        uint32_t a[4], b[2];
    };
    const auto all = emulation::exchange(Brought{{a[0], a[1], a[2], a[3]}, {b0, b1}});
    const unsigned lane = emulation::block->current % 32, group = lane / 4, within = lane % 4;
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = group + (i >= 2 ? 8 : 0), column = 2 * within + i % 2;
        double sum = c[i];
        for (unsigned k = 0; k < 16; ++k) {
            const unsigned place = k % 8 / 2;
            const uint32_t pair_a = all[row % 8 * 4 + place].a[(row >= 8 ? 1 : 0) + (k >= 8 ? 2 : 0)];
            const uint32_t pair_b = all[column * 4 + place].b[k >= 8];
            sum += static_cast<double>(half_of(pair_a, k % 2)) * half_of(pair_b, k % 2);
        }
        c[i] = static_cast<float>(sum);
    }
}

inline void load_transposed_8x8x4(uint32_t (&out)[4], const void* row) {
    const auto rows = emulation::exchange(reinterpret_cast<uintptr_t>(row));
    const unsigned lane = emulation::block->current % 32, group = lane / 4, within = lane % 4;
    for (unsigned m = 0; m < 4; ++m) {
        uint32_t pair = 0;
        for (unsigned half = 0; half < 2; ++half) {
            const uintptr_t from = rows[m * 8 + 2 * within + half];
            if (from % 16) std::abort();
            pair |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(from)[group]) << (16 * half);
        }
        out[m] = pair;
    }
}

}  // namespace cuda
}  // namespace llmctl
