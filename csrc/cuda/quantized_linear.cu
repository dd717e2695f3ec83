// Products of few rows with weights in few bits. A warp reads codes of 32 outputs, turns them in its registers into
// bfloat16, which holds code - zero exactly, and the matrix units multiply them by 8 rows of x at once; the sums of a run of
// 32 weights are then scaled. The warps of a block share the same outputs and divide the weights of a row among them.
#include <algorithm>

#include "boundary.h"
#include "cuda/quantized.h"

namespace llmctl {
namespace cuda {
namespace {

constexpr int outs = 2 * panel_outs, tile_rows = 8;  // of a warp, and of one fragment
constexpr int n_warps = 8, threads = n_warps * warp_size, most_tiles = 4;
constexpr int blocks_of_a_warp = 2;  // of a row, at least, where a row is divided among blocks of threads

struct Product {
    Weights weights;
    const void* x;
    const void* bias;
    void* out;
    float* parts;  // [pieces, n_rows, n_out], where a row is in more than one
    int64_t x_stride, out_stride, n_rows, n_pieces, piece_blocks;
};

// ---- weights ---------------------------------------------------------------------------------------------------------------

// What a lane has of a block: of each run two quads of weights of four outputs, these outputs' scales and their zeros.
template <int Bits, int ScaleBytes>
struct Held {
    Words<4> codes[runs][Bits / 4];
    Words<ScaleBytes> scales[runs];
    uint32_t zeros[runs];
};

template <int Bits, int ScaleBytes>
__device__ __forceinline__ void load(const Product& p, int64_t panel, int64_t block, Held<Bits, ScaleBytes>& to) {
    const int lane = static_cast<int>(threadIdx.x) % warp_size, four = lane / 4 % 4, within = lane % 4;
    const bool exists = panel < p.weights.n_panels;
    const uint8_t* codes = p.weights.codes(panel, block) + within * 64 + four * 16;
    const auto* scales = static_cast<const unsigned char*>(p.weights.stored.scales);
#pragma unroll
    for (int r = 0; r < runs; ++r) {
#pragma unroll
        for (int half = 0; half < Bits / 4; ++half) {
            to.codes[r][half] = exists ? load_16_bytes_once(codes + (r * (Bits / 4) + half) * 256) : Words<4>{};
        }
        const int64_t unit = exists ? p.weights.unit(panel, block, r) + four * 4 : 0;
        to.scales[r] = exists ? load_again<ScaleBytes>(scales + unit * ScaleBytes) : Words<ScaleBytes>{};
        to.zeros[r] = Bits == 4 ? 0x08080808u : 0x80808080u;
        if (exists && p.weights.stored.zeros) to.zeros[r] = load_again<1>(p.weights.stored.zeros + unit).of[0];
    }
}

// Weights 0 and 2 of a quad, or 1 and 3, less their zero, as a pair. In 4 bits `place` counts half bytes, else bytes.
template <int Bits>
__device__ __forceinline__ uint32_t weight_pair(uint32_t word, int place, uint32_t zero) {
    if (Bits == 4) {  // 0x4300 is 128, and its last bits count ones
        return add_bf16_pair((word >> (4 * place) & 0x000F000Fu) | 0x43004300u, (0xC300u | zero) * 0x10001u);
    }
    return bf16_of_bytes(word, place, place + 2, static_cast<float>(zero));
}

// The left operand of two products: rows g and g + 8 are outputs 2 * pair and 2 * pair + 1 of the lane's four, the columns what
// its two quads have.
template <int Bits, int ScaleBytes>
__device__ __forceinline__ void weights_of(const Held<Bits, ScaleBytes>& held, int r, int pair, uint32_t (&a)[2][4]) {
#pragma unroll
    for (int quad = 0; quad < 2; ++quad) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const int output = 2 * pair + row;
            const uint32_t word = held.codes[r][Bits == 4 ? 0 : quad].of[output], zero = held.zeros[r] >> (8 * output) & 255;
            a[quad][row] = weight_pair<Bits>(word, Bits == 4 ? quad : 0, zero);
            a[quad][row + 2] = weight_pair<Bits>(word, Bits == 4 ? quad + 2 : 1, zero);
        }
    }
}

// ---- rows of x -------------------------------------------------------------------------------------------------------------

// Four elements of a row as pairs (0, 2) and (1, 3) of bfloat16; a float32 is the sum of three.
template <class Element>
struct Inputs {
    static constexpr int parts = 1;
};
template <>
struct Inputs<float> {
    static constexpr int parts = 3;
};

__device__ __forceinline__ void split(const Words<2>& from, uint32_t (&to)[1][2]) {
    to[0][0] = __byte_perm(from.of[0], from.of[1], 0x5410);
    to[0][1] = __byte_perm(from.of[0], from.of[1], 0x7632);
}
__device__ __forceinline__ void split(Words<4> rest, uint32_t (&to)[3][2]) {
#pragma unroll
    for (int part = 0; part < 3; ++part) {
        to[part][0] = __byte_perm(rest.of[0], rest.of[2], 0x7632);
        to[part][1] = __byte_perm(rest.of[1], rest.of[3], 0x7632);
        for (uint32_t& bits : rest.of) bits = __float_as_uint(__uint_as_float(bits) - __uint_as_float(bits & 0xFFFF0000u));
    }
}

__device__ __forceinline__ void put(Words<2>& to, int i, Bf16 x) {
    to.of[i / 2] |= static_cast<uint32_t>(x.bits) << (16 * (i % 2));
}
__device__ __forceinline__ void put(Words<4>& to, int i, float x) { to.of[i] = __float_as_uint(x); }

template <class Element>
__device__ __forceinline__ void load_inputs(const Product& p, int64_t row, int64_t first, bool aligned,
                                            uint32_t (&to)[Inputs<Element>::parts][2]) {
    Words<sizeof(Element)> four = {};  // as many words as bytes to an element
    if (row < p.n_rows) {
        const Element* from = static_cast<const Element*>(p.x) + row * p.x_stride + first;
        if (aligned && first + 4 <= p.weights.stored.n_in) {
            four = load_again<sizeof(Element)>(from);
        } else {
            for (int i = 0; i < 4 && first + i < p.weights.stored.n_in; ++i) put(four, i, from[i]);
        }
    }
    split(four, to);
}

// ---- the product -----------------------------------------------------------------------------------------------------------

template <int Tiles>
using Sums = float[Tiles][2][4];  // of each pair of outputs: see multiply_bf16

template <int Bits, int ScaleBytes, class Element, int Tiles>
__device__ __forceinline__ void multiply_block(const Product& p, const Held<Bits, ScaleBytes>& held, int64_t first_row,
                                               int64_t block, bool aligned, Sums<Tiles>& sums) {
    const int lane = static_cast<int>(threadIdx.x) % warp_size;
#pragma unroll
    for (int r = 0; r < runs; ++r) {
        uint32_t a[2][2][4];
        float scales[4];
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) weights_of<Bits, ScaleBytes>(held, r, pair, a[pair]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t bits = ScaleBytes == 4 ? held.scales[r].of[i] : held.scales[r].of[i / 2] >> (16 * (i % 2)) & 0xFFFFu;
            scales[i] = p.weights.scale(bits);
        }
#pragma unroll
        for (int tile = 0; tile < Tiles; ++tile) {
            if (first_row + tile * tile_rows >= p.n_rows) break;
            float of_run[2][4] = {};
#pragma unroll
            for (int quad = 0; quad < 2; ++quad) {
                const int64_t first = block * block_weights + r * run_weights + quad * (run_weights / 2) + lane % 4 * 4;
                uint32_t b[Inputs<Element>::parts][2];
                load_inputs<Element>(p, first_row + tile * tile_rows + lane / 4, first, aligned, b);
#pragma unroll
                for (auto& part : b) {
                    for (int pair = 0; pair < 2; ++pair) multiply_bf16(of_run[pair], a[pair][quad], part[0], part[1]);
                }
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) sums[tile][i / 4][i % 4] += of_run[i / 4][i % 4] * scales[i / 2];
        }
    }
}

