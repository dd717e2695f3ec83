// A matrix product with weights in few bits.
#pragma once

#include <cstdint>

#include "cpu/linear.h"
#include "llmctl.h"

namespace llmctl {

constexpr int64_t quantized_run = 32;  // weights in a row that share a scale at least

// weight [o, k] is (code - zero) * scale of its group; `linear` has no weights.
struct QuantizedLinear {
    Linear linear;
    int32_t bits;
    const uint8_t* codes;
    const void* scales;
    const uint8_t* zeros;
    bool scales_are_bf16;
    int64_t group_size, n_groups, row_bytes;
};

using QuantizedLinearKernel = void (*)(const QuantizedLinear&, const LinearPiece&);

// The product that `linear`, whose weight is not looked at, and these weights make; throws std::invalid_argument where
// they do not fit.
QuantizedLinear quantized_linear_of(const llmctl_quantized_weight& weight, const Linear& linear);

// The whole product on the threads of the pool.
void run_quantized_linear(int32_t dtype, const QuantizedLinear& call);

}  // namespace llmctl
