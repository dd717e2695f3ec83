// What stands between the matrix products of a layer, one trip through memory each: norms, rotations, activations.
#include <cmath>

#include "boundary.h"
#include "cuda/device.h"

namespace llmctl {
namespace cuda {
namespace {

constexpr int threads = 256;

template <class Element>
__global__ void rms_norm(const Element* x, int64_t stride, const Element* weight, float offset, float eps, Element* out,
                         int64_t n) {
    __shared__ float room[threads / warp_size];
    x += blockIdx.x * stride, out += blockIdx.x * n;
    float squares = 0.0f;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
        const float value = to_float(x[i]);
        squares += value * value;
    }
    const float mean = reduce_block(squares, Sum(), room) / static_cast<float>(n);
    const float scale = 1.0f / sqrtf(mean + eps);
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
        const float value = to_float(x[i]) * scale;
        store(out + i, weight ? value * (offset + to_float(weight[i])) : value);
    }
}

struct Heads {
    int64_t sequence, head, token;  // strides
    __device__ int64_t place(int64_t b, int64_t h, int64_t t) const { return b * sequence + h * head + t * token; }
};

struct Rotation {
    Heads x, out;
    int64_t table_strides[2], heads, tokens, head_dim, dims;
};

// One block for each token of a sequence.
template <class Element>
__global__ void rotate(const Element* x, const Element* cos, const Element* sin, Element* out, Rotation r) {
    const int64_t b = blockIdx.y, t = blockIdx.x, half = r.dims / 2, angle = b * r.table_strides[0] + t * r.table_strides[1];
    for (int64_t i = threadIdx.x; i < r.heads * (r.head_dim - half); i += blockDim.x) {
        const int64_t head = i / (r.head_dim - half), place = i % (r.head_dim - half);
        const Element* from = x + r.x.place(b, head, t);
        Element* to = out + r.out.place(b, head, t);
        if (place < half) {  // a pair
            const float first = to_float(from[place]), second = to_float(from[place + half]);
            store(to + place, first * to_float(cos[angle + place]) - second * to_float(sin[angle + place]));
            store(to + place + half,
                  second * to_float(cos[angle + place + half]) + first * to_float(sin[angle + place + half]));
        } else {  // what is not turned
            to[place + half] = from[place + half];
        }
    }
}

__device__ float activation(int32_t kind, float x) {
    switch (kind) {
        case LLMCTL_SILU:
            return x / (1.0f + expf(-x));
        case LLMCTL_GELU:
            return 0.5f * x * (1.0f + erff(x * 0.70710678f));
        case LLMCTL_GELU_TANH:
            return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
        default:
            return x > 0.0f ? x : x != x ? x : 0.0f;
    }
}

template <class Element>
__global__ void activate(int32_t kind, const Element* x, const Element* up, Element* out, int64_t n) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
        const float y = activation(kind, to_float(x[i]));
        store(out + i, up ? y * to_float(up[i]) : y);
    }
}

}  // namespace
}  // namespace cuda
}  // namespace llmctl

int llmctl_cuda_rms_norm(int32_t dtype, const void* x, int64_t x_stride, const void* weight, float offset, float eps,
                         void* out, int64_t n_rows, int64_t n_columns, void* stream) {
    using namespace llmctl;
    return guarded([&] {
        cuda::with_element(dtype, [&](auto* element) {
            using Element = std::remove_pointer_t<decltype(element)>;
            if (n_rows == 0 || n_columns == 0) return;
            cuda::launch(cuda::rms_norm<Element>, dim3(static_cast<unsigned>(n_rows)), cuda::threads, 0, stream,
                         static_cast<const Element*>(x), x_stride, static_cast<const Element*>(weight), offset, eps,
                         static_cast<Element*>(out), n_columns);
        });
    });
}

int llmctl_cuda_rotate(int32_t dtype, const void* x, const int64_t* x_strides, const void* cos, const void* sin,
                       const int64_t* table_strides, void* out, const int64_t* out_strides, const int64_t* sizes,
                       int64_t dims, void* stream) {
    using namespace llmctl;
    return guarded([&] {
        const int64_t batch = sizes[0], heads = sizes[1], tokens = sizes[2], head_dim = sizes[3];
        if (dims < 0 || dims > head_dim || dims % 2 != 0) throw std::invalid_argument("a width that has no pairs");
        if (batch > 65535) throw std::invalid_argument("more than 65535 sequences at once");
        if (batch == 0 || heads == 0 || tokens == 0 || head_dim == 0) return;
        const cuda::Rotation rotation = {{x_strides[0], x_strides[1], x_strides[2]},
                                         {out_strides[0], out_strides[1], out_strides[2]},
                                         {table_strides[0], table_strides[1]},
                                         heads,
                                         tokens,
                                         head_dim,
                                         dims};
        cuda::with_element(dtype, [&](auto* element) {
            using Element = std::remove_pointer_t<decltype(element)>;
            cuda::launch(cuda::rotate<Element>, dim3(static_cast<unsigned>(tokens), static_cast<unsigned>(batch)),
                         cuda::threads, 0, stream, static_cast<const Element*>(x), static_cast<const Element*>(cos),
                         static_cast<const Element*>(sin), static_cast<Element*>(out), rotation);
        });
    });
}

int llmctl_cuda_activation(int32_t dtype, int32_t kind, const void* x, const void* up, void* out, int64_t n,
                           void* stream) {
    using namespace llmctl;
    return guarded([&] {
        if (kind < LLMCTL_SILU || kind > LLMCTL_RELU) throw std::invalid_argument("an unknown activation");
        if (n == 0) return;
        const int64_t blocks = (n + cuda::threads - 1) / cuda::threads;
        cuda::with_element(dtype, [&](auto* element) {
            using Element = std::remove_pointer_t<decltype(element)>;
            cuda::launch(cuda::activate<Element>, dim3(static_cast<unsigned>(blocks < 65536 ? blocks : 65536)),
                         cuda::threads, 0, stream, kind, static_cast<const Element*>(x), static_cast<const Element*>(up),
                         static_cast<Element*>(out), n);
        });
    });
}
