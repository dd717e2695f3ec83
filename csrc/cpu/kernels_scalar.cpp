#include "cpu/kernels.h"
#include "cpu/linear_tile.h"
#include "cpu/simd/scalar.h"

const llmctl::Kernels llmctl::scalar_kernels = {
    linear_piece<FloatDot<Scalar, float>, 2>,
    linear_piece<FloatDot<Scalar, Bf16>, 2>,
};
