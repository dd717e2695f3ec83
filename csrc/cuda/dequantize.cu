// Weights in few bits become a matrix of floats again, for products with many rows.
#include "boundary.h"
#include "cuda/quantized.h"

namespace llmctl {
namespace cuda {
namespace {

// A warp for each output of a block, a lane for each of its quads.
template <class Element>
__global__ void dequantize(Weights weights, Element* out) {
    const int lane = static_cast<int>(threadIdx.x) % warp_size, within = static_cast<int>(threadIdx.x) / warp_size;
    const int r = lane / quads, quad = lane % quads, is_upper = weights.stored.bits == 4 ? quad / 4 : 0;
    const int64_t panel = blockIdx.y, block = blockIdx.x, output = panel * panel_outs + within;
    if (output >= weights.stored.n_out) return;
    const int64_t run_bytes = run_weights * panel_outs / 8 * weights.stored.bits, chunk = is_upper ? quad - 4 : quad;
    const uint8_t* codes = weights.codes(panel, block) + r * run_bytes + chunk * 64 + within * 4;
    const int64_t unit = weights.unit(panel, block, r) + within;
    const uint32_t bits = weights.stored.scales_dtype == LLMCTL_F32 ? static_cast<const uint32_t*>(weights.stored.scales)[unit]
                                                              : static_cast<const uint16_t*>(weights.stored.scales)[unit];
    const float scale = weights.scale(bits);
    const int zero = weights.stored.zeros ? weights.stored.zeros[unit] : 1 << (weights.stored.bits - 1);
    const int64_t first = block * block_weights + lane * 4;
    for (int i = 0; i < 4 && first + i < weights.stored.n_in; ++i) {
        const int code = weights.stored.bits == 4 ? codes[i] >> (4 * is_upper) & 15 : codes[i];
        store(out + output * weights.stored.n_in + first + i, static_cast<float>(code - zero) * scale);
    }
}

}  // namespace
}  // namespace cuda
}  // namespace llmctl

int llmctl_cuda_dequantize(int32_t dtype, const llmctl_quantized_weight* weight, void* out, void* stream) {
    using namespace llmctl;
    return guarded([&] {
        const cuda::Weights weights = cuda::checked(*weight);
        if (weights.n_panels > 65535) throw std::invalid_argument("more than 1048560 outputs at once");
        if (weight->n_in == 0 || weight->n_out == 0) return;
        const dim3 blocks(static_cast<unsigned>(weights.n_blocks), static_cast<unsigned>(weights.n_panels));
        cuda::with_element(dtype, [&](auto* element) {
            using Element = std::remove_pointer_t<decltype(element)>;
            cuda::launch(cuda::dequantize<Element>, blocks, cuda::panel_outs * cuda::warp_size, 0, stream, weights,
                         static_cast<Element*>(out));
        });
    });
}
