#include "cpu/activation.h"
#include "cpu/attention_tile.h"
#include "cpu/kernels.h"
#include "cpu/layer_norm.h"
#include "cpu/linear_tile.h"
#include "cpu/quantize_row.h"
#include "cpu/quantized_linear.h"
#include "cpu/rms_norm.h"
#include "cpu/rotate.h"
#include "cpu/sampling_scans.h"
#include "cpu/simd/avx512_bf16.h"
#include "cpu/simd/int_avx512_vnni.h"

const llmctl::Kernels llmctl::avx512_bf16_kernels = {
    linear_piece<FloatDot<Avx512Bf16, float>, 6>,
    linear_piece<Bf16Dot, 6>,
    {},  // no tiles
    {},
    quantize_row<Avx512Bf16, float>,
    quantize_row<Avx512Bf16, Bf16>,
    quantized_linear_piece<Avx512VnniOf<Avx512Bf16>, float, 8>,
    quantized_linear_piece<Avx512VnniOf<Avx512Bf16>, Bf16, 8>,
    attention_kernels<FloatDot<Avx512Bf16, float>, 6, 6>,
    attention_kernels<Bf16Dot, 6, 6>,
    {},  // no attention of training
    activation_kernel<Avx512Bf16, float>,
    activation_kernel<Avx512Bf16, Bf16>,
    gated_gradient_kernel<Avx512Bf16, float>,
    gated_gradient_kernel<Avx512Bf16, Bf16>,
    rms_norm_row<Avx512Bf16, float>,
    rms_norm_row<Avx512Bf16, Bf16>,
    rms_norm_gradient_row<Avx512Bf16, float>,
    rms_norm_gradient_row<Avx512Bf16, Bf16>,
    layer_norm_row<Avx512Bf16, float>,
    layer_norm_row<Avx512Bf16, Bf16>,
    add_row<Avx512Bf16, float>,
    add_row<Avx512Bf16, Bf16>,
    scale_row<Avx512Bf16, float>,
    scale_row<Avx512Bf16, Bf16>,
    rotate_head<Avx512Bf16, float>,
    rotate_head<Avx512Bf16, Bf16>,
    sampling_kernels<Avx512Bf16>,
};
