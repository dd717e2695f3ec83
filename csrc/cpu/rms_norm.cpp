// The C face of RMSNorm.
#include <algorithm>

#include "boundary.h"
#include "cpu/dtype.h"
#include "cpu/kernels.h"
#include "cpu/pool.h"
#include "llmctl.h"

int llmctl_rms_norm(int32_t dtype, const void* x, int64_t x_stride, const void* weight, float offset, float eps,
                    void* out, int64_t n_rows, int64_t n_columns) {
    using namespace llmctl;
    return guarded([&] {
        check_dtype(dtype);
        const RmsNormKernel kernel = dtype == LLMCTL_F32 ? kernels().rms_norm_f32 : kernels().rms_norm_bf16;
        const int64_t size = dtype == LLMCTL_F32 ? 4 : 2;
        const int64_t rows =
            std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, n_columns));  // worth a thread's while
        parallel_for((n_rows + rows - 1) / rows, [&](int64_t i) {
            for (int64_t r = i * rows; r < std::min((i + 1) * rows, n_rows); ++r) {
                kernel(static_cast<const char*>(x) + r * x_stride * size, weight, offset, eps,
                       static_cast<char*>(out) + r * n_columns * size, n_columns);
            }
        });
    });
}
