// Causal attention of training, forward and backward, on the tile registers in bfloat16. Included by files that are compiled for
// AMX alone.
//
// Scores are made with keys as the rows of a tile and queries in the lanes of a vector, so no sum goes across lanes; the
// results are turned about at the end. What a tile takes as its second factor is packed in pairs: pairs of dims where dims
// are summed, pairs of keys or of queries where these are. FlashAttention-2, arXiv:2307.08691: nothing is kept of the
// forward pass but the logarithm of each softmax's sum.
#pragma once

#include "cpu/attention.h"
#include "cpu/piece_scratch.h"
#include "cpu/simd/amx.h"
#include "cpu/simd/avx512_bf16.h"
#include "cpu/simd/exp.h"
#include "cpu/simd/transpose.h"

namespace llmctl {
namespace {

namespace training {

constexpr int64_t lanes = 16, group = 32, block = 64;  // queries of a vector; rows of two tiles; keys, or queries, at a time
constexpr int64_t pairs_size = 512, sums_size = 256;   // elements of a tile of bfloat16 and of one of floats

LLMCTL_INLINE int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Two tiles of a product's factor: where they lie, in elements, step by step of the summed dimension.
struct Factor {
    const Bf16* at;
    int64_t second, step;
    int64_t row_bytes = 64;
};

// The four products of two tiles and two; `More` adds them to what is there.
template <bool More>
LLMCTL_INLINE void multiply(const Factor& a, const Factor& b, int64_t n_steps, float* to, int64_t second_a,
                            int64_t second_b) {
    if constexpr (More) {
        tile_load<0>(to, 64);
        tile_load<1>(to + second_b, 64);
        tile_load<2>(to + second_a, 64);
        tile_load<3>(to + second_a + second_b, 64);
    } else {
        tile_zero<0>();
        tile_zero<1>();
        tile_zero<2>();
        tile_zero<3>();
    }
    for (int64_t step = 0; step < n_steps; ++step) {
        const Bf16 *of_a = a.at + step * a.step, *of_b = b.at + step * b.step;
        tile_load<4>(of_a, a.row_bytes);
        tile_load<6>(of_b, b.row_bytes);
        tile_dot_bf16<0, 4, 6>();
        tile_load<7>(of_b + b.second, b.row_bytes);
        tile_dot_bf16<1, 4, 7>();
        tile_load<5>(of_a + a.second, a.row_bytes);
        tile_dot_bf16<2, 5, 6>();
        tile_dot_bf16<3, 5, 7>();
    }
    tile_store<0>(to, 64);
    tile_store<1>(to + second_b, 64);
    tile_store<2>(to + second_a, 64);
    tile_store<3>(to + second_a + second_b, 64);
}

// Rows [n, dims] followed by rows of 0 up to n_padded: where they lie, or in `memory`.
LLMCTL_INLINE const Bf16* padded(const Bf16* rows, int64_t n, int64_t n_padded, int64_t dims, Bf16* memory) {
    if (n == n_padded) return rows;
    __builtin_memcpy(static_cast<void*>(memory), rows, n * dims * 2);
    __builtin_memset(static_cast<void*>(memory + n * dims), 0, (n_padded - n) * dims * 2);
    return memory;
}

// [n / 16][dims / 32] tiles of 16 pairs of dims and 16 rows.
LLMCTL_INLINE void pack_pairs_of_dims(const Bf16* rows, int64_t n, int64_t dims, Bf16* to) {
    for (int64_t row = 0; row < n; row += lanes) {
        for (int64_t d = 0; d < dims; d += group, to += pairs_size) {
            __m512i pairs[16];
#pragma GCC unroll 16
            for (int64_t i = 0; i < 16; ++i) pairs[i] = _mm512_loadu_si512(rows + (row + i) * dims + d);
            transpose(pairs);
#pragma GCC unroll 16
            for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + i * group, pairs[i]);
        }
    }
}

LLMCTL_INLINE __m512i words(const Bf16* from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// [n / 32][dims / 16] tiles of 16 pairs of rows and 16 dims; `Turned`, of 16 dims and 32 rows.
template <bool Turned>
LLMCTL_INLINE void pack_pairs_of_rows(const Bf16* rows, int64_t n, int64_t dims, Bf16* to) {
    for (int64_t row = 0; row < n; row += group) {
        for (int64_t d = 0; d < dims; d += lanes, to += pairs_size) {
            __m512i pairs[16];
#pragma GCC unroll 16
            for (int64_t i = 0; i < 16; ++i) {
                const Bf16* low = rows + (row + 2 * i) * dims + d;
                pairs[i] = _mm512_or_si512(words(low), _mm512_slli_epi32(words(low + dims), 16));
            }
            if constexpr (Turned) transpose(pairs);
#pragma GCC unroll 16
            for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + i * group, pairs[i]);
        }
    }
}

// low and high as bfloat16, lane by lane side by side.
LLMCTL_INLINE __m512i paired(__m512 low, __m512 high) {
    const auto both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    alignas(64) static constexpr int16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(order), both);
}

// The keys that 16 queries see: from `first` to themselves.
struct Seen {
    __m512i first, query;

