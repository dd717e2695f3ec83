// The C face of the matrix product with weights in few bits.
#include <stdexcept>

#include "boundary.h"
#include "cpu/dtype.h"
#include "cpu/kernels.h"
#include "cpu/linear_pieces.h"
#include "llmctl.h"

namespace llmctl {

QuantizedLinear quantized_linear_of(const llmctl_quantized_weight& w, const Linear& linear) {
    if (w.bits != 4 && w.bits != 8) throw std::invalid_argument("expected 4 or 8 bits");
    const bool is_whole_row = w.group_size >= linear.n_in;
    if (w.group_size <= 0 || (w.group_size % quantized_run != 0 && !is_whole_row)) {
        throw std::invalid_argument("the group size is no multiple of 32");
    }
    check_dtype(w.scales_dtype);
    const int64_t n_groups = (linear.n_in + w.group_size - 1) / w.group_size;
    const int64_t needed = (linear.n_in + 63) / 64 * 8 * w.bits;
    if (w.row_bytes < needed) throw std::invalid_argument("the rows of the codes are too short");
    return {linear,       w.bits,   w.codes,    w.scales, w.zeros, w.scales_dtype == LLMCTL_BF16,
            w.group_size, n_groups, w.row_bytes};
}

void run_quantized_linear(int32_t dtype, const QuantizedLinear& call) {
    const QuantizedLinearKernel kernel =
        dtype == LLMCTL_F32 ? kernels().quantized_linear_f32 : kernels().quantized_linear_bf16;
    for_linear_pieces(call.linear, call.bits, [&](const LinearPiece& piece) { kernel(call, piece); });
}

}  // namespace llmctl

int llmctl_quantized_linear(int32_t dtype, const void* x, int64_t x_stride, const llmctl_quantized_weight* weight,
                            const void* bias, void* out, int64_t out_stride, int64_t n_rows, int64_t n_in,
                            int64_t n_out) {
    using namespace llmctl;
    return guarded([&] {
        check_dtype(dtype);
        if (n_rows < 0 || n_in < 0 || n_out < 0) throw std::invalid_argument("a size is below 0");
        const Linear linear{x, nullptr, bias, out, n_rows, n_in, n_out, x_stride, 0, out_stride};
        run_quantized_linear(dtype, quantized_linear_of(*weight, linear));
    });
}
