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
#include "cpu/simd/int_avx2.h"

const llmctl::Kernels llmctl::avx2_kernels = {
    linear_piece<FloatDot<Avx2, float>, 3>,
    linear_piece<FloatDot<Avx2, Bf16>, 3>,
    {},  // no tiles
    {},
    quantize_row<Avx2, float>,
    quantize_row<Avx2, Bf16>,
    quantized_linear_piece<Avx2Int, float, 4>,
    quantized_linear_piece<Avx2Int, Bf16, 4>,
    attention_kernels<FloatDot<Avx2, float>, 3, 2>,
    attention_kernels<FloatDot<Avx2, Bf16>, 3, 2>,
    {},  // no attention of training
    activation_kernel<Avx2, float>,
    activation_kernel<Avx2, Bf16>,
    gated_gradient_kernel<Avx2, float>,
    gated_gradient_kernel<Avx2, Bf16>,
    rms_norm_row<Avx2, float>,
    rms_norm_row<Avx2, Bf16>,
    rms_norm_gradient_row<Avx2, float>,
    rms_norm_gradient_row<Avx2, Bf16>,
    layer_norm_row<Avx2, float>,
    layer_norm_row<Avx2, Bf16>,
    add_row<Avx2, float>,
    add_row<Avx2, Bf16>,
    scale_row<Avx2, float>,
    scale_row<Avx2, Bf16>,
    rotate_head<Avx2, float>,
    rotate_head<Avx2, Bf16>,
    sampling_kernels<Avx2>,
};