    LLMCTL_INLINE Seen(const int32_t* firsts, int64_t query)
        : first(_mm512_loadu_si512(firsts)),
          query(_mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(query)),
                                 _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15))) {}

    LLMCTL_INLINE __mmask16 operator()(int64_t key) const {
        const __m512i at = _mm512_set1_epi32(static_cast<int32_t>(key));
        return _mm512_cmple_epi32_mask(first, at) & _mm512_cmple_epi32_mask(at, query);
    }
};

// What a head's passes have in common: its rows, and the first key of each query.
class Head {
public:
    Head(const TrainingAttention& args, int64_t sequence, int64_t head)
        : a(args), dims(args.head_dim), n(args.tokens), n_padded(rounded_up(n, block)) {
        const int64_t kv_head = sequence * a.kv_heads + head / (a.heads / a.kv_heads);
        row = (sequence * a.heads + head) * n;
        q = static_cast<const Bf16*>(a.q) + row * dims;
        k = static_cast<const Bf16*>(a.k) + kv_head * n * dims;
        v = static_cast<const Bf16*>(a.v) + kv_head * n * dims;
        first_keys = a.first_keys ? a.first_keys + sequence * n : nullptr;
    }

    void copy_firsts(int32_t* to) const {
        for (int64_t i = 0; i < n_padded; ++i) to[i] = first_keys && i < n ? static_cast<int32_t>(first_keys[i]) : 0;
    }

    const TrainingAttention& a;
    int64_t dims, n, n_padded, row;
    const Bf16 *q, *k, *v;
    const int64_t* first_keys;
};

struct Span {
    int32_t least, most;
};

LLMCTL_INLINE Span span_of(const int32_t* firsts, int64_t n) {
    Span span{firsts[0], firsts[0]};
    for (int64_t i = 1; i < n; ++i) {
        span.least = firsts[i] < span.least ? firsts[i] : span.least;
        span.most = firsts[i] > span.most ? firsts[i] : span.most;
    }
    return span;
}

// 32 queries at a time with all their keys, 64 at a time.
class Forward : Head {
public:
    Forward(const TrainingAttention& args, int64_t sequence, int64_t head) : Head(args, sequence, head) {
        const int64_t rows = n_padded * dims * 2, scores = 2 * block * lanes * 4, weights = 2 * block * lanes * 2;
        char* at = piece_scratch(3 * rows + group * dims * 4 + scores + weights + 2 * group * dims * 4 + n_padded * 4);
        const auto take = [&](int64_t bytes) {
            char* taken = at;
            at += bytes;
            return taken;
        };
        auto* of_keys = reinterpret_cast<Bf16*>(take(rows));
        auto* of_values = reinterpret_cast<Bf16*>(take(rows));
        values_ = reinterpret_cast<Bf16*>(take(rows));
        padded_queries_ = reinterpret_cast<Bf16*>(take(group * dims * 2));
        queries_ = reinterpret_cast<Bf16*>(take(group * dims * 2));
        scores_ = reinterpret_cast<float*>(take(scores));
        weights_ = reinterpret_cast<Bf16*>(take(weights));
        sums_ = reinterpret_cast<float*>(take(2 * group * dims * 4));
        firsts_ = reinterpret_cast<int32_t*>(take(n_padded * 4));
        copy_firsts(firsts_);
        keys_ = padded(k, n, n_padded, dims, of_keys);
        pack_pairs_of_rows<true>(padded(v, n, n_padded, dims, of_values), n_padded, dims, values_);
    }

