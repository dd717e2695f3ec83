// What the kernels of attention with cached keys share: which queries and keys a block has to do with, and how a score is made.
#pragma once

#include <cmath>

#include "cuda/device.h"

namespace llmctl {
namespace cuda {

constexpr int rows = 16;  // queries x heads of one kv head that meet its keys together: the height of a matrix fragment
constexpr int keys = 16;  // that a warp takes at once

struct Plan {
    llmctl_attention_args a;
    int64_t group, n_rows, n_tiles, n_pieces, piece_keys;
    float* parts;
};

struct Range {
    int64_t begin, end;
};

__device__ inline Range visible(const llmctl_attention_args& a, int64_t sequence, int64_t query) {
    int64_t begin = a.first ? a.first[sequence * a.first_strides[0] + query * a.first_strides[1]] : 0;
    int64_t end = a.end ? a.end[sequence * a.end_strides[0] + query * a.end_strides[1]] : a.keys;
    if (a.causal_offset >= 0 && a.causal_offset + query + 1 < end) end = a.causal_offset + query + 1;
    return {begin > 0 ? begin : 0, end < a.keys ? end : a.keys};
}

// A row of a tile: which query and head it is, and what it sees.
struct Query {
    int64_t t, head;
    Range seen;
    bool exists;
};

__device__ inline Query query_of(const Plan& plan, int64_t sequence, int64_t kv_head, int64_t row) {
    if (row >= plan.n_rows) return {0, 0, {0, 0}, false};
    const int64_t t = row / plan.group;
    return {t, kv_head * plan.group + row % plan.group, visible(plan.a, sequence, t), true};
}

__device__ inline float scored(const llmctl_attention_args& a, float product, const Query& query, int64_t sequence, int64_t key) {
    if (key < query.seen.begin || key >= query.seen.end) return -INFINITY;
    float score = product * a.scale;
    if (a.softcap > 0.0f) score = a.softcap * tanhf(score / a.softcap);
    if (a.bias) {
        score += a.bias[sequence * a.bias_strides[0] + query.head * a.bias_strides[1] + query.t * a.bias_strides[2] +
                        key * a.bias_strides[3]];
    }
    return score;
}

__device__ inline float weight_of(float score, float highest) { return score == -INFINITY ? 0.0f : expf(score - highest); }

// Where the sums of a row of a piece lie: its highest score, the softmax's denominator, then head_dim weighted values.
__device__ inline float* part_of(const Plan& plan, int64_t tile, int64_t piece, int row) {
    return plan.parts + ((tile * plan.n_pieces + piece) * rows + row) * (plan.a.head_dim + 2);
}

// The tile (of a sequence and kv head) and the keys that a block has to do with.
struct Work {
    int64_t tile, sequence, kv_head, first_row;
    Range range;
};

__device__ inline Work work_of(const Plan& plan) {
    const int64_t head = blockIdx.y / plan.n_tiles;
    Work work = {blockIdx.y, head / plan.a.kv_heads, head % plan.a.kv_heads, blockIdx.y % plan.n_tiles * rows, {plan.a.keys, 0}};
    for (int64_t row = work.first_row; row < work.first_row + rows && row < plan.n_rows; row += 1) {
        const Range seen = visible(plan.a, work.sequence, row / plan.group);
        if (seen.begin < work.range.begin) work.range.begin = seen.begin;
        if (seen.end > work.range.end) work.range.end = seen.end;
    }
    const int64_t begin = blockIdx.x * plan.piece_keys, end = begin + plan.piece_keys;
    if (work.range.begin < begin) work.range.begin = begin;
    if (work.range.end > end) work.range.end = end;
    return work;
}

}  // namespace cuda
}  // namespace llmctl
