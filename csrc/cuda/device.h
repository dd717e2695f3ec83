// What every kernel uses: element types, reductions of a warp and a block, and launches that report their errors.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "llmctl.h"

namespace llmctl {
namespace cuda {

constexpr int warp_size = 32;
constexpr unsigned every_lane = 0xFFFFFFFFu;

// bfloat16 by its bits.
struct Bf16 {
    uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

// To the nearest, ties to even; NaN stays NaN.
__device__ __forceinline__ uint16_t bf16_bits(float x) {
    const uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}
__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
    return bf16_bits(low) | static_cast<uint32_t>(bf16_bits(high)) << 16;
}
// Two of a word's bytes less a whole number, as a pair: exact as far as the difference is one of 8 bits.
__device__ __forceinline__ uint32_t bf16_of_bytes(uint32_t word, int first, int second, float less) {
    const float offset = 8388608.0f + less;  // 2^23, whose bits are 0x4B000000, and the last of them count ones
    const float low = __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7440 | first)) - offset;
    const float high = __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7440 | second)) - offset;
    return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
}
__device__ __forceinline__ void store(float* to, float x) { *to = x; }
__device__ __forceinline__ void store(Bf16* to, float x) { to->bits = bf16_bits(x); }

// As many 32-bit words as one load can bring.
template <int N>
struct alignas(4 * N) Words {
    uint32_t of[N];
};

struct Sum {
    template <class T>
    __device__ T operator()(T a, T b) const {
        return a + b;
    }
};
struct Max {
    template <class T>
    __device__ T operator()(T a, T b) const {
        return a < b ? b : a;
    }
};

template <class T, class Combine>
__device__ __forceinline__ T reduce_warp(T value, Combine combine) {
    for (int distance = warp_size / 2; distance > 0; distance /= 2) {
        value = combine(value, __shfl_xor_sync(every_lane, value, distance));
    }
    return value;
}

// The same for a whole block of full warps; `room` holds a T for each warp and is free again afterwards.
template <class T, class Combine>
__device__ __forceinline__ T reduce_block(T value, Combine combine, T* room) {
    const int n_warps = static_cast<int>(blockDim.x) / warp_size, warp = static_cast<int>(threadIdx.x) / warp_size;
    value = reduce_warp(value, combine);
    if (threadIdx.x % warp_size == 0) room[warp] = value;
    __syncthreads();
    value = room[0];
    for (int i = 1; i < n_warps; ++i) value = combine(value, room[i]);
    __syncthreads();
    return value;
}

inline void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

template <class... Wanted, class... Given>
void launch(void (*kernel)(Wanted...), dim3 blocks, int threads, size_t shared_bytes, void* stream, Given&&... given) {
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    check(cudaLaunchKernelEx(&config, kernel, std::forward<Given>(given)...));
}

inline int multiprocessors() {
    int device = 0, count = 0;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
}

// Calls body with a null pointer of the dtype's element type.
template <class Body>
void with_element(int32_t dtype, Body body) {
    if (dtype == LLMCTL_F32) {
        body(static_cast<float*>(nullptr));
    } else if (dtype == LLMCTL_BF16) {
        body(static_cast<Bf16*>(nullptr));
    } else {
        throw std::invalid_argument("expected float32 or bfloat16");
    }
}

}  // namespace cuda
}  // namespace llmctl