    void run() {
        const Tiles tiles(64);
        for (int64_t query = 0; query < n; query += group) run(query);
    }

private:
    void run(int64_t query) {
        const int64_t left = n - query < group ? n - query : group;
        pack_pairs_of_dims(padded(q + query * dims, left, group, dims, padded_queries_), group, dims, queries_);
        for (int i = 0; i < 2; ++i) {
            most_[i] = _mm512_set1_ps(-__builtin_inff());
            total_[i] = _mm512_setzero_ps();
        }
        __builtin_memset(static_cast<void*>(sums_), 0, group * dims * 4);
        const Span firsts = span_of(firsts_ + query, left);
        for (int64_t key = firsts.least / block * block; key < query + left; key += block) {
            score(key);
            const bool is_whole = key + block <= query + 1 && key >= firsts.most;
            for (int half = 0; half < 2; ++half) {
                is_whole ? weigh<false>(key, query, half) : weigh<true>(key, query, half);
            }
            for (int64_t d = 0; d < dims; d += 2 * lanes) {
                const Bf16* values = values_ + (key / group * (dims / lanes) + d / lanes) * pairs_size;
                multiply<true>({values, pairs_size, dims / lanes * pairs_size}, {weights_, block * lanes, pairs_size}, 2,
                               sums_ + d / lanes * 2 * sums_size, 2 * sums_size, sums_size);
            }
        }
        for (int half = 0; half < 2; ++half) write(query + half * lanes, half);
    }

    // [2 tiles of queries][64 keys][16 queries]
    void score(int64_t key) {
        for (int64_t i = 0; i < block; i += group) {
            multiply<false>({keys_ + (key + i) * dims, lanes * dims, group, dims * 2},
                            {queries_, dims / group * pairs_size, pairs_size}, dims / group, scores_ + i * lanes,
                            sums_size, block * lanes);
        }
    }

    // The scores of 64 keys become weights relative to the highest score so far, in pairs of keys.
    template <bool Masked>
    void weigh(int64_t key, int64_t query, int half) {
        const float* scores = scores_ + half * block * lanes;
        const Seen seen(firsts_ + query + half * lanes, query + half * lanes);
        const __m512 nothing = _mm512_set1_ps(-__builtin_inff()), scale = _mm512_set1_ps(a.scale);
        const auto score_at = [&](int64_t i) LLMCTL_INLINED {
            const __m512 x = _mm512_load_ps(scores + i * lanes);
            return Masked ? _mm512_mask_mov_ps(nothing, seen(key + i), x) : x;
        };
        __m512 most[4] = {nothing, nothing, nothing, nothing};
        for (int64_t i = 0; i < block; i += 4) {
#pragma GCC unroll 4
            for (int64_t j = 0; j < 4; ++j) most[j] = _mm512_max_ps(score_at(i + j), most[j]);
        }
        const __m512 here = _mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3]));
        const __m512 highest = _mm512_max_ps(_mm512_mul_ps(here, scale), most_[half]);
        const __mmask16 is_empty = _mm512_cmp_ps_mask(highest, nothing, _CMP_EQ_OQ);
        const __m512 reference = _mm512_mask_mov_ps(highest, is_empty, _mm512_setzero_ps());
        rescale(half, exp<Avx512Bf16>(_mm512_sub_ps(most_[half], reference)));
        most_[half] = highest;
        __m512 totals[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        Bf16* to = weights_ + half * block * lanes;
#pragma GCC unroll 2
        for (int64_t i = 0; i < block; i += 2, to += group) {
            __m512 p[2];
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j) {
                p[j] = exp<Avx512Bf16>(_mm512_fmsub_ps(score_at(i + j), scale, reference));
                totals[j] = _mm512_add_ps(totals[j], p[j]);
            }
            _mm512_store_si512(to, paired(p[0], p[1]));
        }
        total_[half] = _mm512_add_ps(total_[half], _mm512_add_ps(totals[0], totals[1]));
    }

    void rescale(int half, __m512 factor) {
        if (_mm512_cmp_ps_mask(factor, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ) == 0) return;
        total_[half] = _mm512_mul_ps(total_[half], factor);
        for (int64_t d = 0; d < dims; ++d) {
            float* at = sums_ + (d / lanes * 2 + half) * sums_size + d % lanes * lanes;
            _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), factor));
        }
    }

    void write(int64_t query, int half) const {
        const int64_t left = n - query < lanes ? n - query : lanes;
        const __m512 share = _mm512_div_ps(_mm512_set1_ps(1.0f), total_[half]);
        for (int64_t d = 0; d < dims && left > 0; d += lanes) {
            __m512i x[16];
            const float* from = sums_ + (d / lanes * 2 + half) * sums_size;
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) {
                x[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(from + i * lanes), share));
            }
            transpose(x);
            Bf16* to = static_cast<Bf16*>(a.out) + (row + query) * dims + d;
