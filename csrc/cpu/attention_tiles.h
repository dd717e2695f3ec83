// Attention of few rows to a section of keys on the tile registers, in bfloat16. Included by files compiled for AMX alone.
//
// Scores are made with keys as the rows of a tile, as they lie in the cache, and stand key by key with a row in each lane:
// the softmax goes through them without a sum across lanes. Its weights are turned around in pairs of bfloat16 on the way
// into the second product. A row is a lane of its own from the beginning to the end.
#pragma once

#include "cpu/attention_tile.h"
#include "cpu/piece_scratch.h"
#include "cpu/simd/amx.h"
#include "cpu/simd/avx512_bf16.h"
#include "cpu/simd/transpose.h"

namespace llmctl {
namespace {

constexpr int64_t lane_rows = 16, pair_keys = 32;
static_assert(attention_max_rows == 2 * lane_rows, "two tiles of rows");

class TiledSection {
public:
    TiledSection(const AttentionArgs& args, const AttentionTile& tile, const SectionKeys& keys)
        : a_(args), tile_(tile), keys_(keys), dims_((args.head_dim + 31) / 32 * 32),
          begin_(keys.first / pair_keys * pair_keys), end_((keys.last + pair_keys - 1) / pair_keys * pair_keys),
          two_(tile.n_rows > lane_rows) {
        const int64_t queries = dims_ * attention_max_rows * 2, weights = attention_section * attention_max_rows * 2;
        const int64_t scores = attention_section * attention_max_rows * 4, values = attention_section * dims_ * 2;
        char* at = piece_scratch(queries + weights + scores + values + pair_keys * dims_ * 2);
        queries_ = reinterpret_cast<Bf16*>(at);
        weights_ = reinterpret_cast<Bf16*>(at += queries);
        scores_ = reinterpret_cast<float*>(at += weights);
        values_ = reinterpret_cast<Bf16*>(at += scores);
        panel_ = reinterpret_cast<Bf16*>(at += values);
    }

    void run(AttentionSums& to) {
        const Tiles tiles(64);
        pack_queries();
        for (int64_t key = begin_; key < end_; key += pair_keys) score(key);
        softmax(0, to);
        if (two_) softmax(1, to);
        pack_values();
        for (int64_t d = 0; d < dims_; d += 32) weigh(d, to);
    }

private:
    static constexpr int64_t tile_elements = 512;  // 16 rows of 64 bytes

    // 16 elements of a row of the cache as words with a bfloat16 in their lower half; 0 behind the head's end, for which
    // `Whole` says that it is that of whole tiles.
    template <bool Bytes, bool Whole>
    LLMCTL_INLINE __m512i words_of(const void* row, int64_t at) const {
        const int64_t left = a_.head_dim - at;
        if (!Whole && left <= 0) return _mm512_setzero_si512();
        const auto mask = static_cast<__mmask16>(Whole || left >= 16 ? 0xffff : (1 << left) - 1);
        if constexpr (!Bytes) {
            const auto* from = static_cast<const Bf16*>(row) + at;
            if constexpr (Whole) {
                return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
            }
            return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
        } else {
            const auto* from = static_cast<const uint8_t*>(row) + at;
            const __m128i bytes = Whole ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(from))
                                        : _mm_maskz_loadu_epi8(mask, from);
            const __m512i codes = _mm512_sub_epi32(_mm512_cvtepu8_epi32(bytes), _mm512_set1_epi32(kv_zero));
            // whole numbers of 8 bits are bfloat16 already
            return _mm512_maskz_srli_epi32(mask, _mm512_castps_si512(_mm512_cvtepi32_ps(codes)), 16);
        }
    }

    // [tile of rows][32 dims][16 pairs of dims][16 rows]
    void pack_queries() {
        const int64_t group = group_size(a_);
        for (int64_t half = 0; half < (two_ ? 2 : 1); ++half) {
            for (int64_t d = 0; d < dims_; d += 32) {
                __m512i pairs[16];
                for (int64_t lane = 0; lane < lane_rows; ++lane) {
                    pairs[lane] = _mm512_setzero_si512();
                    const int64_t r = half * lane_rows + lane, left = a_.head_dim - d;
                    if (r >= tile_.n_rows) continue;
                    const Bf16* q = query_of(a_, tile_, (tile_.first_row + r) / group, (tile_.first_row + r) % group);
                    const __mmask32 mask = left >= 32 ? ~0u : (1u << left) - 1;
                    pairs[lane] = _mm512_maskz_loadu_epi16(mask, q + d);
                }
                transpose(pairs);
                Bf16* to = queries_ + (half * dims_ / 32 + d / 32) * tile_elements;
                for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 32, pairs[i]);
            }
        }
    }

    static const Bf16* query_of(const AttentionArgs& a, const AttentionTile& tile, int64_t query, int64_t in_group) {
        const int64_t head = tile.kv_head * group_size(a) + in_group;
        return static_cast<const Bf16*>(a.q) + tile.sequence * a.q_strides[0] + head * a.q_strides[1] +
               query * a.q_strides[2];
    }

