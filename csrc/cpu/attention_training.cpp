// The C face of attention in training: checks, and a head at a time for each thread.
#include <stdexcept>

#include "boundary.h"
#include "cpu/attention.h"
#include "cpu/kernels.h"
#include "cpu/pool.h"
#include "llmctl.h"

namespace llmctl {
namespace {

bool has_kernels(int32_t dtype, int64_t head_dim) {
    const bool fits = dtype == LLMCTL_BF16 && head_dim > 0 && head_dim % training_attention_dims == 0;
    return fits && head_dim <= attention_max_dim && kernels().training_attention_bf16.forward != nullptr;
}

template <class Kernel>
int run(const TrainingAttention& a, const Kernel& kernel) {
    return guarded([&] {
        if (!has_kernels(LLMCTL_BF16, a.head_dim)) throw std::invalid_argument("no such kernel for this size or processor");
        if (a.batch < 0 || a.tokens < 0 || a.kv_heads <= 0 || a.heads <= 0 || a.heads % a.kv_heads != 0) {
            throw std::invalid_argument("sizes that cannot be");
        }
        if (a.tokens == 0) return;
        parallel_for(a.batch * a.heads, [&](int64_t i) { kernel(a, i / a.heads, i % a.heads); });
    });
}

}  // namespace
}  // namespace llmctl

int llmctl_has_training_attention(int32_t dtype, int64_t head_dim) {
    return llmctl::has_kernels(dtype, head_dim) ? 1 : 0;
}

int llmctl_training_attention_forward(const llmctl_training_attention* args) {
    return llmctl::run(*args, llmctl::kernels().training_attention_bf16.forward);
}

int llmctl_training_attention_backward(const llmctl_training_attention* args) {
    return llmctl::run(*args, llmctl::kernels().training_attention_bf16.backward);
}
