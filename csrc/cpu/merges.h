// Byte-pair merging of one word: always the pair of lowest rank, the leftmost of equals, until no pair has a rank.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace llmctl {

struct Merge {
    uint32_t left, right;  // the pair of tokens
    uint32_t rank, merged;
};

constexpr uint32_t no_rank = std::numeric_limits<uint32_t>::max();

// Pairs to merges: open addressing, at most half full.
class MergeTable {
public:
    // `merges` [n, 3] as llmctl_bpe_create takes them.
    MergeTable(const uint32_t* merges, int64_t n);

    bool empty() const { return empty_; }

    // The merge of a pair; its rank is no_rank where there is none.
    const Merge& find(uint32_t left, uint32_t right) const {
        size_t slot = hash(left, right);
        while (slots_[slot].rank != no_rank && !(slots_[slot].left == left && slots_[slot].right == right)) {
            slot = (slot + 1) & mask_;
        }
        return slots_[slot];
    }

private:
    size_t hash(uint32_t left, uint32_t right) const {
        const uint64_t h = ((uint64_t{left} << 32) | right) * 0x9e3779b97f4a7c15u;
        return (h >> 32 ^ h >> 13) & mask_;
    }

    bool empty_;
    size_t mask_;
    std::vector<Merge> slots_;
};

// Merges words; holds the memory that it works in, so each thread has its own.
class Merger {
public:
    explicit Merger(const MergeTable& table) : table_(table) {}

    // Merges ids[0..n) in place and returns how many are left.
    int64_t merge(uint32_t* ids, int64_t n);

private:
    uint32_t merge_short(uint32_t* ids, uint32_t n);
    uint32_t merge_long(uint32_t* ids, uint32_t n);

    struct Node {
        uint32_t previous, next;
        uint32_t rank, merged;  // of the merge with the next node
    };

    const MergeTable& table_;
    std::vector<Node> nodes_;
};

}  // namespace llmctl
