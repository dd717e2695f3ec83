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
#include "cpu/simd/int_avx512_vnni.h"

const llmctl::Kernels llmctl::avx512_vnni_kernels = {
    linear_piece<FloatDot<Avx512, float>, 6>,
    linear_piece<FloatDot<Avx512, Bf16>, 6>,
    {},  // no tiles
    {},
    quantize_row<Avx512, float>,
    quantize_row<Avx512, Bf16>,
    quantized_linear_piece<Avx512Vnni, float, 8>,
    quantized_linear_piece<Avx512Vnni, Bf16, 8>,
    attention_kernels<FloatDot<Avx512, float>, 6, 6>,
    attention_kernels<FloatDot<Avx512, Bf16>, 6, 6>,
    {},  // no attention of training
    activation_kernel<Avx512, float>,
    activation_kernel<Avx512, Bf16>,
    gated_gradient_kernel<Avx512, float>,
    gated_gradient_kernel<Avx512, Bf16>,
    rms_norm_row<Avx512, float>,
    rms_norm_row<Avx512, Bf16>,
    rms_norm_gradient_row<Avx512, float>,
    rms_norm_gradient_row<Avx512, Bf16>,
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