template <class Element>
__device__ __forceinline__ void finish(const Product& p, int64_t row, int64_t output, float sum) {
    if (p.bias) sum += to_float(static_cast<const Element*>(p.bias)[output]);
    store(static_cast<Element*>(p.out) + row * p.out_stride + output, sum);
}

template <int Bits, int ScaleBytes, class Element, int Tiles>
__global__ void __launch_bounds__(threads) product(Product p, bool aligned) {
    __shared__ float all[n_warps][Tiles * tile_rows][outs + 1];
    const int warp = static_cast<int>(threadIdx.x) / warp_size, lane = static_cast<int>(threadIdx.x) % warp_size;
    const int64_t panel = static_cast<int64_t>(blockIdx.x) * 2 + lane / 16, first_row = blockIdx.y * Tiles * tile_rows;
    const int64_t first = blockIdx.z * p.piece_blocks + warp, behind = (blockIdx.z + 1) * p.piece_blocks;
    const int64_t end = behind < p.weights.n_blocks ? behind : p.weights.n_blocks;
    Sums<Tiles> sums = {};
    Held<Bits, ScaleBytes> held;
    if (first < end) load<Bits, ScaleBytes>(p, panel, first, held);
    for (int64_t block = first; block < end; block += n_warps) {
        Held<Bits, ScaleBytes> next;  // under way while this one is multiplied
        if (block + n_warps < end) load<Bits, ScaleBytes>(p, panel, block + n_warps, next);
        multiply_block<Bits, ScaleBytes, Element, Tiles>(p, held, first_row, block, aligned, sums);
        if (block + n_warps < end) held = next;
    }
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
        for (int i = 0; i < 8; ++i) {  // output i / 2 of the lane's four, row i % 2 of its two
            all[warp][tile * tile_rows + lane % 4 * 2 + i % 2][lane / 4 * 4 + i / 2] = sums[tile][i / 4][i % 4];
        }
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < Tiles * tile_rows * outs; i += threads) {
        const int64_t row = first_row + i / outs, output = static_cast<int64_t>(blockIdx.x) * outs + i % outs;
        if (row >= p.n_rows || output >= p.weights.stored.n_out) continue;
        float sum = 0.0f;
        for (int w = 0; w < n_warps; ++w) sum += all[w][i / outs][i % outs];
        if (p.n_pieces == 1) {
            finish<Element>(p, row, output, sum);
        } else {
            p.parts[(blockIdx.z * p.n_rows + row) * p.weights.stored.n_out + output] = sum;
        }
    }
}

