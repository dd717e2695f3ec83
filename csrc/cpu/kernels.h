// The kernels that exist once for each instruction set, and which of them run here.
#pragma once

#include "cpu/attention.h"
#include "cpu/linear.h"
#include "cpu/quantized.h"
#include "cpu/sampling.h"

namespace llmctl {

// Elements [first, first + n) of an activation; up may be null.
using ActivationKernel = void (*)(int32_t kind, const void* x, const void* up, void* out, int64_t first, int64_t n);

// Gradients of both factors of a gate, from that of its output; all contiguous and of one type.
struct GatedGradient {
    const void *grad, *x, *up;
    void *grad_x, *grad_up;
};
using GatedGradientKernel = void (*)(int32_t kind, const GatedGradient&, int64_t first, int64_t n);

// A row's gradient; what it adds to that of the weights is added to weight_sums, if that is not null.
using RmsNormGradientKernel = void (*)(const void* grad, const void* x, const void* weight, float offset, float eps,
                                       void* grad_x, float* weight_sums, int64_t n);

using RmsNormKernel = void (*)(const void* x, const void* weight, float offset, float eps, void* out, int64_t n);

using LayerNormKernel = void (*)(const void* x, const void* weight, const void* bias, float eps, void* out, int64_t n);

using AddKernel = void (*)(void* x, const void* y, int64_t n);

using ScaleKernel = void (*)(void* x, float scale, int64_t n);

using RotateKernel = void (*)(const void* x, const void* cos, const void* sin, void* out, int64_t head_dim,
                              int64_t dims);

struct Kernels {
    LinearKernel linear_f32, linear_bf16;
    LinearTiles linear_tiles_f32, linear_tiles_bf16;
    QuantizeRowKernel quantize_row_f32, quantize_row_bf16;
    QuantizedLinearKernel quantized_linear_f32, quantized_linear_bf16;
    AttentionKernels attention_f32, attention_bf16;
    TrainingAttentionKernels training_attention_bf16;
    ActivationKernel activation_f32, activation_bf16;
    GatedGradientKernel gated_gradient_f32, gated_gradient_bf16;
    RmsNormKernel rms_norm_f32, rms_norm_bf16;
    RmsNormGradientKernel rms_norm_gradient_f32, rms_norm_gradient_bf16;
    LayerNormKernel layer_norm_f32, layer_norm_bf16;
    AddKernel add_f32, add_bf16;
    ScaleKernel scale_f32, scale_bf16;
    RotateKernel rotate_f32, rotate_bf16;
    SamplingKernels sampling;
};

// Each defined in the file of its name, which alone is compiled for that instruction set.
extern const Kernels scalar_kernels;
#ifdef __x86_64__
extern const Kernels avx2_kernels, avx512_kernels, avx512_vnni_kernels, avx512_bf16_kernels, amx_kernels;
#endif

// The best that the processor runs, or those that llmctl_set_isa chose.
const Kernels& kernels();

}  // namespace llmctl
