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
#include "cpu/simd/int_scalar.h"

const llmctl::Kernels llmctl::scalar_kernels = {
    linear_piece<FloatDot<Scalar, float>, 2>,
    linear_piece<FloatDot<Scalar, Bf16>, 2>,
    {},  // no tiles
    {},
    quantize_row<Scalar, float>,
    quantize_row<Scalar, Bf16>,
    quantized_linear_piece<ScalarInt, float, 4>,
    quantized_linear_piece<ScalarInt, Bf16, 4>,
    attention_kernels<FloatDot<Scalar, float>, 2, 1>,
    attention_kernels<FloatDot<Scalar, Bf16>, 2, 1>,
    {},  // no attention of training
    activation_kernel<Scalar, float>,
    activation_kernel<Scalar, Bf16>,
    gated_gradient_kernel<Scalar, float>,
    gated_gradient_kernel<Scalar, Bf16>,
    rms_norm_row<Scalar, float>,
    rms_norm_row<Scalar, Bf16>,
    rms_norm_gradient_row<Scalar, float>,
    rms_norm_gradient_row<Scalar, Bf16>,
    layer_norm_row<Scalar, float>,
    layer_norm_row<Scalar, Bf16>,
    add_row<Scalar, float>,
    add_row<Scalar, Bf16>,
    scale_row<Scalar, float>,
    scale_row<Scalar, Bf16>,
    rotate_head<Scalar, float>,
    rotate_head<Scalar, Bf16>,
    sampling_kernels<Scalar>,
};