#pragma GCC unroll 16
            for (int64_t i = 0; i < 16; ++i) {
                if (i < left) Avx512Bf16::store(to + i * dims, _mm512_castsi512_ps(x[i]));
            }
        }
        alignas(64) float most[lanes], total[lanes];
        _mm512_store_ps(most, most_[half]);
        _mm512_store_ps(total, total_[half]);
        for (int64_t i = 0; i < left; ++i) a.log_sums[row + query + i] = most[i] + __builtin_logf(total[i]);
    }

    const Bf16* keys_;
    Bf16 *values_, *padded_queries_, *queries_, *weights_;
    float *scores_, *sums_;
    int32_t* firsts_;
    __m512 most_[2], total_[2];
};

// 64 keys at a time with all their queries, 64 at a time. The gradients of keys and values are those of this head alone.
class Backward : Head {
public:
    Backward(const TrainingAttention& args, int64_t sequence, int64_t head)
        : Head(args, sequence, head), kv_row((sequence * a.heads + head) * n) {
        const int64_t rows = n_padded * dims * 2, square = block * block;
        char* at = piece_scratch(9 * rows + 2 * rows + 2 * square * 4 + 3 * square * 2 + 2 * block * dims * 4 + n_padded * 12);
        const auto take = [&](int64_t bytes) {
            char* taken = at;
            at += bytes;
            return taken;
        };
        const auto take_rows = [&] { return reinterpret_cast<Bf16*>(take(rows)); };
        Bf16 *of_keys = take_rows(), *of_values = take_rows(), *of_queries = take_rows(), *of_grads = take_rows();
        queries_by_dims_ = take_rows(), queries_by_rows_ = take_rows();
        grads_by_dims_ = take_rows(), grads_by_rows_ = take_rows();
        keys_turned_ = take_rows();
        grad_q_ = reinterpret_cast<float*>(take(2 * rows));
        scores_ = reinterpret_cast<float*>(take(square * 4));
        slopes_ = reinterpret_cast<float*>(take(square * 4));
        weights_ = reinterpret_cast<Bf16*>(take(square * 2));
        changes_ = reinterpret_cast<Bf16*>(take(square * 2));
        changes_by_keys_ = reinterpret_cast<Bf16*>(take(square * 2));
        grad_k_ = reinterpret_cast<float*>(take(block * dims * 4));
        grad_v_ = reinterpret_cast<float*>(take(block * dims * 4));
        log_sums_ = reinterpret_cast<float*>(take(n_padded * 4));
        deltas_ = reinterpret_cast<float*>(take(n_padded * 4));
        firsts_ = reinterpret_cast<int32_t*>(take(n_padded * 4));
        const auto* grad = static_cast<const Bf16*>(a.grad_out) + row * dims;
        keys_ = padded(k, n, n_padded, dims, of_keys);
        values_ = padded(v, n, n_padded, dims, of_values);
        const Bf16 *queries = padded(q, n, n_padded, dims, of_queries), *grads = padded(grad, n, n_padded, dims, of_grads);
        pack_pairs_of_dims(queries, n_padded, dims, queries_by_dims_);
        pack_pairs_of_rows<false>(queries, n_padded, dims, queries_by_rows_);
        pack_pairs_of_dims(grads, n_padded, dims, grads_by_dims_);
        pack_pairs_of_rows<false>(grads, n_padded, dims, grads_by_rows_);
        pack_pairs_of_rows<true>(keys_, n_padded, dims, keys_turned_);
        copy_firsts(firsts_);
        measure(grad);
    }

