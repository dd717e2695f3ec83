// The C face of the activations.
#include <algorithm>
#include <stdexcept>

#include "boundary.h"
#include "cpu/dtype.h"
#include "cpu/kernels.h"
#include "cpu/pool.h"
#include "llmctl.h"

int llmctl_activation(int32_t dtype, int32_t kind, const void* x, const void* up, void* out, int64_t n) {
    using namespace llmctl;
    return guarded([&] {
        check_dtype(dtype);
        if (kind < LLMCTL_SILU || kind > LLMCTL_RELU) throw std::invalid_argument("unknown activation");
        const ActivationKernel kernel = dtype == LLMCTL_F32 ? kernels().activation_f32 : kernels().activation_bf16;
        constexpr int64_t piece = 1 << 14;  // of whole vectors, so that every element meets the same code
        parallel_for((n + piece - 1) / piece,
                     [&](int64_t i) { kernel(kind, x, up, out, i * piece, std::min(piece, n - i * piece)); });
    });
}
