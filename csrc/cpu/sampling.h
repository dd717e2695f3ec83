// Drawing a token from a row of scores: what is computed over the whole vocabulary, once for each instruction set.
#pragma once

#include <cstdint>

namespace llmctl {

// The random numbers of one row at one position, see llmctl_sample.
struct PhiloxRow {
    uint32_t key[2];
    uint32_t position, sequence;
};

// Four random words for counter (block, position, sequence, 0): Philox4x32-10 (Salmon et al., SC'11).
void philox_block(const PhiloxRow& row, uint32_t block, uint32_t words[4]);

// A uniform number in (0, 1) from a word, and what it makes of a logit: the token with the largest sum of both wins.
double gumbel_noise(uint32_t word);

struct Winner {
    int64_t token;
    double score;
};

struct SamplingKernels {
    // scaled = scores / temperature; the largest, or NaN where one of them is.
    float (*scale)(const float* scores, int64_t n, float temperature, float* scaled);
    // The sum of exp(value - highest).
    float (*exp_sum)(const float* values, int64_t n, float highest);
    // Where values are at least `lowest`: their places, and how many.
    int64_t (*collect)(const float* values, int64_t n, float lowest, int32_t* places);
    // to[b] += exp(value - highest) for values in bin b of their distance below `highest`, see sampling_bin.
    void (*mass)(const float* values, int64_t n, float highest, double* to);
    // The best of values + noise among those that are at least `lowest`, or `best` where none is better.
    Winner (*race)(const float* values, int64_t n, float lowest, float highest, const PhiloxRow& row, Winner best);
};

// Bins of distance below the highest score, the last for all beyond (whose share of a vocabulary is below 1e-7).
constexpr int sampling_bins = 514;
constexpr float sampling_bins_per_unit = 16.0f;

}  // namespace llmctl
