// Passes over a vocabulary's scores.
#pragma once

#include "cpu/sampling.h"
#include "cpu/simd/exp.h"

namespace llmctl {
namespace {

template <class S>
float sampling_scale(const float* scores, int64_t n, float temperature, float* scaled) {
    const auto divisor = S::all(temperature);
    auto highest = S::all(-__builtin_inff());
    bool is_nan = false;
    int64_t i = 0;
    for (; i + S::lanes <= n; i += S::lanes) {
        const auto x = S::div(S::load(scores + i), divisor);
        S::store(scaled + i, x);
        is_nan |= S::any_nan(x);
        highest = S::max(x, highest);
    }
    float found = S::highest(highest);
    for (; i < n; ++i) {
        scaled[i] = scores[i] / temperature;
        is_nan |= scaled[i] != scaled[i];
        found = scaled[i] > found ? scaled[i] : found;
    }
    return is_nan ? __builtin_nanf("") : found;
}

template <class S>
float sampling_exp_sum(const float* values, int64_t n, float highest) {
    typename S::Vec parts[4] = {S::zero(), S::zero(), S::zero(), S::zero()};
    const auto reference = S::all(highest);
    int64_t i = 0;
    for (; i + S::lanes <= n; i += S::lanes) {
        auto& sum = parts[i / S::lanes % 4];
        sum = S::add(sum, exp<S>(S::sub(S::load(values + i), reference)));
    }
    float sums[4];
    S::sums(parts, sums);
    float total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (; i < n; ++i) total += exp_one<S>(values[i] - highest);
    return total;
}

template <class S>
int64_t sampling_collect(const float* values, int64_t n, float lowest, int32_t* places) {
    const auto limit = S::all(lowest);
    int64_t count = 0, i = 0;
    for (; i + S::lanes <= n; i += S::lanes) {
        if (!S::any_at_least(S::load(values + i), limit)) continue;
        for (int64_t j = i; j < i + S::lanes; ++j) {
            places[count] = static_cast<int32_t>(j);
            count += values[j] >= lowest;
        }
    }
    for (; i < n; ++i) {
        if (values[i] >= lowest) places[count++] = static_cast<int32_t>(i);
    }
    return count;
}

template <class S>
void sampling_mass(const float* values, int64_t n, float highest, double* to) {
    float shares[S::lanes], bins[S::lanes];
    for (int64_t i = 0; i < n; i += S::lanes) {
        const int left = n - i < S::lanes ? static_cast<int>(n - i) : S::lanes;
        const auto x = left == S::lanes ? S::load(values + i) : S::load_some(values + i, left);
        const auto below = S::sub(S::all(highest), x);
        S::store(shares, exp<S>(S::sub(x, S::all(highest))));
        S::store(bins, S::min(S::mul(below, S::all(sampling_bins_per_unit)), S::all(sampling_bins - 1)));
        for (int lane = 0; lane < left; ++lane) to[static_cast<int>(bins[lane])] += shares[lane];
    }
}

constexpr int philox_blocks = 64;  // made at once, so that vectors have something to do

// Words of blocks [first, first + philox_blocks), in the order of the tokens that they belong to.
inline void philox_words(const PhiloxRow& row, uint32_t first, uint32_t* words) {
    uint32_t a[philox_blocks], b[philox_blocks], c[philox_blocks], d[philox_blocks];
    for (int i = 0; i < philox_blocks; ++i) {
        a[i] = first + static_cast<uint32_t>(i);
        b[i] = row.position;
        c[i] = row.sequence;
        d[i] = 0;
    }
    uint32_t key0 = row.key[0], key1 = row.key[1];
    for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
#pragma omp simd
        for (int i = 0; i < philox_blocks; ++i) {
            const uint64_t p = uint64_t{a[i]} * 0xD2511F53u, q = uint64_t{c[i]} * 0xCD9E8D57u;
            a[i] = static_cast<uint32_t>(q >> 32) ^ b[i] ^ key0;
            b[i] = static_cast<uint32_t>(q);
            c[i] = static_cast<uint32_t>(p >> 32) ^ d[i] ^ key1;
            d[i] = static_cast<uint32_t>(p);
        }
    }
    for (int i = 0; i < philox_blocks; ++i) {
        words[4 * i] = a[i];
        words[4 * i + 1] = b[i];
        words[4 * i + 2] = c[i];
        words[4 * i + 3] = d[i];
    }
}

// A token beats `best` only if its uniform number is at most exp(value - best), since -log(1 - u) >= u: that is looked
// at in float and with a margin, and the few that pass are reckoned in double.
template <class S>
Winner sampling_race(const float* values, int64_t n, float lowest, float highest, const PhiloxRow& row, Winner best) {
    constexpr int stretch = 4 * philox_blocks;
    uint32_t words[stretch];
    float numbers[stretch];
    auto margin = S::all(1.001f * exp_one<S>(static_cast<float>(highest - best.score)));
    for (int64_t start = 0; start < n; start += stretch) {
        philox_words(row, static_cast<uint32_t>(start / 4), words);
#pragma omp simd
        for (int i = 0; i < stretch; ++i)
            numbers[i] = static_cast<float>(static_cast<int32_t>(words[i] >> 1)) * 0x1p-31f;
        const int64_t end = n - start < stretch ? n : start + stretch;
        for (int64_t i = start; i < end; i += S::lanes) {
            const int left = end - i < S::lanes ? static_cast<int>(end - i) : S::lanes;
            const auto x = left == S::lanes ? S::load(values + i) : S::load_some(values + i, left);
            const auto limits = S::fma(exp<S>(S::sub(x, S::all(highest))), margin, S::all(1e-9f));
            if (!S::any_at_least(limits, S::load(numbers + (i - start)))) continue;
            for (int64_t j = i; j < i + left; ++j) {
                if (values[j] < lowest) continue;
                const double score = values[j] + gumbel_noise(words[j - start]);
                if (score > best.score || (score == best.score && j < best.token)) best = {j, score};
            }
            margin = S::all(1.001f * exp_one<S>(static_cast<float>(highest - best.score)));
        }
    }
    return best;
}

template <class S>
constexpr SamplingKernels sampling_kernels = {
    sampling_scale<S>,
    sampling_exp_sum<S>,
    sampling_collect<S>,
    sampling_mass<S>,
    sampling_race<S>,
};

}  // namespace
}  // namespace llmctl
