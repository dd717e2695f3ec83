// Weights in few bits as llmctl_quantized_weight lays them out.
#pragma once

#include "cuda/device.h"
#include "cuda/ptx.h"

namespace llmctl {
namespace cuda {

constexpr int panel_outs = 16, block_weights = 128, run_weights = 32;
constexpr int runs = block_weights / run_weights, quads = run_weights / 4;  // of a block, and of a run

struct Weights {
    llmctl_quantized_weight stored;
    int64_t n_blocks, n_panels;
    int32_t unit_bits;  // the logarithm of a unit's weights

    __device__ __forceinline__ const uint8_t* codes(int64_t panel, int64_t block) const {
        return stored.codes + (panel * n_blocks + block) * block_weights * panel_outs / 8 * stored.bits;
    }
    // Where the scales and zeros of the 16 outputs of a run begin.
    __device__ __forceinline__ int64_t unit(int64_t panel, int64_t block, int r) const {
        return ((panel * n_blocks + block) * (block_weights >> unit_bits) + (r * run_weights >> unit_bits)) * panel_outs;
    }
    __device__ __forceinline__ float scale(uint32_t bits) const {
        if (stored.scales_dtype == LLMCTL_F32) return __uint_as_float(bits);
        if (stored.scales_dtype == LLMCTL_BF16) return __uint_as_float(bits << 16);
        return half_to_float(static_cast<uint16_t>(bits));
    }
};

inline Weights checked(const llmctl_quantized_weight& weight) {
    if (weight.bits != 4 && weight.bits != 8) throw std::invalid_argument("weights of neither 4 nor 8 bits");
    if (weight.unit != 32 && weight.unit != 64 && weight.unit != 128) {
        throw std::invalid_argument("a unit of no such size can be");
    }
    if (weight.scales_dtype < LLMCTL_F32 || weight.scales_dtype > LLMCTL_F16) {
        throw std::invalid_argument("scales of no such type");
    }
    if (weight.n_in < 0 || weight.n_out < 0) throw std::invalid_argument("a size is below 0");
    const int64_t n_blocks = (weight.n_in + block_weights - 1) / block_weights;
    return {weight, n_blocks, (weight.n_out + panel_outs - 1) / panel_outs, weight.unit == 32 ? 5 : weight.unit == 64 ? 6 : 7};
}

}  // namespace cuda
}  // namespace llmctl
