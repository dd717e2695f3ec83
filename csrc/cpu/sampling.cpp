// Drawing tokens: filters as thresholds on the score, then the exponential race (Gumbel-max) among what is left.
#include "cpu/sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "boundary.h"
#include "cpu/kernels.h"
#include "cpu/operations.h"
#include "cpu/pool.h"
#include "llmctl.h"

namespace llmctl {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

// One row's draw. A thread keeps the room that it needs for the next row.
class RowSampler {
public:
    int64_t draw(const llmctl_sample_args& args, int64_t r) {
        n_ = args.n_tokens;
        const float* scores = args.scores + r * args.scores_stride;
        values_.resize(n_);
        places_.resize(n_);
        const float log_sum = args.logprobs ? report_top(args, r, scores) : 0.0f;
        const int64_t token = drawn(args, r, penalized(args, r, scores));
        if (args.logprobs) args.logprobs[r] = token < 0 ? std::nanf("") : scores[token] - log_sum;
        return token;
    }

private:
    // Writes the likeliest tokens; returns the logarithm of the sum of all exponentials.
    float report_top(const llmctl_sample_args& args, int64_t r, const float* scores) {
        const int64_t n_top = args.n_top;
        const float highest = kernels().sampling.scale(scores, n_, 1.0f, values_.data());
        const float log_sum = highest + std::log(kernels().sampling.exp_sum(values_.data(), n_, highest));
        n_candidates_ = n_;
        std::iota(places_.begin(), places_.end(), 0);
        if (n_top > 0 && n_top < n_ && !std::isnan(highest)) keep_best(n_top);
        const auto begin = places_.begin(), end = begin + n_candidates_;
        // NaN, whose order is none, is nobody's business here: such a row draws no token
        const auto is_better = [&](int32_t a, int32_t b) {
            return values_[a] > values_[b] || (values_[a] == values_[b] && a < b);
        };
        if (!std::isnan(highest)) std::partial_sort(begin, begin + n_top, end, is_better);
        for (int64_t i = 0; i < n_top; ++i) {
            args.top_tokens[r * n_top + i] = places_[i];
            args.top_logprobs[r * n_top + i] = values_[places_[i]] - log_sum;
        }
        return log_sum;
    }

    // The scores themselves, or, in `values_`, what penalties leave of them.
    const float* penalized(const llmctl_sample_args& args, int64_t r, const float* scores) {
        if (!args.seen && !args.counts) return scores;
        const float* from = scores;
        if (args.seen) {
            const uint8_t* seen = args.seen + r * n_;
            const float repetition = args.repetition[r];
            for (int64_t i = 0; i < n_; ++i) {
                const float x = from[i], changed = x > 0.0f ? x / repetition : x * repetition;
                values_[i] = seen[i] ? changed : x;
            }
            from = values_.data();
        }
        if (args.counts) {
            const float *counts = args.counts + r * n_, presence = args.presence[r], frequency = args.frequency[r];
            for (int64_t i = 0; i < n_; ++i) {
                values_[i] = (from[i] - frequency * counts[i]) - (counts[i] > 0.0f ? presence : 0.0f);
            }
        }
        return values_.data();
    }

