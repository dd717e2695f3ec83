// The operations behind the C ABI as other parts of the library call them: whole, on the threads of the pool. They throw
// std::invalid_argument for sizes that cannot be; `dtype` is LLMCTL_F32 or LLMCTL_BF16.
#pragma once

#include <cstdint>

#include "cpu/attention.h"
#include "llmctl.h"

namespace llmctl {

inline int64_t element_size(int32_t dtype) { return dtype == LLMCTL_F32 ? 4 : 2; }

// x [n_rows, n_columns], its rows x_stride elements apart; out is contiguous and may be x where that is.
void run_norm(int32_t dtype, const llmctl_norm& norm, const void* x, int64_t x_stride, void* out, int64_t n_rows,
              int64_t n_columns);

// The end of a branch and the beginning of the next one, row by row while a row is near: y = branch(y), x = sum(x + y), out =
// next(x), each rounded. A norm of kind LLMCTL_NO_NORM does nothing; out is not written then.
struct ResidualNorms {
    const llmctl_norm &branch, &sum, &next;
};
void run_residual(int32_t dtype, const ResidualNorms& norms, void* x, void* y, void* out, int64_t n_rows,
                  int64_t n_columns);

void run_activation(int32_t dtype, int32_t kind, const void* x, const void* up, void* out, int64_t n);

void run_attention(int32_t dtype, const AttentionArgs& args);

void run_sampling(const llmctl_sample_args& args, int64_t* tokens);

// x += y, rounded to their type, and x = scale * x.
void run_add(int32_t dtype, void* x, const void* y, int64_t n);
void run_scale(int32_t dtype, void* x, float scale, int64_t n);

}  // namespace llmctl
