// A warp's next keys and values on their way to shared memory, from a cache of bfloat16 or of bytes.
#pragma once

#include "cuda/attention.h"
#include "cuda/ptx.h"

namespace llmctl {
namespace cuda {

constexpr int padding = 8;

// The first of a sequence's keys or values of a kv head.
template <class T>
__device__ __forceinline__ const T* begin_of(const void* from, const int64_t (&strides)[3], const Work& work) {
    return static_cast<const T*>(from) + work.sequence * strides[0] + work.kv_head * strides[1];
}

// Copies 16 rows of T, of which those from `count` on, and what is behind a row's last element, become `nothing`.
template <int Dim, int Width, class T>
__device__ __forceinline__ void copy_rows(T (&to)[keys][Width], const T* from, int64_t stride, int64_t count, int64_t head_dim,
                                          bool by_16_bytes, T nothing) {
    constexpr int chunk = 16 / sizeof(T), chunks = Dim / chunk;
    for (int i = static_cast<int>(threadIdx.x) % warp_size; i < keys * chunks; i += warp_size) {
        const int row = i / chunks, dim = i % chunks * chunk;
        if (row < count && by_16_bytes && dim + chunk <= head_dim) {
            copy_16_bytes_async(&to[row][dim], from + row * stride + dim);
            continue;
        }
        for (int j = dim; j < dim + chunk; ++j) to[row][j] = row < count && j < head_dim ? from[row * stride + j] : nothing;
    }
}

template <int Dim>
struct alignas(16) Tile {
    uint16_t k[keys][Dim + padding], v[keys][Dim + padding];

    // Begins to bring keys [first, first + 16) of those in front of the range's end.
    __device__ __forceinline__ void fetch(const llmctl_attention_args& a, const Work& work, int64_t first, bool by_16_bytes) {
        const int64_t count = work.range.end - first;
        const auto *k_ = begin_of<uint16_t>(a.k, a.k_strides, work), *v_ = begin_of<uint16_t>(a.v, a.v_strides, work);
        copy_rows<Dim>(k, k_ + first * a.k_strides[2], a.k_strides[2], count, a.head_dim, by_16_bytes, uint16_t{0});
        copy_rows<Dim>(v, v_ + first * a.v_strides[2], a.v_strides[2], count, a.head_dim, by_16_bytes, uint16_t{0});
        commit_copies();
    }
};

// The same of bytes: (byte - 128) times a scale for each key. What is beyond has the scale 0.
template <int Dim>
struct alignas(16) ByteTile {
    static constexpr uint8_t nothing = 128;
    uint8_t k[keys][Dim + 16], v[keys][Dim + 16];
    float k_scales[keys], v_scales[keys];

    __device__ __forceinline__ void fetch(const llmctl_attention_args& a, const Work& work, int64_t first, bool by_16_bytes) {
        const int64_t count = work.range.end - first;
        const auto *k_ = begin_of<uint8_t>(a.k, a.k_strides, work), *v_ = begin_of<uint8_t>(a.v, a.v_strides, work);
        copy_rows<Dim>(k, k_ + first * a.k_strides[2], a.k_strides[2], count, a.head_dim, by_16_bytes, nothing);
        copy_rows<Dim>(v, v_ + first * a.v_strides[2], a.v_strides[2], count, a.head_dim, by_16_bytes, nothing);
        const int lane = static_cast<int>(threadIdx.x) % warp_size, row = lane % keys;
        float* to = (lane < keys ? k_scales : v_scales) + row;
        const float* from = lane < keys ? a.k_scales : a.v_scales;
        if (row < count) {
            const int64_t place = work.sequence * a.scale_strides[0] + work.kv_head * a.scale_strides[1] + first + row;
            copy_4_bytes_async(to, from + place);
        } else {
            *to = 0.0f;
        }
        commit_copies();
    }

    // As bfloat16, which holds byte - 128 exactly, for the matrix units.
    __device__ __forceinline__ void widen(Tile<Dim>& to) const {
        constexpr int words = Dim / 4;
        for (int i = static_cast<int>(threadIdx.x) % warp_size; i < keys * words; i += warp_size) {
            const int row = i / words, dim = i % words * 4;
            widen(*reinterpret_cast<const uint32_t*>(&k[row][dim]), &to.k[row][dim]);
            widen(*reinterpret_cast<const uint32_t*>(&v[row][dim]), &to.v[row][dim]);
        }
    }

  private:
    __device__ __forceinline__ static void widen(uint32_t bytes, uint16_t* to) {
        *reinterpret_cast<Words<2>*>(to) = {bf16_of_bytes(bytes, 0, 1, 128.0f), bf16_of_bytes(bytes, 2, 3, 128.0f)};
    }
};

}  // namespace cuda
}  // namespace llmctl