    int64_t drawn(const llmctl_sample_args& args, int64_t r, const float* scores) {
        highest_ = kernels().sampling.scale(scores, n_, args.greedy[r] ? 1.0f : args.temperature[r], values_.data());
        if (std::isnan(highest_)) return -1;
        const int64_t likeliest = std::find(values_.begin(), values_.end(), highest_) - values_.begin();
        if (args.greedy[r] || std::isinf(highest_)) return likeliest;
        has_candidates_ = false;
        float lowest = -infinity;
        if (args.top_k[r] > 0 && args.top_k[r] < n_) lowest = keep_best(args.top_k[r]);
        if (args.top_p[r] < 1.0) lowest = std::max(lowest, nucleus(args.top_p[r]));
        lowest = std::max(lowest, highest_ + args.log_min_p[r]);
        const auto seed = static_cast<uint64_t>(args.seeds[r]);
        const PhiloxRow random{{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
                               static_cast<uint32_t>(args.position),
                               static_cast<uint32_t>(args.sequences[r])};
        return race(random, lowest, likeliest);
    }

    // The candidates are the k largest values, and those that equal the last of them; returns that one.
    float keep_best(int64_t k) {
        int64_t count = kernels().sampling.collect(values_.data(), n_, guess(k), places_.data());
        if (count < k) count = kernels().sampling.collect(values_.data(), n_, -infinity, places_.data());
        sorted_.resize(count);
        for (int64_t i = 0; i < count; ++i) sorted_[i] = values_[places_[i]];
        std::nth_element(sorted_.begin(), sorted_.begin() + (k - 1), sorted_.end(), std::greater<float>());
        const float kth = sorted_[k - 1];
        const auto end =
            std::remove_if(places_.begin(), places_.begin() + count, [&](int32_t i) { return values_[i] < kth; });
        n_candidates_ = end - places_.begin();
        has_candidates_ = true;
        return kth;
    }

    // A value that more than k others very likely reach, from a sample of them.
    float guess(int64_t k) {
        constexpr int64_t size = 2048;
        if (n_ < 4 * size) return -infinity;
        sorted_.resize(size);
        for (int64_t i = 0; i < size; ++i) sorted_[i] = values_[i * n_ / size];
        const int64_t rank = 2 * k * size / n_ + 12;
        if (rank >= size) return -infinity;
        std::nth_element(sorted_.begin(), sorted_.begin() + rank, sorted_.end(), std::greater<float>());
        return sorted_[rank];
    }

    // The last value of the smallest set of the largest that holds `share` of the probability.
    float nucleus(double share) {
        double before = 0.0, total = 0.0;
        sorted_.clear();
        if (has_candidates_) {
            for (int64_t i = 0; i < n_candidates_; ++i) sorted_.push_back(values_[places_[i]]);
            for (const float value : sorted_) total += std::exp(static_cast<double>(value) - highest_);
        } else {
            const int bin = bin_of(share, before, total);
            const float edge = highest_ - static_cast<float>(bin + 1) / sampling_bins_per_unit;
            const float above = bin == sampling_bins - 1 ? -infinity : edge - 1e-3f * (1.0f + std::fabs(edge));
            const int64_t count = kernels().sampling.collect(values_.data(), n_, above, places_.data());
            for (int64_t i = 0; i < count; ++i) {
                const float value = values_[places_[i]];
                const float place = std::min((highest_ - value) * sampling_bins_per_unit, float{sampling_bins - 1});
                if (static_cast<int>(place) == bin) sorted_.push_back(value);
            }
        }
        std::sort(sorted_.begin(), sorted_.end(), std::greater<float>());
        float last = highest_;
        for (const float value : sorted_) {
            if (before >= share * total) break;
            last = value;
            before += std::exp(static_cast<double>(value) - highest_);
        }
        return last;
    }

    // The bin in which the share is reached, the mass of those before it, and of all.
    int bin_of(double share, double& before, double& total) {
        double mass[sampling_bins] = {};
        kernels().sampling.mass(values_.data(), n_, highest_, mass);
        total = std::accumulate(std::begin(mass), std::end(mass), 0.0);
        int bin = 0;
        while (bin < sampling_bins - 1 && before + mass[bin] < share * total) before += mass[bin++];
        return bin;
    }

    int64_t race(const PhiloxRow& random, float lowest, int64_t likeliest) {
        uint32_t words[4];
        philox_block(random, static_cast<uint32_t>(likeliest / 4), words);
        Winner best{likeliest, highest_ + gumbel_noise(words[likeliest % 4])};
        if (!has_candidates_) return kernels().sampling.race(values_.data(), n_, lowest, highest_, random, best).token;
        for (int64_t i = 0; i < n_candidates_; ++i) {
            const int64_t token = places_[i];
            if (values_[token] < lowest) continue;
            philox_block(random, static_cast<uint32_t>(token / 4), words);
            const double score = values_[token] + gumbel_noise(words[token % 4]);
            if (score > best.score || (score == best.score && token < best.token)) best = {token, score};
        }
        return best.token;
    }

    int64_t n_ = 0, n_candidates_ = 0;
    float highest_ = 0.0f;
    bool has_candidates_ = false;
    std::vector<float> values_, sorted_;
    std::vector<int32_t> places_;
};

}  // namespace

void philox_block(const PhiloxRow& row, uint32_t block, uint32_t words[4]) {
    uint32_t a = block, b = row.position, c = row.sequence, d = 0, key0 = row.key[0], key1 = row.key[1];
    for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
        const uint64_t p = uint64_t{a} * 0xD2511F53u, q = uint64_t{c} * 0xCD9E8D57u;
        a = static_cast<uint32_t>(q >> 32) ^ b ^ key0;
        b = static_cast<uint32_t>(q);
        c = static_cast<uint32_t>(p >> 32) ^ d ^ key1;
        d = static_cast<uint32_t>(p);
    }
    words[0] = a, words[1] = b, words[2] = c, words[3] = d;
}

double gumbel_noise(uint32_t word) { return -std::log(-std::log1p(-(word + 0.5) * 0x1p-32)); }

void run_sampling(const llmctl_sample_args& args, int64_t* tokens) {
    if (args.n_rows < 0 || args.n_tokens < 0 || args.n_tokens > INT32_MAX) {
        throw std::invalid_argument("a vocabulary of no such size can be");
    }
    if (args.n_tokens == 0 && args.n_rows > 0) throw std::invalid_argument("the vocabulary is empty");
    if (args.n_top < 0 || args.n_top > args.n_tokens) throw std::invalid_argument("no such number of tokens is there");
    parallel_for(args.n_rows, [&](int64_t r) {
        thread_local RowSampler sampler;
        tokens[r] = sampler.draw(args, r);
    });
}

}  // namespace llmctl

int llmctl_sample(const llmctl_sample_args* args, int64_t* tokens) {
    return llmctl::guarded([&] { llmctl::run_sampling(*args, tokens); });
}
