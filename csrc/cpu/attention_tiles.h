// Attention of few rows to a section of keys on the tile registers, in bfloat16. Included by files compiled for AMX alone.
//
// Scores are made with keys as the rows of a tile, as they lie in the cache, and stand key by key with a row in each lane:
// the softmax goes through them without a sum across lanes. Its weights are turned around in pairs of bfloat16 on the way
// into the second product. Where all rows are those of one query, and few, keys that lie 16 apart share a tile: its lanes
// are [block of 16 keys][row].
#pragma once

#include "cpu/attention_tile.h"
#include "cpu/piece_scratch.h"
#include "cpu/simd/amx.h"
#include "cpu/simd/avx512_bf16.h"
#include "cpu/simd/transpose.h"

namespace llmctl {
namespace {

constexpr int64_t lane_rows = 16, pair_keys = 32, block_keys = 16, section_blocks = attention_section / block_keys;
static_assert(attention_max_rows == 2 * lane_rows, "two tiles of rows");

// The quarters, of 128 bits, of two vectors in turn: a0 b0 a1 b1 in the first, a2 b2 a3 b3 in the second.
LLMCTL_INLINE void take_turns(__m512i& a, __m512i& b) {
    const __m512i first = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), b);
    b = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), b);
    a = first;
}

// The 8 x 16 words of 32 bits of 8 vectors, turned about: to(lane, the 8 of this lane).
template <class To>
LLMCTL_INLINE void transpose_8(const __m512i x[8], const To& to) {
    __m512i quarters[2][4];  // [of x][lane in a quarter of 128 bits]
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        const __m512i* from = x + half * 4;
        const __m512i a = _mm512_unpacklo_epi32(from[0], from[1]), b = _mm512_unpackhi_epi32(from[0], from[1]);
        const __m512i c = _mm512_unpacklo_epi32(from[2], from[3]), d = _mm512_unpackhi_epi32(from[2], from[3]);
        quarters[half][0] = _mm512_unpacklo_epi64(a, c);
        quarters[half][1] = _mm512_unpackhi_epi64(a, c);
        quarters[half][2] = _mm512_unpacklo_epi64(b, d);
        quarters[half][3] = _mm512_unpackhi_epi64(b, d);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        __m512i low = quarters[0][i], high = quarters[1][i];
        take_turns(low, high);
        to(i, _mm512_castsi512_si256(low));
        to(i + 4, _mm512_extracti64x4_epi64(low, 1));
        to(i + 8, _mm512_castsi512_si256(high));
        to(i + 12, _mm512_extracti64x4_epi64(high, 1));
    }
}

// Memory that is asked for a few lines at a time, between other work: many at once would only wait for each other.
struct Ahead {
    struct Stretch {
        const void* first;
        int64_t bytes;
    };

    // n lines for each two of a row.
    LLMCTL_INLINE void go_on(int64_t n) {
        const int64_t last = at + n * per_row * 64;
        for (; at < last && at < now.bytes; at += 64) {
            _mm_prefetch(static_cast<const char*>(now.first) + at, _MM_HINT_T1);
        }
        if (at < now.bytes) return;
        now = then;
        then.bytes = at = 0;
    }

    Stretch now{}, then{};
    int64_t per_row = 1, at = 0;
};

class TiledSection {
public:
    TiledSection(const AttentionArgs& args, const AttentionTile& tile, const SectionKeys& keys)
        : a_(args), tile_(tile), keys_(keys), dims_((args.head_dim + 31) / 32 * 32),
          begin_(keys.first / pair_keys * pair_keys), end_((keys.last + pair_keys - 1) / pair_keys * pair_keys),
          halves_(tile.n_rows > lane_rows ? 2 : 1), log2_lanes_(log2_lanes(args, tile)), lanes_(1 << log2_lanes_) {
        const int64_t queries = halves_ * dims_ * query_stride, weights = halves_ * attention_section * lane_rows * 2;
        const int64_t scores = halves_ * attention_section * lane_rows * 4, rows = attention_section * dims_ * 2;
        char* at = piece_scratch(queries + weights + scores + 2 * rows);
        queries_ = at;
        weights_ = reinterpret_cast<Bf16*>(at += queries);
        scores_ = reinterpret_cast<float*>(at += weights);
        values_ = reinterpret_cast<Bf16*>(at += scores);
        panel_ = reinterpret_cast<Bf16*>(at += rows);
        look_ahead();
        lane_keys_ = _mm512_slli_epi32(_mm512_srli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13,
                                                                          14, 15), log2_lanes_), 4);
    }

    void run(AttentionSums& to) {
        const Tiles tiles(64);
        pack_queries();
        find_keys();
        halves_ == 2 ? score_two() : score_one();
        for (int64_t half = 0; half < halves_; ++half) softmax(half, to);
        pack_values();
        for (int64_t d = 0; d < dims_; d += 64) {
            halves_ == 2 ? weigh_two(d, to) : weigh_one(d, to);
        }
    }