template <class Element>
__global__ void join(Product p) {
    const int64_t output = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x, row = blockIdx.y;
    if (output >= p.weights.stored.n_out) return;
    float sum = 0.0f;
    for (int64_t piece = 0; piece < p.n_pieces; ++piece) sum += p.parts[(piece * p.n_rows + row) * p.weights.stored.n_out + output];
    finish<Element>(p, row, output, sum);
}

// ---- launches --------------------------------------------------------------------------------------------------------------

int64_t tiles_of(int64_t n_rows) { return n_rows <= tile_rows ? 1 : most_tiles; }

// A row is divided where its outputs alone do not give every multiprocessor a block of threads.
Product product_of(const llmctl_quantized_weight& weight, int64_t n_rows) {
    if (n_rows < 0) throw std::invalid_argument("a size is below 0");
    Product p = {};
    p.weights = checked(weight), p.n_rows = n_rows, p.n_pieces = 1;
    const int64_t row_tiles = (n_rows + tiles_of(n_rows) * tile_rows - 1) / (tiles_of(n_rows) * tile_rows);
    const int64_t blocks = (weight.n_out + outs - 1) / outs * row_tiles;
    if (blocks > 0) {
        const int64_t wanted = multiprocessors() / blocks, most = p.weights.n_blocks / (n_warps * blocks_of_a_warp);
        p.n_pieces = std::max<int64_t>(1, std::min(wanted, most));
    }
    p.piece_blocks = (p.weights.n_blocks + p.n_pieces - 1) / p.n_pieces;
    return p;
}

int64_t scratch_bytes(const Product& p) {
    return p.n_pieces == 1 ? 0 : p.n_pieces * p.n_rows * p.weights.stored.n_out * static_cast<int64_t>(sizeof(float));
}

template <int Bits, int ScaleBytes, class Element>
void launch_product(const Product& p, void* stream) {
    const int64_t rows = tiles_of(p.n_rows) * tile_rows, row_tiles = (p.n_rows + rows - 1) / rows;
    if (row_tiles > 65535) throw std::invalid_argument("too many rows for a product made for few");
    const dim3 blocks(static_cast<unsigned>((p.weights.stored.n_out + outs - 1) / outs), static_cast<unsigned>(row_tiles),
                      static_cast<unsigned>(p.n_pieces));
    constexpr uintptr_t bytes = 4 * sizeof(Element);
    const bool aligned = reinterpret_cast<uintptr_t>(p.x) % bytes == 0 && (p.n_rows == 1 || p.x_stride % 4 == 0);
    const auto kernel = rows == tile_rows ? product<Bits, ScaleBytes, Element, 1> : product<Bits, ScaleBytes, Element, most_tiles>;
    launch(kernel, blocks, threads, 0, stream, p, aligned);
}

template <int Bits, class Element>
void launch_product(const Product& p, void* stream) {
    if (p.weights.stored.scales_dtype == LLMCTL_F32) return launch_product<Bits, 4, Element>(p, stream);
    return launch_product<Bits, 2, Element>(p, stream);
}

}  // namespace
}  // namespace cuda
}  // namespace llmctl

int llmctl_cuda_quantized_linear_scratch(const llmctl_quantized_weight* weight, int64_t n_rows, int64_t* bytes) {
    using namespace llmctl;
    return guarded([&] { *bytes = cuda::scratch_bytes(cuda::product_of(*weight, n_rows)); });
}

int llmctl_cuda_quantized_linear(int32_t dtype, const void* x, int64_t x_stride, const llmctl_quantized_weight* weight,
                                 const void* bias, void* out, int64_t out_stride, int64_t n_rows, void* scratch,
                                 void* stream) {
    using namespace llmctl;
    return guarded([&] {
        cuda::Product p = cuda::product_of(*weight, n_rows);
        p.x = x, p.bias = bias, p.out = out, p.x_stride = x_stride, p.out_stride = out_stride;
        p.parts = static_cast<float*>(scratch);
        if (n_rows == 0 || weight->n_out == 0) return;
        cuda::with_element(dtype, [&](auto* element) {
            using Element = std::remove_pointer_t<decltype(element)>;
            weight->bits == 4 ? cuda::launch_product<4, Element>(p, stream) : cuda::launch_product<8, Element>(p, stream);
            if (p.n_pieces == 1) return;
            const auto columns = static_cast<unsigned>((weight->n_out + cuda::threads - 1) / cuda::threads);
            cuda::launch(cuda::join<Element>, dim3(columns, static_cast<unsigned>(n_rows)), cuda::threads, 0, stream, p);
        });
    });
}
