// Cross-entropy of logits and its gradient, written over the logits while a row is in the cache.
#include <cmath>

#include "boundary.h"
#include "cpu/rows.h"

namespace llmctl {
namespace {

// Returns the row's loss; `row` becomes its gradient. A target below 0 is not learned: loss and gradient are 0.
template <class T>
LLMCTL_INLINE float one_row(T* row, int64_t n, int64_t target, float z_loss) {
    if (target < 0) {
        std::memset(static_cast<void*>(row), 0, n * sizeof(T));
        return 0.0f;
    }
    float highest = load(row[0]);
#pragma omp simd reduction(max : highest)
    for (int64_t i = 0; i < n; ++i) highest = std::max(highest, load(row[i]));
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += exp_of_negative(load(row[i]) - highest);
    const float log_z = highest + std::log(sum);
    const float chosen = load(row[target]);
    const float weight = 1.0f + 2.0f * z_loss * log_z;
    const float share = weight / sum;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) store(row[i], exp_of_negative(load(row[i]) - highest) * share);
    store(row[target], std::exp(chosen - log_z) * weight - 1.0f);
    // log_z - log_z is NaN for a row with NaN or infinity in it, which the polynomial would have hidden.
    return log_z - chosen + z_loss * log_z * log_z + (log_z - log_z);
}

LLMCTL_FOR_EACH_ISA void some_rows(float* rows, int64_t n_rows, int64_t n, const int64_t* targets, float z_loss,
                                   float* losses) {
    for (int64_t i = 0; i < n_rows; ++i) losses[i] = one_row(rows + i * n, n, targets[i], z_loss);
}

LLMCTL_FOR_EACH_ISA void some_rows(Bf16* rows, int64_t n_rows, int64_t n, const int64_t* targets, float z_loss,
                                   float* losses) {
    for (int64_t i = 0; i < n_rows; ++i) losses[i] = one_row(rows + i * n, n, targets[i], z_loss);
}

template <class T>
void all_rows(T* logits, int64_t n_rows, int64_t n, const int64_t* targets, float z_loss, float* losses) {
    for_rows(n_rows, [=](int64_t first, int64_t last) {
        some_rows(logits + first * n, last - first, n, targets + first, z_loss, losses + first);
    });
}

}  // namespace
}  // namespace llmctl

int llmctl_cross_entropy(int32_t dtype, void* logits, int64_t n_rows, int64_t n_columns, const int64_t* targets,
                         float z_loss, float* losses) {
    using namespace llmctl;
    return guarded([&] {
        check_dtype(dtype);
        for (int64_t i = 0; i < n_rows; ++i) {
            if (targets[i] >= n_columns) throw std::out_of_range("a target is beyond the vocabulary");
        }
        if (dtype == LLMCTL_F32) {
            all_rows(static_cast<float*>(logits), n_rows, n_columns, targets, z_loss, losses);
        } else {
            all_rows(static_cast<Bf16*>(logits), n_rows, n_columns, targets, z_loss, losses);
        }
    });
}
