// The C face of attention: checks, and pieces for the threads.
#include "cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <vector>

#include "boundary.h"
#include "cpu/dtype.h"
#include "cpu/kernels.h"
#include "cpu/operations.h"
#include "cpu/pool.h"

namespace llmctl {
namespace {

// Whole tiles for each thread that make it no matter if one gets one more than the others.
constexpr int64_t tiles_per_thread = 4;
// Multiplications that one thread has done before another is at work.
constexpr int64_t worthwhile = 1 << 16;

int64_t floor_divide(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

class Tiles {
public:
    explicit Tiles(const AttentionArgs& args)
        : a_(args),
          rows_(args.queries * (args.heads / args.kv_heads)),
          per_head_((rows_ + attention_max_rows - 1) / attention_max_rows) {}

    int64_t count() const { return a_.batch * a_.kv_heads * per_head_; }

    AttentionTile operator[](int64_t i) const {
        const int64_t size = (rows_ + per_head_ - 1) / per_head_, first = i % per_head_ * size;
        const int64_t head = i / per_head_;
        return {head / a_.kv_heads, head % a_.kv_heads, first, std::clamp<int64_t>(rows_ - first, 0, size)};
    }

private:
    const AttentionArgs& a_;
    int64_t rows_, per_head_;
};

// The sections that hold keys which any row of the tile sees.
KeyRange sections_of(const AttentionArgs& a, const AttentionTile& tile) {
    const int64_t group = a.heads / a.kv_heads;
    KeyRange all{a.keys, 0};
    for (int64_t t = tile.first_row / group; t <= (tile.first_row + tile.n_rows - 1) / group; ++t) {
        const KeyRange keys = visible_keys(a, tile.sequence, t);
        all = {std::min(all.begin, keys.begin), std::max(all.end, keys.end)};
    }
    if (all.begin >= all.end) return {0, 0};
    const int64_t origin = a.origins ? a.origins[tile.sequence] : 0;
    return {floor_divide(all.begin - origin, attention_section),
            floor_divide(all.end - 1 - origin, attention_section) + 1};
}

// Takes a tile through sections in their order; what the first leaves is not added to anything.
class Sum {
public:
    Sum(const AttentionArgs& args, const AttentionKernels& kernels, const AttentionTile& tile)
        : args_(args), kernels_(kernels), tile_(tile) {}

    // Where the next section's sums go: the total itself, if there is none yet.
    AttentionSums& next(AttentionSums& total, AttentionSums& other) { return is_first_ ? total : other; }

    void add(const AttentionSums& section, AttentionSums& total) {
        is_first_ ? clear_what_saw_nothing(total) : kernels_.add(args_, tile_, section, total);
        is_first_ = false;
    }

    void write(AttentionSums& total) {
        if (is_first_) {
            std::fill_n(total.total, tile_.n_rows, 0.0f);
            clear_what_saw_nothing(total);
        }
        kernels_.write(args_, tile_, total);
    }

private:
    void clear_what_saw_nothing(AttentionSums& sums) {
        for (int64_t r = 0; r < tile_.n_rows; ++r) {
            if (sums.total[r] != 0.0f) continue;
            sums.highest[r] = -INFINITY;
            std::fill_n(sums.values + r * attention_max_dim, args_.head_dim, 0.0f);
        }
    }

    const AttentionArgs& args_;
    const AttentionKernels& kernels_;
    const AttentionTile& tile_;
    bool is_first_ = true;
};

// One thread takes a tile through all its sections.
void by_tile(const AttentionArgs& args, const AttentionKernels& kernels, const AttentionTile& tile) {
    if (tile.n_rows == 0) return;
    AttentionSums total, other;
    Sum sum(args, kernels, tile);
    const KeyRange sections = sections_of(args, tile);
    for (int64_t s = sections.begin; s < sections.end; ++s) {
        AttentionSums& to = sum.next(total, other);
        kernels.section(args, tile, s, to);
        sum.add(to, total);
    }
    sum.write(total);
}

// The threads share the sections of few tiles; they are added up in the same order as above.
void by_sections(const AttentionArgs& args, const AttentionKernels& kernels, const Tiles& tiles) {
    struct Piece {
        int64_t tile, section;
    };
    thread_local std::vector<Piece> pieces;
    thread_local std::unique_ptr<AttentionSums[]> parts;
    thread_local size_t room = 0;
    pieces.clear();
    for (int64_t i = 0; i < tiles.count(); ++i) {
        const KeyRange sections = sections_of(args, tiles[i]);
        for (int64_t s = sections.begin; s < sections.end; ++s) pieces.push_back({i, s});
    }
    if (room < pieces.size()) {
        room = 0;
        parts.reset(new AttentionSums[pieces.size()]);  // not filled: a section writes what is read of it
        room = pieces.size();
    }
    const Piece* piece = pieces.data();
    AttentionSums* part = parts.get();
    const auto n_pieces = static_cast<int64_t>(pieces.size());
    parallel_for(n_pieces, [&, piece, part](int64_t p) {
        kernels.section(args, tiles[piece[p].tile], piece[p].section, part[p]);
    });
    for (int64_t i = 0, p = 0; i < tiles.count(); ++i) {
        const AttentionTile tile = tiles[i];
        Sum sum(args, kernels, tile);
        AttentionSums nothing;
        AttentionSums& total = p < n_pieces && piece[p].tile == i ? part[p] : nothing;
        for (; p < n_pieces && piece[p].tile == i; ++p) sum.add(part[p], total);
        sum.write(total);
    }
}

void check(int32_t dtype, const AttentionArgs& a) {
    if (a.kv_dtype != dtype && a.kv_dtype != LLMCTL_BF16 && a.kv_dtype != LLMCTL_I8) {
        throw std::invalid_argument("keys of a type that does not go with the queries'");
    }
    if (a.kv_dtype == LLMCTL_I8 && (a.k_scales == nullptr || a.v_scales == nullptr)) {
        throw std::invalid_argument("bytes without scales");
    }
    for (const int64_t size : {a.batch, a.heads, a.kv_heads, a.queries, a.keys, a.head_dim}) {
        if (size < 0) throw std::invalid_argument("a size is below 0");
    }
    if (a.head_dim > attention_max_dim) throw std::invalid_argument("a head is too wide");
    if (a.kv_heads == 0 || a.heads % a.kv_heads != 0) {
        throw std::invalid_argument("the heads are no multiple of the kv heads");
    }
}

}  // namespace

KeyRange visible_keys(const AttentionArgs& a, int64_t sequence, int64_t query) {
    const int64_t begin = a.first ? a.first[sequence * a.first_strides[0] + query * a.first_strides[1]] : 0;
    int64_t end = a.end ? a.end[sequence * a.end_strides[0] + query * a.end_strides[1]] : a.keys;
    if (a.causal_offset >= 0) end = std::min(end, a.causal_offset + query + 1);
    return {std::max<int64_t>(begin, 0), std::min(end, a.keys)};
}

void run_attention(int32_t dtype, const AttentionArgs& args) {
    check(dtype, args);
    if (args.batch == 0 || args.queries == 0 || args.heads == 0 || args.head_dim == 0) return;
    const AttentionKernels& chosen = dtype == LLMCTL_F32 ? kernels().attention_f32 : kernels().attention_bf16;
    const Tiles tiles(args);
    const bool is_even = tiles.count() % threads() == 0 || tiles.count() >= tiles_per_thread * threads();
    if (args.batch * args.queries * args.heads * args.keys * args.head_dim <= worthwhile) {
        for (int64_t i = 0; i < tiles.count(); ++i) by_tile(args, chosen, tiles[i]);
    } else if (!is_even && args.keys > attention_section) {  // whose sums then wander from core to core
        by_sections(args, chosen, tiles);
    } else {
        parallel_for(tiles.count(), [&](int64_t i) { by_tile(args, chosen, tiles[i]); });
    }
}

}  // namespace llmctl

int llmctl_attention(int32_t dtype, const llmctl_attention_args* args) {
    using namespace llmctl;
    return guarded([&] {
        check_dtype(dtype);
        run_attention(dtype, *args);
    });
}
