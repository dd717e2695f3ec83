// Attention of few queries to many cached keys (decoding): the keys of a sequence are cut into pieces for as many blocks as the
// device has room for, each takes its piece through an online softmax (arXiv:2205.14135), and a second kernel joins them.
#include "boundary.h"
#include "cuda/attention_tile.h"

namespace llmctl {
namespace cuda {
namespace {

constexpr int n_warps = 4, threads = n_warps * warp_size, stages = 2;

// ---- bfloat16: products on the matrix units --------------------------------------------------------------------------------

// The online softmax of one warp over its keys. A lane has rows g and g + 8 of every fragment, g = lane / 4.
template <int Dim>
struct Sums {
    float highest[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
    float values[Dim / 8][4] = {};
};

template <int Dim>
__device__ void load_queries(const Plan& plan, const Work& work, const Query (&mine)[2], uint32_t (&q)[Dim / 16][4]) {
    const llmctl_attention_args& a = plan.a;
    const int within = static_cast<int>(threadIdx.x) % 4;
    for (int half = 0; half < 2; ++half) {
        const auto* from = static_cast<const uint16_t*>(a.q) + work.sequence * a.q_strides[0] +
                           mine[half].head * a.q_strides[1] + mine[half].t * a.q_strides[2];
        for (int step = 0; step < Dim / 16; ++step) {
            for (int part = 0; part < 2; ++part) {
                const int dim = step * 16 + part * 8 + 2 * within;
                const uint32_t low = mine[half].exists && dim < a.head_dim ? from[dim] : 0;
                const uint32_t high = mine[half].exists && dim + 1 < a.head_dim ? from[dim + 1] : 0;
                q[step][half + 2 * part] = low | high << 16;
            }
        }
    }
}

template <int Dim>
__device__ void attend(const Plan& plan, const Work& work, const Query (&mine)[2], const uint32_t (&q)[Dim / 16][4],
                       const Tile<Dim>& tile, const ByteTile<Dim>* bytes, int64_t first, Sums<Dim>& sums) {
    const int lane = static_cast<int>(threadIdx.x) % warp_size, g = lane / 4, within = lane % 4;
    float scores[2][4] = {};
#pragma unroll
    for (int step = 0; step < Dim / 16; ++step) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const uint16_t* from = &tile.k[n * 8 + g][step * 16 + 2 * within];
            multiply_bf16(scores[n], q[step], *reinterpret_cast<const uint32_t*>(from),
                          *reinterpret_cast<const uint32_t*>(from + 8));
        }
    }
    float scale[2];
    for (int half = 0; half < 2; ++half) {
        float highest = sums.highest[half];
        for (int n = 0; n < 2; ++n) {
            for (int i = 0; i < 2; ++i) {
                const int key = n * 8 + 2 * within + i;
                float& score = scores[n][2 * half + i];
                if (bytes) score *= bytes->k_scales[key];
                score = scored(plan.a, score, mine[half], work.sequence, first + key);
                highest = Max()(highest, score);
            }
        }
        highest = Max()(highest, __shfl_xor_sync(every_lane, highest, 1));
        highest = Max()(highest, __shfl_xor_sync(every_lane, highest, 2));
        scale[half] = weight_of(sums.highest[half], highest);
        sums.highest[half] = highest;
        sums.total[half] *= scale[half];
        for (int n = 0; n < 2; ++n) {
            for (int i = 0; i < 2; ++i) {
                float& score = scores[n][2 * half + i];
                score = weight_of(score, highest);
                sums.total[half] += score;
                if (bytes && score != 0.0f) score *= bytes->v_scales[n * 8 + 2 * within + i];
            }
        }
    }
    // What comes out of a product as rows of 8 columns twice goes into the next one as rows of 16.
    const uint32_t weights[4] = {bf16_pair(scores[0][0], scores[0][1]), bf16_pair(scores[0][2], scores[0][3]),
                                 bf16_pair(scores[1][0], scores[1][1]), bf16_pair(scores[1][2], scores[1][3])};
#pragma unroll
    for (int dim = 0; dim < Dim; dim += 16) {
        uint32_t v[4];
        load_transposed_8x8x4(v, &tile.v[lane % 16][dim + lane / 16 * 8]);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            float(&to)[4] = sums.values[dim / 8 + n];
            for (int i = 0; i < 4; ++i) to[i] *= scale[i / 2];
            multiply_bf16(to, weights, v[2 * n], v[2 * n + 1]);
        }
    }
}

// What lies in shared memory while the warps work: tiles of each stage, and of bytes one more that has been widened.
template <int Dim, bool Bytes>
struct Stages {
    using Stage = std::conditional_t<Bytes, ByteTile<Dim>, Tile<Dim>>;
    Stage stage[n_warps][stages];
    Tile<Bytes ? Dim : 0> widened[Bytes ? n_warps : 1];
};

template <int Dim, bool Bytes>
__global__ void __launch_bounds__(threads) piece_bf16(Plan plan, bool by_16_bytes) {
    auto* shared = dynamic_shared<Stages<Dim, Bytes>>();  // and afterwards the warps' sums
    const Work work = work_of(plan);
    const int warp = static_cast<int>(threadIdx.x) / warp_size, lane = static_cast<int>(threadIdx.x) % warp_size;
    const int g = lane / 4, within = lane % 4;
    const Query mine[2] = {query_of(plan, work.sequence, work.kv_head, work.first_row + g),
                           query_of(plan, work.sequence, work.kv_head, work.first_row + g + 8)};
    uint32_t q[Dim / 16][4];
    load_queries<Dim>(plan, work, mine, q);
    Sums<Dim> sums;
    const int64_t step = n_warps * keys, begin = work.range.begin + warp * keys;
    const int64_t count = begin < work.range.end ? (work.range.end - begin + step - 1) / step : 0;
    if (count > 0) shared->stage[warp][0].fetch(plan.a, work, begin, by_16_bytes);
    for (int64_t i = 0; i < count; ++i) {
        auto& now = shared->stage[warp][i % stages];
        if (i + 1 < count) {
            shared->stage[warp][(i + 1) % stages].fetch(plan.a, work, begin + (i + 1) * step, by_16_bytes);
            wait_for_copies<1>();
        } else {
            wait_for_copies<0>();
        }
        __syncwarp();
        if constexpr (Bytes) {
            now.widen(shared->widened[warp]);
            __syncwarp();
            attend<Dim>(plan, work, mine, q, shared->widened[warp], &now, begin + i * step, sums);
        } else {
            attend<Dim>(plan, work, mine, q, now, nullptr, begin + i * step, sums);
        }
        __syncwarp();  // before this stage is fetched into again
    }
    for (int half = 0; half < 2; ++half) {
        sums.total[half] += __shfl_xor_sync(every_lane, sums.total[half], 1);
        sums.total[half] += __shfl_xor_sync(every_lane, sums.total[half], 2);
    }

    // The warps' sums, joined by all threads.
    __syncthreads();
    constexpr int width = Dim + 2;
    auto* all = reinterpret_cast<float*>(shared);  // [warp][row][width]
    for (int half = 0; half < 2; ++half) {
        float* to = all + (warp * rows + g + 8 * half) * width;
        if (within == 0) to[0] = sums.highest[half], to[1] = sums.total[half];
        for (int n = 0; n < Dim / 8; ++n) {
            to[2 + n * 8 + 2 * within] = sums.values[n][2 * half];
            to[2 + n * 8 + 2 * within + 1] = sums.values[n][2 * half + 1];
        }
    }
    __syncthreads();
    for (int row = warp; row < rows; row += n_warps) {
        float highest = -INFINITY;
        for (int w = 0; w < n_warps; ++w) highest = Max()(highest, all[(w * rows + row) * width]);
        float* to = part_of(plan, work.tile, blockIdx.x, row);
        for (int i = lane + 1; i < plan.a.head_dim + 2; i += warp_size) {
            float sum = 0.0f;
            for (int w = 0; w < n_warps; ++w) {
                const float* from = all + (w * rows + row) * width;
                sum += from[i] * weight_of(from[0], highest);
            }
            to[i] = sum;
        }
        if (lane == 0) to[0] = highest;
    }
}

// ---- float32: a warp for each row, 32 keys at once ---------------------------------------------------------------------------

constexpr int max_dims_per_lane = LLMCTL_ATTENTION_MAX_HEAD_DIM / warp_size;

// Keys or values of one kv head as numbers.
template <class Element>
struct Numbers {
    const Element* first;
    int64_t stride;
    __device__ float at(int64_t key, int64_t i) const { return to_float(first[key * stride + i]); }
};
template <>
struct Numbers<uint8_t> {
    const uint8_t* first;
    int64_t stride;
    const float* scales;
    __device__ float at(int64_t key, int64_t i) const {
        return static_cast<float>(first[key * stride + i] - 128) * scales[key];
    }
};

template <class Element>
__device__ Numbers<Element> numbers(const llmctl_attention_args&, const Work& work, const void* from,
                                    const int64_t (&strides)[3], const float*) {
    return {begin_of<Element>(from, strides, work), strides[2]};
}
template <>
__device__ Numbers<uint8_t> numbers(const llmctl_attention_args& a, const Work& work, const void* from,
                                    const int64_t (&strides)[3], const float* scales) {
    const int64_t place = work.sequence * a.scale_strides[0] + work.kv_head * a.scale_strides[1];
    return {begin_of<uint8_t>(from, strides, work), strides[2], scales + place};
}

template <class Element>
__global__ void piece_f32(Plan plan) {
    const llmctl_attention_args& a = plan.a;
    const Work work = work_of(plan);
    const int warp = static_cast<int>(threadIdx.x) / warp_size, lane = static_cast<int>(threadIdx.x) % warp_size;
    const auto k = numbers<Element>(a, work, a.k, a.k_strides, a.k_scales);
    const auto v = numbers<Element>(a, work, a.v, a.v_strides, a.v_scales);
    for (int row = warp; row < rows; row += n_warps) {
        const Query query = query_of(plan, work.sequence, work.kv_head, work.first_row + row);
        const float* q = static_cast<const float*>(a.q) + work.sequence * a.q_strides[0] + query.head * a.q_strides[1] +
                         query.t * a.q_strides[2];
        float highest = -INFINITY, total = 0.0f, values[max_dims_per_lane] = {};
        for (int64_t first = work.range.begin; query.exists && first < work.range.end; first += warp_size) {
            const int64_t key = first + lane;
            float score = -INFINITY;
            if (key < work.range.end) {
                float product = 0.0f;
                for (int64_t i = 0; i < a.head_dim; ++i) product += q[i] * k.at(key, i);
                score = scored(a, product, query, work.sequence, key);
            }
            const float now = reduce_warp(Max()(highest, score), Max());
            const float scale = weight_of(highest, now), weight = weight_of(score, now);
            highest = now;
            total = total * scale + reduce_warp(weight, Sum());
            for (int i = 0; i < max_dims_per_lane; ++i) values[i] *= scale;
            for (int other = 0; other < warp_size && first + other < work.range.end; ++other) {
                const float share = __shfl_sync(every_lane, weight, other);
                if (share == 0.0f) continue;
                for (int i = 0; lane + i * warp_size < a.head_dim; ++i) {
                    values[i] += share * v.at(first + other, lane + i * warp_size);
                }
            }
        }
        float* to = part_of(plan, work.tile, blockIdx.x, row);
        if (lane == 0) to[0] = highest, to[1] = total;
        for (int i = 0; lane + i * warp_size < a.head_dim; ++i) to[2 + lane + i * warp_size] = values[i];
    }
}

// ---- the pieces joined -------------------------------------------------------------------------------------------------------

template <class Element>
__global__ void join(Plan plan) {
    const llmctl_attention_args& a = plan.a;
    const int64_t tile = blockIdx.y, head = tile / plan.n_tiles, sequence = head / a.kv_heads;
    const int row = static_cast<int>(blockIdx.x);
    const Query query = query_of(plan, sequence, head % a.kv_heads, tile % plan.n_tiles * rows + row);
    if (!query.exists) return;
    float highest = -INFINITY, total = 0.0f;
    for (int64_t piece = 0; piece < plan.n_pieces; ++piece) highest = Max()(highest, part_of(plan, tile, piece, row)[0]);
    for (int64_t piece = 0; piece < plan.n_pieces; ++piece) {
        const float* from = part_of(plan, tile, piece, row);
        total += from[1] * weight_of(from[0], highest);
    }
    Element* out = static_cast<Element*>(a.out) + sequence * a.out_strides[0] + query.head * a.out_strides[1] +
                   query.t * a.out_strides[2];
    for (int64_t i = threadIdx.x; i < a.head_dim; i += blockDim.x) {
        float sum = 0.0f;
        for (int64_t piece = 0; piece < plan.n_pieces; ++piece) {
            const float* from = part_of(plan, tile, piece, row);
            sum += from[2 + i] * weight_of(from[0], highest);
        }
        store(out + i, total > 0.0f ? sum / total : total != total ? total : 0.0f);  // nothing seen: 0
    }
}

// Two waves of blocks, none of which has fewer than 256 keys.
Plan plan_of(const llmctl_attention_args& a) {
    for (const int64_t size : {a.batch, a.heads, a.kv_heads, a.queries, a.keys, a.head_dim}) {
        if (size < 0) throw std::invalid_argument("a size is below 0");
    }
    if (a.head_dim > LLMCTL_ATTENTION_MAX_HEAD_DIM) throw std::invalid_argument("a head is too wide");
    if (a.kv_heads == 0 || a.heads % a.kv_heads != 0) {
        throw std::invalid_argument("the heads are no multiple of the kv heads");
    }
    Plan plan = {a, a.heads / a.kv_heads, 0, 0, 1, 0, nullptr};
    plan.n_rows = a.queries * plan.group;
    plan.n_tiles = (plan.n_rows + rows - 1) / rows;
    const int64_t blocks = a.batch * a.kv_heads * plan.n_tiles;
    if (blocks > 65535) throw std::invalid_argument("too many queries for attention made for decoding");
    if (blocks > 0 && a.keys > 0) {
        const int64_t wanted = (4 * multiprocessors() + blocks - 1) / blocks, most = (a.keys + 255) / 256;
        plan.n_pieces = wanted < most ? wanted : most;
    }
    plan.piece_keys = (a.keys + plan.n_pieces - 1) / plan.n_pieces;
    plan.piece_keys = (plan.piece_keys + keys - 1) / keys * keys;
    return plan;
}

int64_t scratch_bytes(const Plan& plan) {
    const int64_t tiles = plan.a.batch * plan.a.kv_heads * plan.n_tiles;
    return tiles * plan.n_pieces * rows * (plan.a.head_dim + 2) * static_cast<int64_t>(sizeof(float));
}

// Whether keys or values may be copied in pieces of 16 bytes.
bool in_16_bytes(const void* pointer, const int64_t (&strides)[3], int64_t element_bytes) {
    bool fits = reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
    for (const int64_t stride : strides) fits = fits && stride * element_bytes % 16 == 0;
    return fits;
}

template <int Dim, bool Bytes>
void launch_bf16(const Plan& plan, dim3 blocks, void* stream) {
    const size_t for_tiles = sizeof(Stages<Dim, Bytes>), for_sums = sizeof(float) * n_warps * rows * (Dim + 2);
    const size_t bytes = for_tiles > for_sums ? for_tiles : for_sums;
    const auto kernel = piece_bf16<Dim, Bytes>;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
    const llmctl_attention_args& a = plan.a;
    const int64_t element = Bytes ? 1 : 2;
    const bool by_16_bytes = in_16_bytes(a.k, a.k_strides, element) && in_16_bytes(a.v, a.v_strides, element);
    launch(kernel, blocks, threads, bytes, stream, plan, by_16_bytes);
}

template <bool Bytes>
void launch_bf16(const Plan& plan, dim3 blocks, void* stream) {
    const int64_t dim = plan.a.head_dim;
    if (dim <= 32) return launch_bf16<32, Bytes>(plan, blocks, stream);
    if (dim <= 64) return launch_bf16<64, Bytes>(plan, blocks, stream);
    if (dim <= 96) return launch_bf16<96, Bytes>(plan, blocks, stream);
    if (dim <= 128) return launch_bf16<128, Bytes>(plan, blocks, stream);
    if (dim <= 192) return launch_bf16<192, Bytes>(plan, blocks, stream);
    return launch_bf16<256, Bytes>(plan, blocks, stream);
}

void launch_pieces(int32_t dtype, const Plan& plan, dim3 blocks, void* stream) {
    const int32_t kv_dtype = plan.a.kv_dtype;
    if (kv_dtype == LLMCTL_I8 && !(plan.a.k_scales && plan.a.v_scales)) throw std::invalid_argument("bytes without scales");
    if (kv_dtype != dtype && kv_dtype != LLMCTL_I8) throw std::invalid_argument("keys and values of no such type");
    if (dtype == LLMCTL_BF16) {
        kv_dtype == LLMCTL_I8 ? launch_bf16<true>(plan, blocks, stream) : launch_bf16<false>(plan, blocks, stream);
    } else {
        launch(kv_dtype == LLMCTL_I8 ? piece_f32<uint8_t> : piece_f32<float>, blocks, threads, 0, stream, plan);
    }
}

}  // namespace
}  // namespace cuda
}  // namespace llmctl

int llmctl_cuda_attention_scratch(const llmctl_attention_args* args, int64_t* bytes) {
    using namespace llmctl;
    return guarded([&] { *bytes = cuda::scratch_bytes(cuda::plan_of(*args)); });
}

int llmctl_cuda_attention(int32_t dtype, const llmctl_attention_args* args, void* scratch, void* stream) {
    using namespace llmctl;
    return guarded([&] {
        cuda::Plan plan = cuda::plan_of(*args);
        plan.parts = static_cast<float*>(scratch);
        if (args->batch == 0 || args->heads == 0 || args->queries == 0 || args->head_dim == 0) return;
        const auto tiles = static_cast<unsigned>(args->batch * args->kv_heads * plan.n_tiles);
        const dim3 blocks(static_cast<unsigned>(plan.n_pieces), tiles), for_rows(cuda::rows, tiles);
        cuda::with_element(dtype, [&](auto* element) {
            using Element = std::remove_pointer_t<decltype(element)>;
            cuda::launch_pieces(dtype, plan, blocks, stream);
            cuda::launch(cuda::join<Element>, for_rows, cuda::threads, 0, stream, plan);
        });
    });
}
