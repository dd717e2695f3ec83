// Cross-entropy of logits and its gradient, written over the logits while a row is in the cache.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

#include "boundary.h"
#include "llmctl.h"

// One function, compiled for each level of x86-64 and chosen by the loader from what the processor has.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_ISA __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_ISA
#endif

namespace {

constexpr int64_t rows_at_a_time = 8;

struct Bf16 {
    uint16_t bits;
};

inline float load(float x) { return x; }

inline float load(Bf16 x) {
    const uint32_t bits = uint32_t{x.bits} << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void store(float& to, float value) { to = value; }

// To the nearest, ties to even; a NaN stays one because the kernel's inputs that give it are reported by the loss.
inline void store(Bf16& to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    to.bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// exp(x) for x <= 0, to 2 units in the last place: 2^k times a polynomial on [-ln 2 / 2, ln 2 / 2].
inline float exp_of_negative(float x) {
    x = x < -87.0f ? -87.0f : x;
    const int k = static_cast<int>(x * 1.44269504f - 0.5f);
    const float r = (x - static_cast<float>(k) * 0.693145752f) - static_cast<float>(k) * 1.42860677e-6f;
    float p = 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const int32_t exponent = (k + 127) << 23;
    float scale;
    std::memcpy(&scale, &exponent, 4);
    return p * scale;
}

// Returns the row's loss; `row` becomes its gradient. A target below 0 is not learned: loss and gradient are 0.
template <class T>
__attribute__((always_inline)) inline float one_row(T* row, int64_t n, int64_t target, float z_loss) {
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

FOR_EACH_ISA void rows_f32(float* rows, int64_t n_rows, int64_t n, const int64_t* targets, float z_loss, float* losses) {
    for (int64_t i = 0; i < n_rows; ++i) losses[i] = one_row(rows + i * n, n, targets[i], z_loss);
}

FOR_EACH_ISA void rows_bf16(Bf16* rows, int64_t n_rows, int64_t n, const int64_t* targets, float z_loss,
                            float* losses) {
    for (int64_t i = 0; i < n_rows; ++i) losses[i] = one_row(rows + i * n, n, targets[i], z_loss);
}

void some_rows(int32_t dtype, void* logits, int64_t first, int64_t last, int64_t n, const int64_t* targets,
               float z_loss, float* losses) {
    if (dtype == LLMCTL_F32) {
        rows_f32(static_cast<float*>(logits) + first * n, last - first, n, targets + first, z_loss, losses + first);
    } else {
        rows_bf16(static_cast<Bf16*>(logits) + first * n, last - first, n, targets + first, z_loss, losses + first);
    }
}

}  // namespace

int llmctl_cross_entropy(int32_t dtype, void* logits, int64_t n_rows, int64_t n_columns, const int64_t* targets,
                         float z_loss, int32_t n_threads, float* losses) {
    return llmctl::guarded([&] {
        if (dtype != LLMCTL_F32 && dtype != LLMCTL_BF16) throw std::invalid_argument("logits are float32 or bfloat16");
        for (int64_t i = 0; i < n_rows; ++i) {
            if (targets[i] >= n_columns) throw std::out_of_range("a target is beyond the vocabulary");
        }
        std::atomic<int64_t> next{0};
        auto work = [&] {
            for (int64_t first; (first = next.fetch_add(rows_at_a_time)) < n_rows;) {
                const int64_t last = std::min(first + rows_at_a_time, n_rows);
                some_rows(dtype, logits, first, last, n_columns, targets, z_loss, losses);
            }
        };
        std::vector<std::thread> threads;
        try {
            while (static_cast<int32_t>(threads.size()) + 1 < n_threads) threads.emplace_back(work);
        } catch (const std::system_error&) {
            // The system gives no more threads; those there are do the work.
        }
        work();
        for (std::thread& thread : threads) thread.join();
    });
}
