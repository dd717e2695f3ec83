// The C face of the activations, and other operations on one element at a time.
#include <algorithm>
#include <stdexcept>

#include "boundary.h"
#include "cpu/dtype.h"
#include "cpu/kernels.h"
#include "cpu/operations.h"
#include "cpu/pool.h"
#include "llmctl.h"

namespace llmctl {
namespace {

constexpr int64_t piece = 1 << 14;  // of whole vectors, so that every element meets the same code

// Calls body(first, n) for stretches of n elements.
template <class Body>
void for_elements(int64_t n, const Body& body) {
    parallel_for((n + piece - 1) / piece, [&](int64_t i) { body(i * piece, std::min(piece, n - i * piece)); });
}

}  // namespace

void run_activation(int32_t dtype, int32_t kind, const void* x, const void* up, void* out, int64_t n) {
    if (kind < LLMCTL_SILU || kind > LLMCTL_RELU) throw std::invalid_argument("unknown activation");
    const ActivationKernel kernel = dtype == LLMCTL_F32 ? kernels().activation_f32 : kernels().activation_bf16;
    for_elements(n, [&](int64_t first, int64_t count) { kernel(kind, x, up, out, first, count); });
}

void run_add(int32_t dtype, void* x, const void* y, int64_t n) {
    const AddKernel kernel = dtype == LLMCTL_F32 ? kernels().add_f32 : kernels().add_bf16;
    const int64_t size = element_size(dtype);
    for_elements(n, [&](int64_t first, int64_t count) {
        kernel(static_cast<char*>(x) + first * size, static_cast<const char*>(y) + first * size, count);
    });
}

void run_scale(int32_t dtype, void* x, float scale, int64_t n) {
    const ScaleKernel kernel = dtype == LLMCTL_F32 ? kernels().scale_f32 : kernels().scale_bf16;
    const int64_t size = element_size(dtype);
    for_elements(n,
                 [&](int64_t first, int64_t count) { kernel(static_cast<char*>(x) + first * size, scale, count); });
}

}  // namespace llmctl

int llmctl_gated_gradient(int32_t dtype, int32_t kind, const void* grad, const void* x, const void* up, void* grad_x,
                          void* grad_up, int64_t n) {
    using namespace llmctl;
    return guarded([&] {
        check_dtype(dtype);
        if (kind < LLMCTL_SILU || kind > LLMCTL_RELU) throw std::invalid_argument("unknown activation");
        const auto kernel = dtype == LLMCTL_F32 ? kernels().gated_gradient_f32 : kernels().gated_gradient_bf16;
        const GatedGradient call{grad, x, up, grad_x, grad_up};
        for_elements(n, [&](int64_t first, int64_t count) { kernel(kind, call, first, count); });
    });
}

int llmctl_activation(int32_t dtype, int32_t kind, const void* x, const void* up, void* out, int64_t n) {
    using namespace llmctl;
    return guarded([&] {
        check_dtype(dtype);
        run_activation(dtype, kind, x, up, out, n);
    });
}