    void run() {
        const Tiles tiles(64);
        __builtin_memset(static_cast<void*>(grad_q_), 0, n_padded * dims * 4);
        for (int64_t key = 0; key < n; key += block) {
            __builtin_memset(static_cast<void*>(grad_k_), 0, block * dims * 4);
            __builtin_memset(static_cast<void*>(grad_v_), 0, block * dims * 4);
            for (int64_t query = key; query < n; query += block) run(key, query);
            write_keys(key);
        }
        for (int64_t query = 0; query < n; query += lanes) write_queries(query);
    }

private:
    // The sum of each row of weights times their slopes, which is that of the row's output times its gradient.
    void measure(const Bf16* grad) {
        const auto* out = static_cast<const Bf16*>(a.out) + row * dims;
        for (int64_t i = 0; i < n_padded; ++i) {
            log_sums_[i] = i < n ? a.log_sums[row + i] : __builtin_inff();
            __m512 sum = _mm512_setzero_ps();
            for (int64_t d = 0; d < dims && i < n; d += lanes) {
                sum = _mm512_fmadd_ps(Avx512::load(grad + i * dims + d), Avx512::load(out + i * dims + d), sum);
            }
            deltas_[i] = _mm512_reduce_add_ps(sum);
        }
    }

    void run(int64_t key, int64_t query) {
        const Span firsts = span_of(firsts_ + query, n - query < block ? n - query : block);
        if (firsts.least >= key + block) return;
        const bool is_whole = query > key && firsts.most <= key;
        product(keys_, queries_by_dims_, key, query, scores_);
        product(values_, grads_by_dims_, key, query, slopes_);
        for (int64_t i = 0; i < block; i += lanes) {
            is_whole ? differentiate<false>(key, query, i) : differentiate<true>(key, query, i);
        }
        for (int64_t i = 0; i < block; i += group) {
            for (int64_t d = 0; d < dims; d += 2 * lanes) {
                const int64_t at = (i / lanes * (dims / lanes) + d / lanes) * sums_size;
                const int64_t packed = (query / group * (dims / lanes) + d / lanes) * pairs_size;
                const int64_t next_row = dims / lanes * sums_size, step = dims / lanes * pairs_size;
                const int64_t of_keys = i / lanes * 2 * pairs_size;
                multiply<true>({weights_ + of_keys, 2 * pairs_size, pairs_size},
                               {grads_by_rows_ + packed, pairs_size, step}, 2, grad_v_ + at, next_row, sums_size);
                multiply<true>({changes_ + of_keys, 2 * pairs_size, pairs_size},
                               {queries_by_rows_ + packed, pairs_size, step}, 2, grad_k_ + at, next_row, sums_size);
            }
        }
        for (int64_t i = 0; i < block; i += group) {
            for (int64_t d = 0; d < dims; d += 2 * lanes) {
                const Bf16* keys = keys_turned_ + (key / group * (dims / lanes) + d / lanes) * pairs_size;
                float* to = grad_q_ + ((query + i) / lanes * (dims / lanes) + d / lanes) * sums_size;
                multiply<true>({keys, pairs_size, dims / lanes * pairs_size},
                               {changes_by_keys_ + i / lanes * 2 * pairs_size, 2 * pairs_size, pairs_size}, 2, to, sums_size,
                               dims / lanes * sums_size);
            }
        }
    }

    // [4 tiles of queries][64 keys][16 queries]: rows of keys or values times packed queries or gradients.
    void product(const Bf16* rows, const Bf16* packed, int64_t key, int64_t query, float* to) const {
        const int64_t next = dims / group * pairs_size;
        for (int64_t j = 0; j < block; j += group) {
            for (int64_t i = 0; i < block; i += group) {
                multiply<false>({rows + (key + i) * dims, lanes * dims, group, dims * 2},
                                {packed + (query + j) / lanes * next, next, pairs_size}, dims / group,
                                to + (j / lanes * block + i) * lanes, sums_size, block * lanes);
            }
        }
    }