private:
    static constexpr int64_t tile_elements = 512;      // 16 rows of 64 bytes
    static constexpr int64_t query_stride = 2 * 64;    // bytes: a row of a tile with as many zeros in front of it

    // Rows of one query see the same keys: what is in one of these may get into the sums of another.
    static int log2_lanes(const AttentionArgs& a, const AttentionTile& tile) {
        const bool is_one = tile.first_row / group_size(a) == (tile.first_row + tile.n_rows - 1) / group_size(a);
        return !is_one || tile.n_rows > 8 ? 4 : tile.n_rows > 4 ? 3 : 2;
    }
    int64_t blocks_of_tile() const { return lane_rows >> log2_lanes_; }

    template <bool Bytes, bool Whole>
    struct Kind {
        static constexpr bool bytes = Bytes, whole = Whole;
    };

    // Calls body with whether the cache has bytes, and whether a head fills whole tiles, as constants.
    template <class Body>
    LLMCTL_INLINE void for_this_kind(const Body& body) const {
        const bool bytes = a_.kv_dtype == LLMCTL_I8, whole = a_.head_dim == dims_;
        if (bytes) return whole ? body(Kind<true, true>()) : body(Kind<true, false>());
        whole ? body(Kind<false, true>()) : body(Kind<false, false>());
    }

    // 32 elements of a row of the cache, 0 behind the head's end.
    template <class Kind>
    LLMCTL_INLINE __m512i elements_of(Kind, const void* row, int64_t at) const {
        const int64_t left = a_.head_dim - at;
        const __mmask32 mask = Kind::whole || left >= 32 ? ~0u : (1u << left) - 1;
        if constexpr (!Kind::bytes) {
            const auto* from = static_cast<const Bf16*>(row) + at;
            return Kind::whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(mask, from);
        } else {
            const __m256i bytes = _mm256_maskz_loadu_epi8(mask, static_cast<const uint8_t*>(row) + at);
            const __m512i zero = _mm512_set1_epi32(kv_zero);
            const __m512i low = _mm512_cvtepu8_epi32(_mm256_castsi256_si128(bytes));
            const __m512i high = _mm512_cvtepu8_epi32(_mm256_extracti128_si256(bytes, 1));
            // whole numbers of 8 bits are bfloat16 already
            const auto codes = (__m512i)_mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(_mm512_sub_epi32(high, zero)),
                                                            _mm512_cvtepi32_ps(_mm512_sub_epi32(low, zero)));
            return Kind::whole ? codes : _mm512_maskz_mov_epi16(mask, codes);
        }
    }

    bool is_there(int64_t key) const { return key >= keys_.first && key < keys_.last; }

    // [tile of rows][32 dims][16 pairs of dims][16 zeros, 16 rows]
    void pack_queries() {
        const int64_t group = group_size(a_);
        char* to = queries_;
        for (int64_t half = 0; half < halves_; ++half) {
            for (int64_t d = 0; d < dims_; d += 32) {
                __m512i pairs[16];
#pragma GCC unroll 16
                for (int64_t lane = 0; lane < lane_rows; ++lane) {
                    pairs[lane] = _mm512_setzero_si512();
                    const int64_t r = half * lane_rows + lane, left = a_.head_dim - d;
                    if (r >= tile_.n_rows) continue;
                    const Bf16* q = query_of((tile_.first_row + r) / group, (tile_.first_row + r) % group);
                    const __mmask32 mask = left >= 32 ? ~0u : (1u << left) - 1;
                    pairs[lane] = _mm512_maskz_loadu_epi16(mask, q + d);
                }
                transpose(pairs);
                for (int i = 0; i < 16; ++i, to += query_stride) {
                    _mm512_store_si512(to, _mm512_setzero_si512());
                    _mm512_store_si512(to + 64, pairs[i]);
                }
            }
        }
    }

    const Bf16* query_of(int64_t query, int64_t in_group) const {
        const int64_t head = tile_.kv_head * group_size(a_) + in_group;
        return static_cast<const Bf16*>(a_.q) + tile_.sequence * a_.q_strides[0] + head * a_.q_strides[1] +
               query * a_.q_strides[2];
    }

    // Each block of keys as it lies in the cache, or, where that does not make whole tiles, in the panel.
    void find_keys() {
        const bool is_tiled = a_.kv_dtype == LLMCTL_BF16 && a_.head_dim == dims_;
        for (int64_t block = 0; block < section_blocks; ++block) {
            const int64_t key = block * block_keys;
            blocks_[block] = {nullptr, 0};
            if (key + block_keys <= keys_.first || key >= keys_.last) continue;
            if (is_tiled && key >= keys_.first && key + block_keys <= keys_.last) {
                blocks_[block] = {static_cast<const Bf16*>(keys_.key(key)), a_.k_strides[2] * 2};
                continue;
            }
            blocks_[block] = {panel_ + key * dims_, dims_ * 2};
            for_this_kind([&](auto kind) LLMCTL_INLINED {
                for (int64_t i = key; i < key + block_keys; ++i) {
                    for (int64_t d = 0; d < dims_; d += 32) {
                        const __m512i x = is_there(i) ? elements_of(kind, keys_.key(i), d) : _mm512_setzero_si512();
                        _mm512_store_si512(panel_ + i * dims_ + d, x);
                    }
                }
            });
        }
    }

    template <int Tile>
    LLMCTL_INLINE void score_block(int64_t block, int64_t d) const {
        if (blocks_[block].first == nullptr) return;
        tile_load<4 + Tile % 2>(blocks_[block].first + d, blocks_[block].stride);
        tile_dot_bf16<Tile, 4 + Tile % 2, 6>();
    }

    // The values of this section are read soon, and then, by this thread probably, the keys of the next one.
    void look_ahead() {
        if (lanes_ == lane_rows) return;  // many rows read the same keys, one tile of them after another
        const int64_t row = a_.head_dim * (a_.kv_dtype == LLMCTL_I8 ? 1 : 2);
        const int64_t left = a_.keys - keys_.start - attention_section;
        ahead_.per_row = (row + 127) / 128;
        if (keys_.value(1) == static_cast<const char*>(keys_.value(0)) + row) {
            ahead_.now = {keys_.value(keys_.first), (keys_.last - keys_.first) * row};
        }
        if (keys_.key(1) == static_cast<const char*>(keys_.key(0)) + row && keys_.last == attention_section) {
            ahead_.then = {keys_.key(attention_section), clamped(left, 0, attention_section) * row};
        }
    }

    // The tiles [keys / 16 of a block, lanes] of scores.
    void score_one() {
        const int64_t blocks = blocks_of_tile();
        for (int64_t tile = first_tile() / 4 * 4; tile < last_tile(); tile += 4) {
            zero_sums();
            for (int64_t i = 0; i < blocks; ++i) {
                const char* queries = queries_ + 64 - i * lanes_ * 4;
                for (int64_t d = 0; d < dims_; d += 32, queries += 16 * query_stride) {
                    ahead_.go_on(16);
                    tile_load<6>(queries, query_stride);
                    score_block<0>(tile * blocks + i, d);
                    score_block<1>((tile + 1) * blocks + i, d);
                    score_block<2>((tile + 2) * blocks + i, d);
                    score_block<3>((tile + 3) * blocks + i, d);
                }
            }
            store_sums(scores_ + tile * 256, scores_ + tile * 256 + 512);
        }
    }

    // The same for two tiles of rows, whose lanes are 16 rows.
    void score_two() {
        for (int64_t block = begin_ / block_keys; block < end_ / block_keys; block += 2) {
            zero_sums();
            const char* queries = queries_ + 64;
            for (int64_t d = 0; d < dims_; d += 32, queries += 16 * query_stride) {
                ahead_.go_on(16);
                tile_load<6>(queries, query_stride);
                tile_load<7>(queries + dims_ / 2 * query_stride, query_stride);
                score_block<0>(block, d);
                score_block<1>(block + 1, d);
                if (blocks_[block].first) tile_dot_bf16<2, 4, 7>();
                if (blocks_[block + 1].first) tile_dot_bf16<3, 5, 7>();
            }
            store_sums(scores_ + block * 256, scores_ + attention_section * lane_rows + block * 256);
        }
    }

    static LLMCTL_INLINE void zero_sums() {
        tile_zero<0>();
        tile_zero<1>();
        tile_zero<2>();
        tile_zero<3>();
    }

    static LLMCTL_INLINE void store_sums(float* first_two, float* last_two) {
        tile_store<0>(first_two, 64);
        tile_store<1>(first_two + 256, 64);
        tile_store<2>(last_two, 64);
        tile_store<3>(last_two + 256, 64);
    }

    // The tiles of scores that have keys in [begin_, end_).
    int64_t first_tile() const { return begin_ * lanes_ / attention_section; }
    int64_t last_tile() const { return (end_ * lanes_ + attention_section - 1) / attention_section; }
    // The first key of a tile.
    int64_t key_of(int64_t tile) const { return tile * blocks_of_tile() * block_keys; }

    // The scores of one half of the rows become weights [32 keys][16 rows][32 keys], in bfloat16.
    void softmax(int64_t half, AttentionSums& to) {
        alignas(64) int32_t begins[lane_rows] = {}, ends[lane_rows] = {};
        int64_t seen_by_all_from = 0, seen_by_all_to = attention_section;
        for (int64_t lane = 0; lane < lane_rows; ++lane) {
            const int64_t r = half * lane_rows + (lane & (lanes_ - 1));
            if (r >= tile_.n_rows) continue;
            const KeyRange range = keys_.ranges[r];
            begins[lane] = static_cast<int32_t>(range.begin);
            ends[lane] = static_cast<int32_t>(range.end);
            seen_by_all_from = range.begin > seen_by_all_from ? range.begin : seen_by_all_from;
            seen_by_all_to = range.end < seen_by_all_to ? range.end : seen_by_all_to;
        }
        const __m512i begin = _mm512_load_si512(begins), end = _mm512_load_si512(ends);
        const bool is_plain = keys_.k_scales == nullptr && a_.softcap == 0.0f;
        const auto is_seen_by_all = [&](int64_t tile) {
            return is_plain && key_of(tile) >= seen_by_all_from && key_of(tile + 1) <= seen_by_all_to;
        };
        const __m512 scale = _mm512_set1_ps(a_.scale);
        float* scores = scores_ + half * attention_section * lane_rows;
        __m512 most = _mm512_set1_ps(-__builtin_inff());
        for (int64_t tile = first_tile(); tile < last_tile(); ++tile) {
            const bool is_all = is_seen_by_all(tile);
            for (int64_t i = 0; i < block_keys; i += 4) {
                ahead_.go_on(8);
#pragma GCC unroll 4
                for (int64_t next = i; next < i + 4; ++next) {
                    float* at = scores + tile * 256 + next * lane_rows;
                    __m512 x = _mm512_mul_ps(_mm512_load_ps(at), scale);
                    if (!is_all) x = finished(x, key_of(tile) + next, begin, end);
                    _mm512_store_ps(at, x);
                    most = _mm512_max_ps(x, most);
                }
            }
        }
        const __m512 highest = over_blocks(most);
        const __mmask16 is_empty = _mm512_cmp_ps_mask(highest, _mm512_set1_ps(-__builtin_inff()), _CMP_EQ_OQ);
        const __m512 reference = _mm512_mask_mov_ps(highest, is_empty, _mm512_setzero_ps());
        alignas(64) float sums[section_blocks * lane_rows];  // [block of 16 keys][row]
        for (int64_t tile = first_tile(); tile < last_tile(); ++tile) {
            _mm512_store_ps(sums + tile * lane_rows, weights_of(half, tile, reference));
        }
        const auto rows = static_cast<__mmask16>((1u << lanes_) - 1);
        __m512 total = _mm512_setzero_ps();
        for (int64_t i = first_tile() * lane_rows; i < last_tile() * lane_rows; i += lanes_) {
            total = _mm512_add_ps(total, _mm512_maskz_loadu_ps(rows, sums + i));
        }
        _mm512_storeu_ps(to.highest + half * lane_rows, highest);
        _mm512_storeu_ps(to.total + half * lane_rows, total);
    }

    // Scaled products with what else a score is made of, -infinity where a row does not see the key. The lanes' keys are
    // `key` and 16, 32, ... behind it.
    LLMCTL_INLINE __m512 finished(__m512 x, int64_t key, __m512i begin, __m512i end) const {
        const __m512i at = _mm512_add_epi32(lane_keys_, _mm512_set1_epi32(static_cast<int32_t>(key)));
        const __mmask16 is_seen = _mm512_cmple_epi32_mask(begin, at) & _mm512_cmplt_epi32_mask(at, end);
        if (keys_.k_scales) {
            x = _mm512_mul_ps(x, _mm512_mask_i32gather_ps(_mm512_setzero_ps(), is_seen, at, keys_.k_scales, 4));
        }
        if (a_.softcap != 0.0f) {
            const __m512 cap = _mm512_set1_ps(a_.softcap);
            x = _mm512_mul_ps(tanh<Avx512Bf16>(_mm512_div_ps(x, cap)), cap);
        }
        return _mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), is_seen, x);
    }

    // The highest of each row's lanes in all of them.
    LLMCTL_INLINE __m512 over_blocks(__m512 x) const {
        if (lanes_ <= 8) x = _mm512_max_ps(x, _mm512_shuffle_f32x4(x, x, 0x4e));
        if (lanes_ <= 4) x = _mm512_max_ps(x, _mm512_shuffle_f32x4(x, x, 0xb1));
        return x;
    }

    // A tile's exp(score - reference): its sums over i, for each lane, and the weights to where they belong.
    LLMCTL_INLINE __m512 weights_of(int64_t half, int64_t tile, __m512 reference) {
        const __m512i in_pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                  6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        const float* scores = scores_ + half * attention_section * lane_rows + tile * 256;
        __m512 sum = _mm512_setzero_ps();
        __m512i pairs[8];
        for (int64_t i = 0; i < 8; ++i, scores += 2 * lane_rows) {
            __m512 low = exp<Avx512Bf16>(_mm512_sub_ps(_mm512_load_ps(scores), reference));
            __m512 high = exp<Avx512Bf16>(_mm512_sub_ps(_mm512_load_ps(scores + lane_rows), reference));
            sum = _mm512_add_ps(_mm512_add_ps(sum, low), high);
            if (keys_.v_scales) {
                low = _mm512_mul_ps(low, value_scales(key_of(tile) + 2 * i));
                high = _mm512_mul_ps(high, value_scales(key_of(tile) + 2 * i + 1));
            }
            pairs[i] = _mm512_permutexvar_epi16(in_pairs, (__m512i)_mm512_cvtne2ps_pbh(high, low));
            ahead_.go_on(6);
        }
        Bf16* to = weights_ + half * attention_section * lane_rows;
        const int64_t first_block = tile * blocks_of_tile();
        transpose_8(pairs, [&](int64_t lane, __m256i weights) LLMCTL_INLINED {
            const int64_t block = first_block + (lane >> log2_lanes_), row = lane & (lanes_ - 1);
            Bf16* at = to + block / 2 * tile_elements + row * pair_keys + block % 2 * block_keys;
            _mm256_store_si256(reinterpret_cast<__m256i*>(at), weights);
        });
        return sum;
    }

    LLMCTL_INLINE __m512 value_scales(int64_t key) const {
        const __m512i at = _mm512_add_epi32(lane_keys_, _mm512_set1_epi32(static_cast<int32_t>(key)));
        const __mmask16 is_there = _mm512_cmpge_epi32_mask(at, _mm512_set1_epi32(static_cast<int32_t>(keys_.first))) &
                                   _mm512_cmplt_epi32_mask(at, _mm512_set1_epi32(static_cast<int32_t>(keys_.last)));
        return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), is_there, at, keys_.v_scales, 4);
    }

    // [32 keys][32 dims][dims 8 q to 8 q + 3, dims 8 q + 4 to 8 q + 7 of all q][16 pairs of keys][16 dims]
    void pack_values() {
        for_this_kind([&](auto kind) LLMCTL_INLINED {
            const auto stride = static_cast<const char*>(keys_.value(1)) - static_cast<const char*>(keys_.value(0));
            for (int64_t key = begin_; key < end_; key += 2) {
                Bf16* to = values_ + key / pair_keys * (dims_ / 16) * tile_elements + key % pair_keys / 2 * 32;
                const auto* row = static_cast<const char*>(keys_.value(key));
                const bool is_even = is_there(key), is_odd = is_there(key + 1);
                for (int64_t d = 0; d < dims_; d += 32, to += 2 * tile_elements) {
                    const __m512i even = is_even ? elements_of(kind, row, d) : _mm512_setzero_si512();
                    const __m512i odd = is_odd ? elements_of(kind, row + stride, d) : _mm512_setzero_si512();
                    _mm512_store_si512(to, _mm512_unpacklo_epi16(even, odd));
                    _mm512_store_si512(to + tile_elements, _mm512_unpackhi_epi16(even, odd));
                }
            }
        });
    }

    // The weights of a half of the rows, and the values of 16 dims, in 32 keys.
    const Bf16* weights_at(int64_t half, int64_t keys) const {
        return weights_ + (half * attention_section / pair_keys + keys) * tile_elements;
    }
    const Bf16* values_at(int64_t keys, int64_t d) const {
        return values_ + (keys * (dims_ / 16) + d / 16) * tile_elements;
    }

    // 32 keys' weights of the first tile of rows times their values of 32 dims, which stay in tiles 6 and 7.
    LLMCTL_INLINE void weigh(int64_t keys, const Bf16* values) const {
        tile_load<4>(weights_at(0, keys), 64);
        tile_load<6>(values, 64);
        tile_load<7>(values + tile_elements, 64);
        tile_dot_bf16<0, 4, 6>();
        tile_dot_bf16<1, 4, 7>();
    }

    // Weights times values for 64 dims, or the last 32.
    void weigh_one(int64_t d, AttentionSums& to) {
        const bool is_wide = d + 32 < dims_;
        zero_sums();
        for (int64_t keys = begin_ / pair_keys; keys < end_ / pair_keys; ++keys) {
            ahead_.go_on(32);
            const Bf16* values = values_at(keys, d);
            weigh(keys, values);
            if (!is_wide) continue;
            tile_load<6>(values + 2 * tile_elements, 64);
            tile_load<7>(values + 3 * tile_elements, 64);
            tile_dot_bf16<2, 4, 6>();
            tile_dot_bf16<3, 4, 7>();
        }
        put<0, 1>(to.values + d, tile_.n_rows);
        if (is_wide) put<2, 3>(to.values + d + 32, tile_.n_rows);
    }

    // The same for two tiles of rows.
    void weigh_two(int64_t d, AttentionSums& to) {
        for (const int64_t last = d + 64 < dims_ ? d + 64 : dims_; d < last; d += 32) {
            zero_sums();
            for (int64_t keys = begin_ / pair_keys; keys < end_ / pair_keys; ++keys) {
                weigh(keys, values_at(keys, d));
                tile_load<5>(weights_at(1, keys), 64);
                tile_dot_bf16<2, 5, 6>();
                tile_dot_bf16<3, 5, 7>();
            }
            put<0, 1>(to.values + d, lane_rows);
            put<2, 3>(to.values + lane_rows * attention_max_dim + d, tile_.n_rows - lane_rows);
        }
    }

    // Two tiles of sums to n_rows rows of 32 dims, in their order.
    template <int Low, int High>
    LLMCTL_INLINE void put(float* to, int64_t n_rows) {
        constexpr int64_t row_bytes = attention_max_dim * 4;
        tile_store<Low>(to, row_bytes);
        tile_store<High>(to + 16, row_bytes);
        for (int64_t r = 0; r < n_rows; ++r, to += attention_max_dim) {
            __m512i low = _mm512_load_si512(to), high = _mm512_load_si512(to + 16);
            take_turns(low, high);
            _mm512_store_si512(to, low);
            _mm512_store_si512(to + 16, high);
        }
    }

    struct Block {
        const Bf16* first;
        int64_t stride;  // bytes from key to key
    };

    const AttentionArgs& a_;
    const AttentionTile& tile_;
    const SectionKeys& keys_;
    int64_t dims_, begin_, end_, halves_;
    int log2_lanes_;
    int64_t lanes_;      // of a key: rows, or as many as make the lanes a power of 2
    __m512i lane_keys_;  // how far each lane's key lies behind that of the first
    Block blocks_[section_blocks];
    Ahead ahead_;
    char* queries_;
    Bf16 *weights_, *values_, *panel_;
    float* scores_;
};

void tiled_attention_section(const AttentionArgs& a, const AttentionTile& tile, int64_t section, AttentionSums& to) {
    if (a.bias || a.kv_dtype == LLMCTL_F32) return attention_section_kernel<Bf16Dot, 6, 6>(a, tile, section, to);
    const SectionKeys keys(a, tile, section);
    if (keys.first >= keys.last) {
        for (int64_t r = 0; r < tile.n_rows; ++r) to.total[r] = 0.0f;
        return;
    }
    TiledSection(a, tile, keys).run(to);
}

constexpr AttentionKernels tiled_attention_kernels = {
    tiled_attention_section,
    attention_add<Avx512Bf16>,
    attention_write<Avx512Bf16, Bf16>,
};

}  // namespace
}  // namespace llmctl