    // Calls body with whether the cache has bytes, and whether a head fills whole tiles, as constants.
    template <class Body>
    LLMCTL_INLINE void for_this_kind(const Body& body) const {
        const bool bytes = a_.kv_dtype == LLMCTL_I8, whole = a_.head_dim == dims_;
        if (bytes) return whole ? body(Flags<true, true>()) : body(Flags<true, false>());
        whole ? body(Flags<false, true>()) : body(Flags<false, false>());
    }

    template <bool Bytes, bool Whole>
    struct Flags {
        static constexpr bool bytes = Bytes, whole = Whole;
    };

    // 32 keys of the section as they lie, or, where that does not make whole tiles, in the panel.
    const Bf16* keys_at(int64_t key, int64_t& stride) {
        if (a_.kv_dtype == LLMCTL_BF16 && a_.head_dim == dims_ && key >= keys_.first && key + pair_keys <= keys_.last) {
            stride = a_.k_strides[2];
            return static_cast<const Bf16*>(keys_.key(key));
        }
        stride = dims_;
        for_this_kind([&](auto kind) LLMCTL_INLINED {
            for (int64_t i = 0; i < pair_keys; ++i) {
                const bool is_there = key + i >= keys_.first && key + i < keys_.last;
                for (int64_t d = 0; d < dims_; d += 32) {
                    __m512i low = _mm512_setzero_si512(), high = low;
                    if (is_there) {
                        low = words_of<kind.bytes, kind.whole>(keys_.key(key + i), d);
                        high = words_of<kind.bytes, kind.whole>(keys_.key(key + i), d + 16);
                    }
                    auto* to = reinterpret_cast<__m256i*>(panel_ + i * dims_ + d);
                    _mm256_store_si256(to, _mm512_cvtepi32_epi16(low));
                    _mm256_store_si256(to + 1, _mm512_cvtepi32_epi16(high));
                }
            }
        });
        return panel_;
    }

    void score(int64_t key) {
        int64_t stride;
        const Bf16* keys = keys_at(key, stride);
        if (key + 2 * pair_keys <= keys_.last) {
            for (int64_t i = 0; i < pair_keys; ++i) Avx512::prefetch(keys_.key(key + pair_keys + i));
        }
        tile_zero<0>();
        tile_zero<1>();
        tile_zero<2>();
        tile_zero<3>();
        for (int64_t d = 0; d < dims_; d += 32) {
            tile_load<4>(keys + d, stride * 2);
            tile_load<5>(keys + lane_rows * stride + d, stride * 2);
            tile_load<6>(queries_ + d / 32 * tile_elements, 64);
            tile_dot_bf16<0, 4, 6>();
            tile_dot_bf16<1, 5, 6>();
            if (!two_) continue;
            tile_load<7>(queries_ + (dims_ + d) / 32 * tile_elements, 64);
            tile_dot_bf16<2, 4, 7>();
            tile_dot_bf16<3, 5, 7>();
        }
        float* to = scores_ + key * lane_rows;
        tile_store<0>(to, 64);
        tile_store<1>(to + lane_rows * lane_rows, 64);
        if (!two_) return;
        to += attention_section * lane_rows;
        tile_store<2>(to, 64);
        tile_store<3>(to + lane_rows * lane_rows, 64);
    }

    // The scores of one tile of rows become weights [32 keys][16 rows][32 keys], in bfloat16.
    void softmax(int64_t half, AttentionSums& to) {
        float* scores = scores_ + half * attention_section * lane_rows;
        alignas(64) int32_t begins[lane_rows] = {}, ends[lane_rows] = {};
        for (int64_t lane = 0; lane < lane_rows && half * lane_rows + lane < tile_.n_rows; ++lane) {
            const KeyRange range = keys_.ranges[half * lane_rows + lane];
            begins[lane] = static_cast<int32_t>(range.begin);
            ends[lane] = static_cast<int32_t>(range.end);
        }
        const __m512i begin = _mm512_load_si512(begins), end = _mm512_load_si512(ends);
        const __m512 nothing = _mm512_set1_ps(-__builtin_inff());
        __m512 most = nothing;
        for (int64_t key = keys_.first; key < keys_.last; ++key) {
            const float scale = keys_.k_scales ? a_.scale * keys_.k_scales[key] : a_.scale;
            __m512 x = _mm512_mul_ps(_mm512_load_ps(scores + key * lane_rows), _mm512_set1_ps(scale));
            if (a_.softcap != 0.0f) {
                const __m512 cap = _mm512_set1_ps(a_.softcap);
                x = _mm512_mul_ps(tanh<Avx512Bf16>(_mm512_div_ps(x, cap)), cap);
            }
            const __m512i at = _mm512_set1_epi32(static_cast<int32_t>(key));
            const __mmask16 is_seen = _mm512_cmple_epi32_mask(begin, at) & _mm512_cmplt_epi32_mask(at, end);
            x = _mm512_mask_mov_ps(nothing, is_seen, x);
            _mm512_store_ps(scores + key * lane_rows, x);
            most = _mm512_max_ps(x, most);
        }
        const __mmask16 is_empty = _mm512_cmp_ps_mask(most, nothing, _CMP_EQ_OQ);
        const __m512 reference = _mm512_mask_mov_ps(most, is_empty, _mm512_setzero_ps());
        __m512 total = _mm512_setzero_ps();
        for (int64_t key = begin_; key < end_; key += pair_keys) {
            __m512i pairs[16];
            for (int64_t i = 0; i < 16; ++i) {
                const __m512i low = weight(scores, key + 2 * i, reference, total);
                const __m512i high = weight(scores, key + 2 * i + 1, reference, total);
                pairs[i] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
            }
            transpose(pairs);
            Bf16* row = weights_ + (half * attention_section / pair_keys + key / pair_keys) * tile_elements;
            for (int i = 0; i < 16; ++i) _mm512_store_si512(row + i * 32, pairs[i]);
        }
        _mm512_storeu_ps(to.highest + half * lane_rows, most);
        _mm512_storeu_ps(to.total + half * lane_rows, total);
    }

