// The C face of rotary positions.
#include <algorithm>
#include <stdexcept>

#include "boundary.h"
#include "cpu/dtype.h"
#include "cpu/kernels.h"
#include "cpu/pool.h"
#include "llmctl.h"

int llmctl_rotate(int32_t dtype, const void* x, const int64_t* x_strides, const void* cos, const void* sin,
                  const int64_t* table_strides, void* out, const int64_t* out_strides, const int64_t* sizes,
                  int64_t dims) {
    using namespace llmctl;
    return guarded([&] {
        check_dtype(dtype);
        const int64_t batch = sizes[0], heads = sizes[1], tokens = sizes[2], head_dim = sizes[3];
        if (dims < 0 || dims > head_dim || dims % 2 != 0) throw std::invalid_argument("a width that has no pairs");
        const RotateKernel kernel = dtype == LLMCTL_F32 ? kernels().rotate_f32 : kernels().rotate_bf16;
        const int64_t size = dtype == LLMCTL_F32 ? 4 : 2, n = batch * tokens;
        const int64_t worthwhile = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, heads * head_dim));
        parallel_for((n + worthwhile - 1) / worthwhile, [&](int64_t piece) {
            for (int64_t i = piece * worthwhile; i < std::min((piece + 1) * worthwhile, n); ++i) {
                const int64_t b = i / tokens, t = i % tokens, angle = b * table_strides[0] + t * table_strides[1];
                for (int64_t h = 0; h < heads; ++h) {
                    const int64_t from = b * x_strides[0] + h * x_strides[1] + t * x_strides[2];
                    const int64_t to = b * out_strides[0] + h * out_strides[1] + t * out_strides[2];
                    kernel(static_cast<const char*>(x) + from * size, static_cast<const char*>(cos) + angle * size,
                           static_cast<const char*>(sin) + angle * size, static_cast<char*>(out) + to * size, head_dim,
                           dims);
                }
            }
        });
    });
}
