// Scales and zero points of groups of weights: the part of a group's range that rounding to the nearest code costs least.
#include <cmath>
#include <limits>

#include "boundary.h"
#include "cpu/rows.h"
#include "llmctl.h"

namespace llmctl {
namespace {

using Args = llmctl_group_scales_args;

LLMCTL_INLINE float to_even(float x) { return (x + 12582912.0f) - 12582912.0f; }  // of |x| < 2^22

// The nearest value that 16 bits hold. Below float16's normal numbers its steps are those of the floats from 0.5 on.
LLMCTL_INLINE float held(float x, int32_t dtype) {
    if (dtype != LLMCTL_F16) {
        Bf16 rounded;
        store(rounded, x);
        return load(rounded);
    }
    const float size = std::fabs(x);
    if (size >= 65520.0f) return std::copysign(std::numeric_limits<float>::infinity(), x);
    if (size < 6.103515625e-5f) return std::copysign((size + 0.5f) - 0.5f, x);
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = (bits + 0xfff + ((bits >> 13) & 1)) & ~uint32_t{0x1fff};
    std::memcpy(&x, &bits, 4);
    return x;
}

struct Codes {
    float scale, zero;
};

struct Range {
    float low, high;  // at most, and at least 0
};

LLMCTL_INLINE Range range_of(const float* x, int64_t n) {
    float low = 0.0f, high = 0.0f;
#pragma omp simd reduction(min : low) reduction(max : high)
    for (int64_t i = 0; i < n; ++i) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
    }
    return {low, high};
}

LLMCTL_INLINE Codes spread(const Args& a, Range range, float shrink, float top) {
    const float low = range.low * shrink, high = range.high * shrink;
    float scale = (high - low) / top;
    if (a.is_symmetric) scale = std::max(-range.low, range.high) * (shrink * 2.0f / top);
    scale = held(std::fabs(scale) > a.least_scale ? scale : 1.0f, a.scales_dtype);
    if (a.is_symmetric) return {scale, static_cast<float>(1 << (a.bits - 1))};
    return {scale, std::min(std::max(to_even(-low / scale), 0.0f), top)};
}

LLMCTL_INLINE float error_of(const float* x, const float* importance, int64_t n, Codes codes, float top) {
    const float per_scale = 1.0f / codes.scale;
    float sum = 0.0f;
    if (importance != nullptr) {
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; ++i) {
            float code = to_even(x[i] * per_scale) + codes.zero;
            code = code < 0.0f ? 0.0f : code > top ? top : code;
            const float error = (code - codes.zero) * codes.scale - x[i];
            sum += error * error * importance[i];
        }
        return sum;
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) {
        float code = to_even(x[i] * per_scale) + codes.zero;
        code = code < 0.0f ? 0.0f : code > top ? top : code;
        const float error = (code - codes.zero) * codes.scale - x[i];
        sum += error * error;
    }
    return sum;
}

LLMCTL_FOR_EACH_ISA void some_rows(const Args& a, int64_t first, int64_t last) {
    const float top = static_cast<float>((1 << a.bits) - 1);
    const int64_t groups = (a.n_in + a.group_size - 1) / a.group_size;
    for (int64_t row = first; row < last; ++row) {
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t at = group * a.group_size, n = std::min(a.group_size, a.n_in - at);
            const float* x = a.weight + row * a.weight_stride + at;
            const float* importance = a.importance ? a.importance + at : nullptr;
            const Range range = range_of(x, n);
            Codes best{1.0f, 0.0f};
            float least = std::numeric_limits<float>::infinity();
            for (int64_t i = 0; i < a.n_shrinks; ++i) {
                const Codes tried = spread(a, range, a.shrinks[i], top);
                const float error = error_of(x, importance, n, tried, top);
                if (!(error < least)) continue;
                least = error;
                best = tried;
            }
            a.scales[row * groups + group] = best.scale;
            a.zeros[row * groups + group] = best.zero;
        }
    }
}

}  // namespace
}  // namespace llmctl

int llmctl_group_scales(const llmctl_group_scales_args* args) {
    using namespace llmctl;
    return guarded([&] {
        if (args->group_size <= 0 || args->bits < 1 || args->bits > 8 || args->n_rows < 0 || args->n_in < 0) {
            throw std::invalid_argument("a size is out of range");
        }
        for_rows(args->n_rows, [&](int64_t first, int64_t last) { some_rows(*args, first, last); });
    });
}
