#include "cpu/activation.h"
#include "cpu/attention_tile.h"
#include "cpu/kernels.h"
#include "cpu/layer_norm.h"
#include "cpu/linear_tile.h"
#include "cpu/quantized_linear.h"
#include "cpu/rms_norm.h"
#include "cpu/rotate.h"
#include "cpu/sampling_scans.h"
#include "cpu/simd/avx512.h"

const llmctl::Kernels llmctl::avx512_kernels = {
    linear_piece<FloatDot<Avx512, float>, 6>,
    linear_piece<FloatDot<Avx512, Bf16>, 6>,
    quantized_linear_piece<FloatDot<Avx512, float>, 6>,
    quantized_linear_piece<FloatDot<Avx512, Bf16>, 6>,
    attention_kernels<FloatDot<Avx512, float>, 6, 6>,
    attention_kernels<FloatDot<Avx512, Bf16>, 6, 6>,
    activation_kernel<Avx512, float>,
    activation_kernel<Avx512, Bf16>,
    rms_norm_row<Avx512, float>,
    rms_norm_row<Avx512, Bf16>,
    layer_norm_row<Avx512, float>,
    layer_norm_row<Avx512, Bf16>,
    add_row<Avx512, float>,
    add_row<Avx512, Bf16>,
    scale_row<Avx512, float>,
    scale_row<Avx512, Bf16>,
    rotate_head<Avx512, float>,
    rotate_head<Avx512, Bf16>,
    sampling_kernels<Avx512>,
};
