// The C face of RMSNorm and LayerNorm.
#include <algorithm>

#include "boundary.h"
#include "cpu/dtype.h"
#include "cpu/kernels.h"
#include "cpu/operations.h"
#include "cpu/pool.h"
#include "llmctl.h"

namespace llmctl {

namespace {

// A norm of rows of n elements, or none at all.
class RowNorm {
public:
    RowNorm(int32_t dtype, const llmctl_norm& norm, int64_t n)
        : norm_(norm),
          rms_(dtype == LLMCTL_F32 ? kernels().rms_norm_f32 : kernels().rms_norm_bf16),
          layer_(dtype == LLMCTL_F32 ? kernels().layer_norm_f32 : kernels().layer_norm_bf16),
          n_(n) {}

    void operator()(const char* from, char* to) const {
        if (norm_.kind == LLMCTL_RMS_NORM) {
            rms_(from, norm_.weight, norm_.offset, norm_.eps, to, n_);
        } else if (norm_.kind == LLMCTL_LAYER_NORM) {
            layer_(from, norm_.weight, norm_.bias, norm_.eps, to, n_);
        }
    }

private:
    const llmctl_norm& norm_;
    RmsNormKernel rms_;
    LayerNormKernel layer_;
    int64_t n_;
};

// Calls body(r) for each of n_rows rows of n_columns elements, as many on a thread as are worth its while.
template <class Body>
void for_each_row(int64_t n_rows, int64_t n_columns, const Body& body) {
    const int64_t rows = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, n_columns));
    parallel_for((n_rows + rows - 1) / rows, [&](int64_t i) {
        for (int64_t r = i * rows; r < std::min((i + 1) * rows, n_rows); ++r) body(r);
    });
}

}  // namespace

void run_norm(int32_t dtype, const llmctl_norm& norm, const void* x, int64_t x_stride, void* out, int64_t n_rows,
              int64_t n_columns) {
    const RowNorm normalize(dtype, norm, n_columns);
    const int64_t size = element_size(dtype);
    for_each_row(n_rows, n_columns, [&](int64_t r) {
        normalize(static_cast<const char*>(x) + r * x_stride * size, static_cast<char*>(out) + r * n_columns * size);
    });
}

void run_residual(int32_t dtype, const ResidualNorms& norms, void* x, void* y, void* out, int64_t n_rows,
                  int64_t n_columns) {
    const RowNorm of_branch(dtype, norms.branch, n_columns), of_sum(dtype, norms.sum, n_columns);
    const RowNorm next(dtype, norms.next, n_columns);
    const AddKernel add = dtype == LLMCTL_F32 ? kernels().add_f32 : kernels().add_bf16;
    const int64_t bytes = n_columns * element_size(dtype);
    for_each_row(n_rows, n_columns, [&](int64_t r) {
        char *sum = static_cast<char*>(x) + r * bytes, *branch = static_cast<char*>(y) + r * bytes;
        of_branch(branch, branch);
        add(sum, branch, n_columns);
        of_sum(sum, sum);
        next(sum, static_cast<char*>(out) + r * bytes);
    });
}

namespace {

// Rows whose shares of the weights' gradient are added up one after another: never more threads, never other bits.
constexpr int64_t rows_per_sum = LLMCTL_ROWS_PER_SUM;

void run_rms_norm_gradient(int32_t dtype, const void* grad, const void* x, const llmctl_norm& norm, void* grad_x,
                           float* weight_sums, int64_t n_rows, int64_t n_columns) {
    const bool is_float = dtype == LLMCTL_F32;
    const auto kernel = is_float ? kernels().rms_norm_gradient_f32 : kernels().rms_norm_gradient_bf16;
    const int64_t bytes = n_columns * element_size(dtype);
    parallel_for((n_rows + rows_per_sum - 1) / rows_per_sum, [&](int64_t i) {
        float* sums = weight_sums ? weight_sums + i * n_columns : nullptr;
        if (sums) std::fill_n(sums, n_columns, 0.0f);
        for (int64_t r = i * rows_per_sum; r < std::min((i + 1) * rows_per_sum, n_rows); ++r) {
            kernel(static_cast<const char*>(grad) + r * bytes, static_cast<const char*>(x) + r * bytes, norm.weight,
                   norm.offset, norm.eps, static_cast<char*>(grad_x) + r * bytes, sums, n_columns);
        }
    });
}

}  // namespace
}  // namespace llmctl

int llmctl_rms_norm_gradient(int32_t dtype, const void* grad, const void* x, const void* weight, float offset, float eps,
                             void* grad_x, float* weight_sums, int64_t n_rows, int64_t n_columns) {
    using namespace llmctl;
    return guarded([&] {
        check_dtype(dtype);
        const llmctl_norm norm{weight, nullptr, LLMCTL_RMS_NORM, offset, eps};
        run_rms_norm_gradient(dtype, grad, x, norm, grad_x, weight_sums, n_rows, n_columns);
    });
}

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
