// Drawing tokens, a block for each row: filters as thresholds found digit by digit, then the exponential race among what is
// left. Sums that decide are taken in whole numbers, so that the order of the threads does not matter.
#include <cmath>

#include "boundary.h"
#include "cuda/device.h"

namespace llmctl {
namespace cuda {
namespace {

constexpr int threads = 512, n_warps = threads / warp_size, n_digits = 256;
constexpr double one_in_mass = 1099511627776.0;  // 2^40: the likeliest token's share of the mass

struct Best {
    double score;
    int64_t token;
};
struct Better {
    __device__ Best operator()(Best a, Best b) const {
        return b.score > a.score || (b.score == a.score && b.token < a.token) ? b : a;
    }
};

// A whole number that orders like the value (-0 and 0 as one).
__device__ uint32_t rank_of(float value) {
    const uint32_t bits = __float_as_uint(value == 0.0f ? 0.0f : value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Row {
    const float* scores;
    int64_t n;
    float temperature, highest;
    __device__ float operator[](int64_t i) const { return scores[i] / temperature; }
    __device__ uint64_t mass(float value) const {
        return static_cast<uint64_t>(expf(value - highest) * static_cast<float>(one_in_mass));
    }
};

// Philox4x32-10 (Salmon et al., SC'11) at the counter (token / 4, position, sequence, 0).
__device__ uint32_t philox_word(uint64_t seed, uint32_t position, uint32_t sequence, int64_t token) {
    uint32_t words[4] = {static_cast<uint32_t>(token / 4), position, sequence, 0};
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
        const uint64_t p = static_cast<uint64_t>(words[0]) * 0xD2511F53u, q = static_cast<uint64_t>(words[2]) * 0xCD9E8D57u;
        words[0] = static_cast<uint32_t>(q >> 32) ^ words[1] ^ key0;
        words[1] = static_cast<uint32_t>(q);
        words[2] = static_cast<uint32_t>(p >> 32) ^ words[3] ^ key1;
        words[3] = static_cast<uint32_t>(p);
    }
    return words[token % 4];
}

__device__ double gumbel_noise(uint32_t word) { return -log(-log1p(-(word + 0.5) * 2.3283064365386963e-10)); }

// Walks down the values digit by digit: `weight` of a value adds to its digit's bin, and the walk follows the first bin, from
// the top, in which the running sum reaches the target. Gives the rank at which that happens.
template <class Weight>
__device__ uint32_t descend(const Row& row, uint32_t lowest, uint64_t target, Weight weight, unsigned long long* bins,
                            unsigned long long* found) {
    uint32_t prefix = 0;
    unsigned long long before = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = static_cast<int>(threadIdx.x); i < n_digits; i += static_cast<int>(blockDim.x)) bins[i] = 0;
        __syncthreads();
        for (int64_t i = threadIdx.x; i < row.n; i += blockDim.x) {
            const float value = row[i];
            const uint32_t rank = rank_of(value);
            if (rank < lowest || (shift < 24 && (rank ^ prefix) >> (shift + 8))) continue;
            atomicAdd(&bins[rank >> shift & 255], static_cast<unsigned long long>(weight(value)));
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int digit = 255, last = 0;
            unsigned long long sum = before;
            for (; digit >= 0; --digit) {
                if (bins[digit] == 0) continue;
                last = digit;
                if (sum + bins[digit] >= target) break;
                sum += bins[digit];
            }
            found[0] = static_cast<unsigned long long>(digit < 0 ? last : digit);
            found[1] = digit < 0 ? sum - bins[last] : sum;
        }
        __syncthreads();
        prefix |= static_cast<uint32_t>(found[0]) << shift;
        before = found[1];
        __syncthreads();
    }
    return prefix;
}

__global__ void sample(llmctl_sample_args args, int64_t* tokens) {
    __shared__ unsigned long long bins[n_digits], found[2], sums[n_warps];
    __shared__ Best bests[n_warps];
    const int64_t r = blockIdx.x;
    Row row = {args.scores + r * args.scores_stride, args.n_tokens, args.greedy[r] ? 1.0f : args.temperature[r], 0.0f};

    Best top = {-INFINITY, row.n};
    bool is_nan = false;
    for (int64_t i = threadIdx.x; i < row.n; i += blockDim.x) {
        const float value = row[i];
        is_nan |= value != value;
        top = Better()(top, Best{value, i});
    }
    if (reduce_block<unsigned long long>(is_nan, Max(), sums)) {
        if (threadIdx.x == 0) tokens[r] = -1;
        return;
    }
    // Shuffled as the two words that it consists of.
    for (int distance = warp_size / 2; distance > 0; distance /= 2) {
        top = Better()(top, Best{__shfl_xor_sync(every_lane, top.score, distance),
                                 __shfl_xor_sync(every_lane, static_cast<long long>(top.token), distance)});
    }
    if (threadIdx.x % warp_size == 0) bests[threadIdx.x / warp_size] = top;
    __syncthreads();
    for (int i = 0; i < n_warps; ++i) top = Better()(top, bests[i]);
    __syncthreads();
    row.highest = static_cast<float>(top.score);
    if (args.greedy[r] || row.highest == INFINITY || row.highest == -INFINITY) {
        if (threadIdx.x == 0) tokens[r] = top.token;
        return;
    }

    uint32_t lowest = 0;
    if (args.top_k[r] > 0 && args.top_k[r] < row.n) {
        lowest = descend(row, 0, static_cast<uint64_t>(args.top_k[r]), [](float) { return 1ull; }, bins, found);
    }
    if (args.top_p[r] < 1.0) {
        const auto mass = [&row](float value) { return row.mass(value); };
        unsigned long long total = 0;
        for (int64_t i = threadIdx.x; i < row.n; i += blockDim.x) {
            if (rank_of(row[i]) >= lowest) total += mass(row[i]);
        }
        total = reduce_block(total, Sum(), sums);
        const double target = ceil(args.top_p[r] * static_cast<double>(total));
        const uint32_t rank = descend(row, lowest, target < 1.0 ? 1 : static_cast<uint64_t>(target), mass, bins, found);
        lowest = rank > lowest ? rank : lowest;
    }
    const uint32_t likely = rank_of(row.highest + args.log_min_p[r]);
    lowest = likely > lowest ? likely : lowest;

    // A token beats another only if its uniform number is at most exp(value - best), since -log(1 - u) >= u: that is looked at
    // in float and with a margin, and the few that pass are reckoned in double.
    const uint64_t seed = static_cast<uint64_t>(args.seeds[r]);
    const uint32_t position = static_cast<uint32_t>(args.position), sequence = static_cast<uint32_t>(args.sequences[r]);
    Best best = {row.highest + gumbel_noise(philox_word(seed, position, sequence, top.token)), top.token};
    for (int64_t i = threadIdx.x; i < row.n; i += blockDim.x) {
        const float value = row[i];
        if (rank_of(value) < lowest) continue;
        const uint32_t word = philox_word(seed, position, sequence, i);
        const float uniform = static_cast<float>(word) * 2.3283064e-10f;
        if (uniform > 1.001f * expf(static_cast<float>(value - best.score)) + 1e-9f) continue;
        best = Better()(best, Best{value + gumbel_noise(word), i});
    }
    for (int distance = warp_size / 2; distance > 0; distance /= 2) {
        best = Better()(best, Best{__shfl_xor_sync(every_lane, best.score, distance),
                                   __shfl_xor_sync(every_lane, static_cast<long long>(best.token), distance)});
    }
    if (threadIdx.x % warp_size == 0) bests[threadIdx.x / warp_size] = best;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < n_warps; ++i) best = Better()(best, bests[i]);
        tokens[r] = best.token;
    }
}

}  // namespace
}  // namespace cuda
}  // namespace llmctl

int llmctl_cuda_sample(const llmctl_sample_args* args, int64_t* tokens, void* stream) {
    using namespace llmctl;
    return guarded([&] {
        if (args->n_rows < 0 || args->n_tokens < 0 || args->n_tokens > INT32_MAX) {
            throw std::invalid_argument("a vocabulary of no such size can be");
        }
        if (args->n_rows == 0) return;
        if (args->n_tokens == 0) throw std::invalid_argument("the vocabulary is empty");
        cuda::launch(cuda::sample, dim3(static_cast<unsigned>(args->n_rows)), cuda::threads, 0, stream, *args, tokens);
    });
}
