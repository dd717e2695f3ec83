// The kernels that exist once for each instruction set, and which of them run here.
#pragma once

#include "cpu/linear.h"

namespace llmctl {

struct Kernels {
    LinearKernel linear_f32, linear_bf16;
};

// Each defined in the file of its name, which alone is compiled for that instruction set.
extern const Kernels scalar_kernels;
#ifdef __x86_64__
extern const Kernels avx2_kernels, avx512_kernels, avx512_bf16_kernels;
#endif

// The best that the processor runs, or those that llmctl_set_isa chose.
const Kernels& kernels();

}  // namespace llmctl