    // exp(score - reference) of a key, which is added to the total, as a bfloat16 in the lower half of each lane.
    LLMCTL_INLINE __m512i weight(const float* scores, int64_t key, __m512 reference, __m512& total) const {
        if (key < keys_.first || key >= keys_.last) return _mm512_setzero_si512();
        __m512 p = exp<Avx512Bf16>(_mm512_sub_ps(_mm512_load_ps(scores + key * lane_rows), reference));
        total = _mm512_add_ps(total, p);
        if (keys_.v_scales) p = _mm512_mul_ps(p, _mm512_set1_ps(keys_.v_scales[key]));
        return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(p));
    }

    // [32 keys][16 dims][16 pairs of keys][16 dims]
    void pack_values() {
        for_this_kind([&](auto kind) LLMCTL_INLINED {
            for (int64_t key = begin_; key < end_; key += 2) {
                const bool has_low = key >= keys_.first && key < keys_.last;
                const bool has_high = key + 1 >= keys_.first && key + 1 < keys_.last;
                Bf16* to = values_ + key / pair_keys * (dims_ / 16) * tile_elements + key % pair_keys / 2 * 32;
                if (has_low && has_high) {
                    pack_pair<kind.bytes, kind.whole>(keys_.value(key), keys_.value(key + 1), to);
                    continue;
                }
                for (int64_t d = 0; d < dims_; d += 16) {
                    __m512i pair = _mm512_setzero_si512();
                    if (has_low) pair = words_of<kind.bytes, kind.whole>(keys_.value(key), d);
                    if (has_high) {
                        pair = _mm512_slli_epi32(words_of<kind.bytes, kind.whole>(keys_.value(key + 1), d), 16);
                    }
                    _mm512_store_si512(to + d / 16 * tile_elements, pair);
                }
            }
        });
    }

    template <bool Bytes, bool Whole>
    LLMCTL_INLINE void pack_pair(const void* low_row, const void* high_row, Bf16* to) const {
        const auto ahead = static_cast<int64_t>(static_cast<const char*>(high_row) - static_cast<const char*>(low_row));
        Avx512::prefetch(static_cast<const char*>(low_row) + pair_keys * ahead);
        Avx512::prefetch(static_cast<const char*>(high_row) + pair_keys * ahead);
        for (int64_t d = 0; d < dims_; d += 16, to += tile_elements) {
            const __m512i low = words_of<Bytes, Whole>(low_row, d), high = words_of<Bytes, Whole>(high_row, d);
            _mm512_store_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }

    // Weights times values for 32 dims.
    void weigh(int64_t d, AttentionSums& to) {
        tile_zero<0>();
        tile_zero<1>();
        tile_zero<2>();
        tile_zero<3>();
        for (int64_t block = begin_ / pair_keys; block < end_ / pair_keys; ++block) {
            const Bf16* values = values_ + (block * (dims_ / 16) + d / 16) * tile_elements;
            tile_load<4>(weights_ + block * tile_elements, 64);
            tile_load<6>(values, 64);
            tile_load<7>(values + tile_elements, 64);
            tile_dot_bf16<0, 4, 6>();
            tile_dot_bf16<1, 4, 7>();
            if (!two_) continue;
            tile_load<5>(weights_ + (attention_section / pair_keys + block) * tile_elements, 64);
            tile_dot_bf16<2, 5, 6>();
            tile_dot_bf16<3, 5, 7>();
        }
        constexpr int64_t row_bytes = attention_max_dim * 4;
        tile_store<0>(to.values + d, row_bytes);
        tile_store<1>(to.values + d + 16, row_bytes);
        if (!two_) return;
        float* lower = to.values + lane_rows * attention_max_dim + d;
        tile_store<2>(lower, row_bytes);
        tile_store<3>(lower + 16, row_bytes);
    }

    const AttentionArgs& a_;
    const AttentionTile& tile_;
    const SectionKeys& keys_;
    int64_t dims_, begin_, end_;
    bool two_;
    Bf16 *queries_, *weights_, *values_, *panel_;
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
