// The C face of RMSNorm and LayerNorm.
#include <algorithm>

#include "boundary.h"
#include "cpu/dtype.h"
#include "cpu/kernels.h"
#include "cpu/operations.h"
#include "cpu/pool.h"
#include "llmctl.h"

namespace llmctl {

void run_norm(int32_t dtype, const llmctl_norm& norm, const void* x, int64_t x_stride, void* out, int64_t n_rows,
              int64_t n_columns) {
    const bool is_float = dtype == LLMCTL_F32, is_rms = norm.kind == LLMCTL_RMS_NORM;
    const RmsNormKernel rms = is_float ? kernels().rms_norm_f32 : kernels().rms_norm_bf16;
    const LayerNormKernel layer = is_float ? kernels().layer_norm_f32 : kernels().layer_norm_bf16;
    const int64_t size = element_size(dtype);
    const int64_t rows = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, n_columns));  // worth a thread's while
    parallel_for((n_rows + rows - 1) / rows, [&](int64_t i) {
        for (int64_t r = i * rows; r < std::min((i + 1) * rows, n_rows); ++r) {
            const char* from = static_cast<const char*>(x) + r * x_stride * size;
            char* to = static_cast<char*>(out) + r * n_columns * size;
            if (is_rms) {
                rms(from, norm.weight, norm.offset, norm.eps, to, n_columns);
            } else {
                layer(from, norm.weight, norm.bias, norm.eps, to, n_columns);
            }
        }
    });
}

}  // namespace llmctl

int llmctl_rms_norm(int32_t dtype, const void* x, int64_t x_stride, const void* weight, float offset, float eps,
                    void* out, int64_t n_rows, int64_t n_columns) {
    using namespace llmctl;
    return guarded([&] {
        check_dtype(dtype);
        run_norm(dtype, {weight, nullptr, LLMCTL_RMS_NORM, offset, eps}, x, x_stride, out, n_rows, n_columns);
    });
}

int llmctl_layer_norm(int32_t dtype, const void* x, int64_t x_stride, const void* weight, const void* bias, float eps,
                      void* out, int64_t n_rows, int64_t n_columns) {
    using namespace llmctl;
    return guarded([&] {
        check_dtype(dtype);
        run_norm(dtype, {weight, bias, LLMCTL_LAYER_NORM, 0.0f, eps}, x, x_stride, out, n_rows, n_columns);
    });
}
