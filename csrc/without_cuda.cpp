// The CUDA functions of a library that was built without them.
#include "boundary.h"
#include "llmctl.h"

#ifndef LLMCTL_WITH_CUDA
namespace {
int absent() {
    llmctl::set_last_error("the library was built without CUDA");
    return 1;
}
}  // namespace

int llmctl_cuda_rms_norm(int32_t, const void*, int64_t, const void*, float, float, void*, int64_t, int64_t, void*) {
    return absent();
}
int llmctl_cuda_rotate(int32_t, const void*, const int64_t*, const void*, const void*, const int64_t*, void*,
                       const int64_t*, const int64_t*, int64_t, void*) {
    return absent();
}
int llmctl_cuda_activation(int32_t, int32_t, const void*, const void*, void*, int64_t, void*) { return absent(); }
int llmctl_cuda_attention_scratch(const llmctl_attention_args*, int64_t*) { return absent(); }
int llmctl_cuda_attention(int32_t, const llmctl_attention_args*, void*, void*) { return absent(); }
int llmctl_cuda_sample(const llmctl_sample_args*, int64_t*, void*) { return absent(); }
int llmctl_cuda_quantized_linear_scratch(const llmctl_quantized_weight*, int64_t, int64_t*) { return absent(); }
int llmctl_cuda_quantized_linear(int32_t, const void*, int64_t, const llmctl_quantized_weight*, const void*, void*, int64_t,
                                 int64_t, void*, void*) {
    return absent();
}
int llmctl_cuda_dequantize(int32_t, const llmctl_quantized_weight*, void*, void*) { return absent(); }
#endif
