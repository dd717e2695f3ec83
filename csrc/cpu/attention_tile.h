// Attention of a few rows to a section of keys, with the softmax taken as it goes (online softmax, arXiv:1805.02867).
//
// A row's numbers come from its own query, its own range of keys and the place of the sections, which begin at the
// sequence's origin. So neither the other rows, nor padding, nor the number of queries in a call can change a bit.
#pragma once

#include "cpu/attention.h"
#include "cpu/linear_tile.h"
#include "cpu/piece_scratch.h"
#include "cpu/simd/exp.h"

namespace llmctl {
namespace {

constexpr int64_t keys_ahead = 32;  // are fetched into the cache

LLMCTL_INLINE int64_t clamped(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

LLMCTL_INLINE int64_t group_size(const AttentionArgs& a) { return a.heads / a.kv_heads; }

// The keys of a section: number i is start + i of the sequence's.
struct SectionKeys {
    SectionKeys(const AttentionArgs& a, const AttentionTile& tile, int64_t section) : args(a) {
        start = (a.origins ? a.origins[tile.sequence] : 0) + section * attention_section;
        const int64_t group = group_size(a);
        int64_t query = tile.first_row / group, next = (query + 1) * group - tile.first_row;  // the next query's first row
        for (int64_t r = 0; r < tile.n_rows; ++r) {
            if (r == next) {
                ++query;
                next += group;
            } else if (r > 0) {
                ranges[r] = ranges[r - 1];
                continue;
            }
            const KeyRange keys = visible_keys(a, tile.sequence, query);
            ranges[r] = {clamped(keys.begin - start, 0, attention_section),
                         clamped(keys.end - start, 0, attention_section)};
            if (ranges[r].begin >= ranges[r].end) continue;
            first = ranges[r].begin < first ? ranges[r].begin : first;
            last = ranges[r].end > last ? ranges[r].end : last;
        }
        const int64_t size = a.kv_dtype == LLMCTL_F32 ? 4 : a.kv_dtype == LLMCTL_BF16 ? 2 : 1;
        k = static_cast<const char*>(a.k) +
            (tile.sequence * a.k_strides[0] + tile.kv_head * a.k_strides[1] + start * a.k_strides[2]) * size;
        v = static_cast<const char*>(a.v) +
            (tile.sequence * a.v_strides[0] + tile.kv_head * a.v_strides[1] + start * a.v_strides[2]) * size;
        k_stride = a.k_strides[2] * size;
        v_stride = a.v_strides[2] * size;
        const int64_t scale = tile.sequence * a.scale_strides[0] + tile.kv_head * a.scale_strides[1] + start;
        if (a.k_scales) k_scales = a.k_scales + scale;
        if (a.v_scales) v_scales = a.v_scales + scale;
    }

    const void* key(int64_t i) const { return k + i * k_stride; }
    const void* value(int64_t i) const { return v + i * v_stride; }

    const AttentionArgs& args;
    int64_t start, first = attention_section, last = 0;  // some row sees one of [first, last)
    KeyRange ranges[attention_max_rows];                 // of each row
    const float *k_scales = nullptr, *v_scales = nullptr;

private:
    const char *k, *v;
    int64_t k_stride, v_stride;
};

// One head's elements of one key or value as those of the queries.
template <class S, class Element>
LLMCTL_INLINE void widen_row(const void* from, int32_t dtype, Element* to, int64_t n) {
    if (dtype != LLMCTL_I8) {
        const Bf16* x = static_cast<const Bf16*>(from);
        for (int64_t i = 0; i < n; ++i) store(to[i], load(x[i]));
        return;
    }
    const uint8_t* codes = static_cast<const uint8_t*>(from);
    int64_t i = 0;
    for (; i + S::lanes <= n; i += S::lanes) S::store(to + i, S::sub(S::load_bytes(codes + i), S::all(kv_zero)));
    for (; i < n; ++i) store(to[i], static_cast<float>(codes[i] - kv_zero));
}

// Scores of a row over [range.begin, range.end) become exp(score - highest), and 0 in the rest of [first, last).
template <class S>
class RowSoftmax {
public:
    RowSoftmax(const SectionKeys& keys, const float* bias, int64_t bias_stride, float* scores, KeyRange range)
        : a_(keys.args), keys_(keys), bias_(bias), bias_stride_(bias_stride), scores_(scores), range_(range) {}

    void run(int64_t first, int64_t last, float& highest, float& total) {
        const int64_t begin = range_.begin / S::lanes * S::lanes;
        const int64_t end = (range_.end + S::lanes - 1) / S::lanes * S::lanes;
        for (int64_t i = first; i < begin; ++i) scores_[i] = 0.0f;
        for (int64_t i = end; i < last; ++i) scores_[i] = 0.0f;
        typename S::Vec most = S::all(-__builtin_inff());
        for (int64_t i = begin; i < end; i += S::lanes) {
            const typename S::Vec x = finished_scores(i);
            S::store(scores_ + i, x);
            most = S::max(x, most);
        }
        highest = S::highest(most);
        const auto reference = S::all(highest == -__builtin_inff() ? 0.0f : highest);
        typename S::Vec sums[4] = {S::zero(), S::zero(), S::zero(), S::zero()};
        for (int64_t i = begin; i < end; i += S::lanes) {
            const typename S::Vec p = exp<S>(S::sub(S::load(scores_ + i), reference));
            S::store(scores_ + i, p);
            sums[0] = S::add(sums[0], p);
        }
        float totals[4];
        S::sums(sums, totals);
        total = totals[0];
    }

private:
    typename S::Vec finished_scores(int64_t i) {
        typename S::Vec x = S::mul(S::load(scores_ + i), S::all(a_.scale));
        if (keys_.k_scales) {
            float scales[S::lanes];
            for (int lane = 0; lane < S::lanes; ++lane) {
                const bool is_there = i + lane >= keys_.first && i + lane < keys_.last;
                scales[lane] = is_there ? keys_.k_scales[i + lane] : 0.0f;
            }
            x = S::mul(x, S::load(scales));
        }
        if (a_.softcap != 0.0f) {
            x = S::mul(tanh<S>(S::div(x, S::all(a_.softcap))), S::all(a_.softcap));
        }
        const bool is_inside = range_.begin <= i && i + S::lanes <= range_.end;
        if (is_inside && bias_ == nullptr) return x;
        if (is_inside && bias_stride_ == 1) return S::add(x, S::load(bias_ + i));
        float lanes[S::lanes];
        S::store(lanes, x);
        for (int lane = 0; lane < S::lanes; ++lane) {
            const int64_t at = i + lane;
            if (at < range_.begin || at >= range_.end) {
                lanes[lane] = -__builtin_inff();
            } else if (bias_) {
                lanes[lane] += bias_[at * bias_stride_];
            }
        }
        return S::load(lanes);
    }

    const AttentionArgs& a_;
    const SectionKeys& keys_;
    const float* bias_;
    int64_t bias_stride_;
    float* scores_;
    KeyRange range_;
};

// values[r] = sum over keys of weights[r] * v for `Rows` rows and `Vecs` vectors of the head.
template <class S, class Element, int Rows, int Vecs>
LLMCTL_INLINE void weigh_values(const Element* v, int64_t v_stride, const float* weights, int64_t n_keys, int n_tail,
                                float* values) {
    typename S::Vec acc[Rows][Vecs];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
        for (int i = 0; i < Vecs; ++i) acc[r][i] = S::zero();
    }
    for (int64_t key = 0; key < n_keys; ++key, v += v_stride) {
        typename S::Vec vs[Vecs];
#pragma GCC unroll 8
        for (int i = 0; i < Vecs; ++i) vs[i] = n_tail ? S::load_some(v, n_tail) : S::load(v + i * S::lanes);
        // two of bfloat16's vectors share a line
        for (int i = 0; i < Vecs; i += sizeof(float) / sizeof(Element))
            S::prefetch(v + keys_ahead * v_stride + i * S::lanes);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
            const typename S::Vec weight = S::all(weights[r * attention_section + key]);
#pragma GCC unroll 8
            for (int i = 0; i < Vecs; ++i) acc[r][i] = S::fma(weight, vs[i], acc[r][i]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
        for (int i = 0; i < Vecs; ++i) {
            float* to = values + r * attention_max_dim + i * S::lanes;
            n_tail ? S::store_some(to, acc[r][i], n_tail) : S::store(to, acc[r][i]);
        }
    }
}

template <class S, class Element, int Rows>
void weigh_all_values(const Element* v, int64_t v_stride, int64_t head_dim, const float* weights, int64_t n_keys,
                      float* values) {
    int64_t at = 0;
    for (; at + 4 * S::lanes <= head_dim; at += 4 * S::lanes) {
        weigh_values<S, Element, Rows, 4>(v + at, v_stride, weights, n_keys, 0, values + at);
    }
    for (; at + S::lanes <= head_dim; at += S::lanes) {
        weigh_values<S, Element, Rows, 1>(v + at, v_stride, weights, n_keys, 0, values + at);
    }
    if (const int left = static_cast<int>(head_dim - at)) {
        weigh_values<S, Element, Rows, 1>(v + at, v_stride, weights, n_keys, left, values + at);
    }
}

template <class S, class Element, int Rows>
LLMCTL_INLINE void weigh_values_of(int64_t n_rows, const Element* v, int64_t v_stride, int64_t head_dim,
                                   const float* weights, int64_t n_keys, float* values) {
    if constexpr (Rows > 1) {
        if (n_rows < Rows) {
            return weigh_values_of<S, Element, Rows - 1>(n_rows, v, v_stride, head_dim, weights, n_keys, values);
        }
    }
    weigh_all_values<S, Element, Rows>(v, v_stride, head_dim, weights, n_keys, values);
}

// Calls body(first, n) for stretches of at most `most` rows, as equal as can be.
template <class Body>
LLMCTL_INLINE void for_even_stretches(int64_t n_rows, int64_t most, const Body& body) {
    const int64_t n_stretches = (n_rows + most - 1) / most;
    const int64_t size = (n_rows + n_stretches - 1) / n_stretches;
    for (int64_t r = 0; r < n_rows; r += size) body(r, n_rows - r < size ? n_rows - r : size);
}

// q . k of every row and the keys [first, last) of the section, which lie `stride` elements apart from `k` on.
template <class Dot, int MaxRows>
void section_scores(const AttentionTile& tile, const SectionKeys& keys, const typename Dot::Element* k, int64_t stride,
                    float* scores) {
    using Element = typename Dot::Element;
    const AttentionArgs& a = keys.args;
    Element queries[attention_max_rows * attention_max_dim];
    for (int64_t r = 0; r < tile.n_rows; ++r) {
        const int64_t row = tile.first_row + r, group = group_size(a);
        const Element* q = static_cast<const Element*>(a.q) + tile.sequence * a.q_strides[0] +
                           (tile.kv_head * group + row % group) * a.q_strides[1] + row / group * a.q_strides[2];
        __builtin_memcpy(queries + r * a.head_dim, q, a.head_dim * sizeof(Element));
    }
    const int64_t n = keys.last - keys.first;
    const Linear product{queries, k, nullptr, nullptr, tile.n_rows, a.head_dim, n, a.head_dim, stride, 0};
    for_even_stretches(tile.n_rows, MaxRows, [&](int64_t r, int64_t n_rows) {
        linear_block_of<Dot, MaxRows>(n_rows, product, r, 0, 0, n, r == 0 ? keys_ahead : 0,
                                      scores + r * attention_section + keys.first, attention_section);
    });
}

template <class Dot, int ScoreRows, int ValueRows>
void attention_section_kernel(const AttentionArgs& a, const AttentionTile& tile, int64_t section, AttentionSums& to) {
    using S = typename Dot::Simd;
    using Element = typename Dot::Element;
    const SectionKeys keys(a, tile, section);
    const int64_t first = keys.first, last = keys.last;
    if (first >= last) {
        for (int64_t r = 0; r < tile.n_rows; ++r) to.total[r] = 0.0f;
        return;
    }
    const bool is_own = a.kv_dtype == (sizeof(Element) == 4 ? LLMCTL_F32 : LLMCTL_BF16);
    Element* panel = nullptr;
    if (!is_own) {
        panel = reinterpret_cast<Element*>(piece_scratch(attention_section * attention_max_dim * sizeof(Element)));
        for (int64_t i = first; i < last; ++i) {
            widen_row<S>(keys.key(i), a.kv_dtype, panel + (i - first) * a.head_dim, a.head_dim);
        }
    }
    // four at a time may be written behind the last key
    alignas(64) float scores[attention_max_rows * attention_section + 4];
    const Element* k = is_own ? static_cast<const Element*>(keys.key(first)) : panel;
    section_scores<Dot, ScoreRows>(tile, keys, k, is_own ? a.k_strides[2] : a.head_dim, scores);
    for (int64_t r = 0; r < tile.n_rows; ++r) {
        float* row = scores + r * attention_section;
        to.highest[r] = -__builtin_inff();
        to.total[r] = 0.0f;
        if (keys.ranges[r].begin >= keys.ranges[r].end) {
            for (int64_t i = first; i < last; ++i) row[i] = 0.0f;
            continue;
        }
        const int64_t query = (tile.first_row + r) / group_size(a), in_group = (tile.first_row + r) % group_size(a);
        const int64_t head = tile.kv_head * group_size(a) + in_group;
        const float* bias = a.bias ? a.bias + tile.sequence * a.bias_strides[0] + head * a.bias_strides[1] +
                                         query * a.bias_strides[2] + keys.start * a.bias_strides[3]
                                   : nullptr;
        RowSoftmax<S>(keys, bias, a.bias_strides[3], row, keys.ranges[r]).run(first, last, to.highest[r], to.total[r]);
        for (int64_t i = first; keys.v_scales && i < last; ++i) row[i] *= keys.v_scales[i];
    }
    if (!is_own) {
        for (int64_t i = first; i < last; ++i) {
            widen_row<S>(keys.value(i), a.kv_dtype, panel + (i - first) * a.head_dim, a.head_dim);
        }
    }
    const Element* v = is_own ? static_cast<const Element*>(keys.value(first)) : panel;
    for_even_stretches(tile.n_rows, ValueRows, [&](int64_t r, int64_t n) {
        weigh_values_of<S, Element, ValueRows>(n, v, is_own ? a.v_strides[2] : a.head_dim, a.head_dim,
                                               scores + r * attention_section + first, last - first,
                                               to.values + r * attention_max_dim);
    });
}

template <class S>
void attention_add(const AttentionArgs& a, const AttentionTile& tile, const AttentionSums& section, AttentionSums& to) {
    for (int64_t r = 0; r < tile.n_rows; ++r) {
        if (section.total[r] == 0.0f) continue;  // it saw nothing
        const float highest = section.highest[r] > to.highest[r] ? section.highest[r] : to.highest[r];
        const float old_share = exp_one<S>(to.highest[r] - highest), share = exp_one<S>(section.highest[r] - highest);
        to.highest[r] = highest;
        to.total[r] = to.total[r] * old_share + section.total[r] * share;
        const float* from = section.values + r * attention_max_dim;
        float* values = to.values + r * attention_max_dim;
        for (int64_t i = 0; i < a.head_dim; i += S::lanes) {  // the room behind head_dim is there for this
            const auto grown = S::mul(S::load(values + i), S::all(old_share));
            S::store(values + i, S::fma(S::load(from + i), S::all(share), grown));
        }
    }
}

template <class S, class Element>
void attention_write(const AttentionArgs& a, const AttentionTile& tile, const AttentionSums& sums) {
    for (int64_t r = 0; r < tile.n_rows; ++r) {
        const int64_t row = tile.first_row + r, group = group_size(a);
        Element* out = static_cast<Element*>(a.out) + tile.sequence * a.out_strides[0] +
                       (tile.kv_head * group + row % group) * a.out_strides[1] + row / group * a.out_strides[2];
        const auto share = S::all(sums.total[r] == 0.0f ? 0.0f : 1.0f / sums.total[r]);
        const float* values = sums.values + r * attention_max_dim;
        int64_t i = 0;
        for (; i + S::lanes <= a.head_dim; i += S::lanes) S::store(out + i, S::mul(S::load(values + i), share));
        if (const int left = static_cast<int>(a.head_dim - i)) {
            S::store_some(out + i, S::mul(S::load_some(values + i, left), share), left);
        }
    }
}

template <class Dot, int ScoreRows, int ValueRows>
constexpr AttentionKernels attention_kernels = {
    attention_section_kernel<Dot, ScoreRows, ValueRows>,
    attention_add<typename Dot::Simd>,
    attention_write<typename Dot::Simd, typename Dot::Element>,
};

}  // namespace
}  // namespace llmctl
