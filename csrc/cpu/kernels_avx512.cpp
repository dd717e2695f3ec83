#include "cpu/kernels.h"
#include "cpu/linear_tile.h"
#include "cpu/simd/avx512.h"

const llmctl::Kernels llmctl::avx512_kernels = {
    linear_piece<FloatDot<Avx512, float>, 6>,
    linear_piece<FloatDot<Avx512, Bf16>, 6>,
};
