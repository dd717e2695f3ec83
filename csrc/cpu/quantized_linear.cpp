// The C face of the matrix product with weights in few bits: checks, the rows in whole numbers, pieces for the threads.
#include <algorithm>
#include <stdexcept>

#include "boundary.h"
#include "cpu/dtype.h"
#include "cpu/kernels.h"
#include "cpu/pool.h"
#include "cpu/scratch.h"
#include "llmctl.h"

namespace llmctl {
namespace {

constexpr int64_t work_per_task = 1 << 16;  // multiplications that are worth a thread's while
constexpr int64_t rows_per_task = 8;
constexpr int64_t cached_codes = 1 << 20;  // of x, in the second-level cache

int64_t parts(int64_t total, int64_t size) { return (total + size - 1) / size; }

// Room for n_rows rows in whole numbers, good until this thread asks again.
QuantizedRows rows_for(const QuantizedLinear& c, int64_t n_rows) {
    const int64_t n = parts(n_rows, row_block) * c.n_blocks * row_block;  // scales
    const int64_t n_codes = n * quantized_block;
    thread_local Scratch memory;
    char* at = memory.room(n_codes + n * 4 + n * c.units() * 4);
    QuantizedRows rows{reinterpret_cast<int8_t*>(at), reinterpret_cast<float*>(at + n_codes), nullptr, c.n_blocks,
                       c.unit};
    rows.minus_sums = reinterpret_cast<int32_t*>(rows.scales + n);
    return rows;
}

QuantizedRows quantized_rows(int32_t dtype, const QuantizedLinear& c, const char* x, int64_t n_rows) {
    const bool is_float = dtype == LLMCTL_F32;
    const QuantizeRowKernel kernel = is_float ? kernels().quantize_row_f32 : kernels().quantize_row_bf16;
    const QuantizedRows rows = rows_for(c, n_rows);
    const int64_t row_bytes = c.linear.x_stride * (is_float ? 4 : 2);
    const auto work = [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r) kernel(x + r * row_bytes, c.linear.n_in, rows, r);
    };
    if (n_rows <= rows_per_task) {
        work(0, n_rows);
    } else {
        parallel_for(parts(n_rows, rows_per_task), [&](int64_t i) {
            work(i * rows_per_task, std::min((i + 1) * rows_per_task, n_rows));
        });
    }
    return rows;
}

void run_rows(int32_t dtype, const QuantizedLinear& c) {
    const Linear& l = c.linear;
    const QuantizedLinearKernel kernel =
        dtype == LLMCTL_F32 ? kernels().quantized_linear_f32 : kernels().quantized_linear_bf16;
    const QuantizedRows rows = quantized_rows(dtype, c, static_cast<const char*>(l.x), l.n_rows);
    const int64_t cached = cached_codes / std::max<int64_t>(1, c.n_blocks * quantized_block);
    const int64_t piece_rows = std::max(cached / 32 * 32, int64_t{64});
    const int64_t row_pieces = parts(l.n_rows, piece_rows);
    const int64_t worthwhile = work_per_task / std::max<int64_t>(1, l.n_in * l.n_rows);
    const int64_t outs = std::max<int64_t>(1, parts(worthwhile, linear_max_outs)) * linear_max_outs;
    const int64_t out_pieces = parts(l.n_out, outs);
    parallel_for(row_pieces * out_pieces, [&](int64_t i) {
        const int64_t row = i / out_pieces * piece_rows, first = i % out_pieces * outs;
        const int64_t last = std::min(first + outs, l.n_out);
        for (int64_t out = first; out < last; out += linear_max_outs) {
            kernel(c, rows, {row, std::min(row + piece_rows, l.n_rows), out, std::min(out + linear_max_outs, last)});
        }
    });
}

}  // namespace

QuantizedLinear quantized_linear_of(const llmctl_quantized_weight& w, const Linear& linear) {
    if (w.bits != 4 && w.bits != 8) throw std::invalid_argument("expected 4 or 8 bits");
    if (w.unit != 32 && w.unit != 64 && w.unit != 128) throw std::invalid_argument("expected units of 32, 64 or 128");
    if (w.scales_dtype != LLMCTL_F32 && w.scales_dtype != LLMCTL_BF16 && w.scales_dtype != LLMCTL_F16) {
        throw std::invalid_argument("expected scales in float32, bfloat16 or float16");
    }
    if (w.n_in != linear.n_in || w.n_out != linear.n_out) throw std::invalid_argument("the weights have other sizes");
    return {linear,  w.bits, w.scales_dtype, w.codes, w.scales, w.zeros, w.unit, parts(linear.n_in, quantized_block)};
}

void run_quantized_linear(int32_t dtype, const QuantizedLinear& call) {
    const int64_t size = dtype == LLMCTL_F32 ? 4 : 2;
    for (int64_t row = 0; row < call.linear.n_rows; row += quantized_max_rows) {
        QuantizedLinear some = call;
        some.linear.n_rows = std::min(call.linear.n_rows - row, quantized_max_rows);
        some.linear.x = static_cast<const char*>(call.linear.x) + row * call.linear.x_stride * size;
        some.linear.out = static_cast<char*>(call.linear.out) + row * call.linear.out_stride * size;
        run_rows(dtype, some);
    }
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
