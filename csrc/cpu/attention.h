// Attention of queries to cached keys: the piece that a thread does at a time.
#pragma once

#include <cstdint>

#include "llmctl.h"

namespace llmctl {

constexpr int64_t attention_max_rows = 32;  // queries x heads of one kv head that meet its keys together
constexpr int64_t attention_section = 256;  // keys whose softmax is taken at once
constexpr int64_t attention_max_dim = LLMCTL_ATTENTION_MAX_HEAD_DIM;
constexpr int kv_zero = 128;                // the byte that means 0 in a cache of bytes

// Rows of one sequence and one kv head; row r is query r / group of query head r % group within the group.
struct AttentionTile {
    int64_t sequence, kv_head, first_row, n_rows;
};

// For each row of a tile, the softmax over some keys before division: sums of exp(score - highest) and of that times v.
struct AttentionSums {
    float highest[attention_max_rows];
    float total[attention_max_rows];
    alignas(64) float values[attention_max_rows * attention_max_dim];
};

using AttentionArgs = llmctl_attention_args;

// None where begin >= end.
struct KeyRange {
    int64_t begin, end;
};
KeyRange visible_keys(const AttentionArgs& args, int64_t sequence, int64_t query);

struct AttentionKernels {
    // The sums over the keys origin + section * attention_section and following; total 0 for a row that sees none.
    void (*section)(const AttentionArgs&, const AttentionTile&, int64_t section, AttentionSums& to);
    // to = both together. Sections are added in their order, always.
    void (*add)(const AttentionArgs&, const AttentionTile&, const AttentionSums& section, AttentionSums& to);
    // The quotients, to where they belong.
    void (*write)(const AttentionArgs&, const AttentionTile&, const AttentionSums& sums);
};

using TrainingAttention = llmctl_training_attention;

// One query head of one sequence, forward and backward; null where there are no such kernels.
struct TrainingAttentionKernels {
    void (*forward)(const TrainingAttention&, int64_t sequence, int64_t head);
    void (*backward)(const TrainingAttention&, int64_t sequence, int64_t head);
};
constexpr int64_t training_attention_dims = 32;  // a head's size is a multiple

}  // namespace llmctl
