#include "cpu/merges.h"

#include <algorithm>
#include <functional>
#include <queue>
#include <stdexcept>

namespace llmctl {

namespace {

// Up to this many tokens, scanning all ranks for the lowest beats keeping a heap of them.
constexpr uint32_t short_word = 48;
constexpr uint32_t no_node = no_rank;

size_t table_size(int64_t n) {
    size_t size = 16;
    while (size < 2 * static_cast<size_t>(n)) size *= 2;
    return size;
}

}  // namespace

MergeTable::MergeTable(const uint32_t* merges, int64_t n) {
    if (n < 0 || n >= no_rank) throw std::invalid_argument("the number of merges does not fit 32 bits");
    slots_.assign(table_size(n), Merge{0, 0, no_rank, 0});
    mask_ = slots_.size() - 1;
    empty_ = n == 0;
    for (int64_t rank = 0; rank < n; ++rank) {
        const uint32_t* pair = merges + 3 * rank;
        // A pair that is listed twice has its last rank, as in the tokenizers library.
        Merge& slot = const_cast<Merge&>(find(pair[0], pair[1]));
        slot = {pair[0], pair[1], static_cast<uint32_t>(rank), pair[2]};
    }
}

int64_t Merger::merge(uint32_t* ids, int64_t n) {
    if (n < 2 || table_.empty()) return n;
    if (n >= no_node) throw std::length_error("a word of 4 GiB or more without a place to cut it");
    return n <= short_word ? merge_short(ids, static_cast<uint32_t>(n)) : merge_long(ids, static_cast<uint32_t>(n));
}

uint32_t Merger::merge_short(uint32_t* ids, uint32_t n) {
    const Merge* pairs[short_word];  // pairs[i]: the merge of ids[i] and ids[i + 1]
    for (uint32_t i = 0; i + 1 < n; ++i) pairs[i] = &table_.find(ids[i], ids[i + 1]);
    while (n > 1) {
        uint32_t best = 0;
        for (uint32_t i = 1; i + 1 < n; ++i) {
            if (pairs[i]->rank < pairs[best]->rank) best = i;
        }
        if (pairs[best]->rank == no_rank) break;
        ids[best] = pairs[best]->merged;
        --n;
        std::copy(ids + best + 2, ids + n + 1, ids + best + 1);
        if (best + 1 < n) {
            std::copy(pairs + best + 2, pairs + n, pairs + best + 1);
            pairs[best] = &table_.find(ids[best], ids[best + 1]);
        }
        if (best > 0) pairs[best - 1] = &table_.find(ids[best - 1], ids[best]);
    }
    return n;
}

uint32_t Merger::merge_long(uint32_t* ids, uint32_t n) {
    // Candidates are rank << 32 | node; one whose rank is no longer its node's is out of date.
    std::vector<uint64_t> candidates;
    nodes_.resize(n);
    auto look_up = [&](uint32_t i) {
        const uint32_t next = nodes_[i].next;
        const Merge* found = next == no_node ? nullptr : &table_.find(ids[i], ids[next]);
        nodes_[i].rank = found ? found->rank : no_rank;
        nodes_[i].merged = found ? found->merged : 0;
        return nodes_[i].rank;
    };
    for (uint32_t i = 0; i < n; ++i) {
        nodes_[i].previous = i == 0 ? no_node : i - 1;
        nodes_[i].next = i + 1 == n ? no_node : i + 1;
        if (look_up(i) != no_rank) candidates.push_back(uint64_t{nodes_[i].rank} << 32 | i);
    }
    std::priority_queue<uint64_t, std::vector<uint64_t>, std::greater<>> queue(std::greater<>(), std::move(candidates));
    while (!queue.empty()) {
        const uint64_t candidate = queue.top();
        queue.pop();
        const uint32_t i = static_cast<uint32_t>(candidate);
        Node& node = nodes_[i];
        if (node.rank != candidate >> 32) continue;
        ids[i] = node.merged;
        Node& gone = nodes_[node.next];
        gone.rank = no_rank;
        node.next = gone.next;
        if (node.next != no_node) nodes_[node.next].previous = i;
        if (look_up(i) != no_rank) queue.push(uint64_t{node.rank} << 32 | i);
        const uint32_t before = node.previous;
        if (before != no_node && look_up(before) != no_rank) queue.push(uint64_t{nodes_[before].rank} << 32 | before);
    }
    uint32_t kept = 0;
    for (uint32_t i = 0; i != no_node; i = nodes_[i].next) ids[kept++] = ids[i];
    if (nodes_.capacity() * sizeof(Node) > 1 << 20) std::vector<Node>().swap(nodes_);  // one huge word is no habit
    return kept;
}

}  // namespace llmctl