    // Scores of 16 queries, from the `i`th on, become weights, and slopes what a change of the score changes: by rows of keys
    // [4 tiles of keys][2 groups of queries][16 keys][32 queries], and the latter in pairs of keys as well.
    template <bool Masked>
    void differentiate(int64_t key, int64_t query, int64_t i) {
        const float *scores = scores_ + i * block, *slopes = slopes_ + i * block;
        const Seen seen(firsts_ + query + i, query + i);
        const __m512 scale = _mm512_set1_ps(a.scale), log_sum = _mm512_loadu_ps(log_sums_ + query + i);
        const __m512 delta = _mm512_loadu_ps(deltas_ + query + i), zero = _mm512_setzero_ps();
        for (int64_t at = 0; at < block; at += 2) {
            __m512 change[2];
#pragma GCC unroll 2
            for (int64_t j = 0; j < 2; ++j) {
                const __m512 x = _mm512_fmsub_ps(_mm512_load_ps(scores + (at + j) * lanes), scale, log_sum);
                // rounding can leave it a little above 0
                __m512 p = exp<Avx512Bf16>(Avx512::min(zero, x));
                if (Masked) p = _mm512_maskz_mov_ps(seen(key + at + j), p);
                const __m512 slope = _mm512_sub_ps(_mm512_load_ps(slopes + (at + j) * lanes), delta);
                change[j] = _mm512_mul_ps(_mm512_mul_ps(p, scale), slope);
                const int64_t tile = ((at + j) / lanes * 2 + i / group) * pairs_size;
                const int64_t place = tile + (at + j) % lanes * group + i % group;
                Avx512Bf16::store(weights_ + place, p);
                Avx512Bf16::store(changes_ + place, change[j]);
            }
            Bf16* to = changes_by_keys_ + (i / lanes * 2 + at / group) * pairs_size + at % group / 2 * group;
            _mm512_store_si512(to, paired(change[0], change[1]));
        }
    }

    void write_keys(int64_t key) const {
        const int64_t left = n - key < block ? n - key : block;
        for (int64_t i = 0; i < left; ++i) {
            for (int64_t d = 0; d < dims; d += lanes) {
                const int64_t at = (i / lanes * (dims / lanes) + d / lanes) * sums_size + i % lanes * lanes;
                const int64_t to = (kv_row + key + i) * dims + d;
                put(a.grad_k, to, _mm512_load_ps(grad_k_ + at));
                put(a.grad_v, to, _mm512_load_ps(grad_v_ + at));
            }
        }
    }

    // Heads that share keys are added up afterwards, in floats.
    LLMCTL_INLINE void put(void* to, int64_t at, __m512 x) const {
        if (a.heads == a.kv_heads) {
            Avx512Bf16::store(static_cast<Bf16*>(to) + at, x);
        } else {
            _mm512_storeu_ps(static_cast<float*>(to) + at, x);
        }
    }

    void write_queries(int64_t query) const {
        for (int64_t d = 0; d < dims; d += lanes) {
            __m512i x[16];
            const float* from = grad_q_ + (query / lanes * (dims / lanes) + d / lanes) * sums_size;
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) x[i] = _mm512_load_si512(from + i * lanes);
            transpose(x);
            Bf16* to = static_cast<Bf16*>(a.grad_q) + (row + query) * dims + d;
#pragma GCC unroll 16
            for (int64_t i = 0; i < 16; ++i) {
                if (query + i < n) Avx512Bf16::store(to + i * dims, _mm512_castsi512_ps(x[i]));
            }
        }
    }

    int64_t kv_row;
    const Bf16 *keys_, *values_;
    Bf16 *queries_by_dims_, *queries_by_rows_, *grads_by_dims_, *grads_by_rows_, *keys_turned_;
    float *grad_q_, *scores_, *slopes_, *grad_k_, *grad_v_, *log_sums_, *deltas_;
    Bf16 *weights_, *changes_, *changes_by_keys_;
    int32_t* firsts_;
};

inline void forward(const TrainingAttention& args, int64_t sequence, int64_t head) {
    Forward(args, sequence, head).run();
}

inline void backward(const TrainingAttention& args, int64_t sequence, int64_t head) {
    Backward(args, sequence, head).run();
}

}  // namespace training
}  // namespace
}  // namespace llmctl
