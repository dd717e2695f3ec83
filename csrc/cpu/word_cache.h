// The tokens of words seen before, in memory that does not grow.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace llmctl {

// A word of up to `longest` bytes as two numbers, equal only for equal words of equal length.
struct ShortKey {
    static constexpr int64_t longest = 16;
    uint64_t first = 0, last = 0;

    ShortKey(const uint8_t* word, int64_t size) {
        if (size >= 8) {
            std::memcpy(&first, word, 8);
            std::memcpy(&last, word + size - 8, 8);
        } else if (size >= 4) {
            uint32_t a, b;
            std::memcpy(&a, word, 4);
            std::memcpy(&b, word + size - 4, 4);
            first = uint64_t{b} << 32 | a;
        } else {
            first = word[0] | uint64_t{word[size / 2]} << 8 | uint64_t{word[size - 1]} << 16;
        }
    }
};

// Words of up to 16 bytes and 3 tokens: pairs of entries, of which a new word replaces the one used less lately.
class ShortWordCache {
public:
    struct Entry {
        uint64_t first, last;
        uint16_t size, n_ids;
        uint32_t ids[3];
    };
    static constexpr uint32_t most_ids = 3;

    ShortWordCache() : entries_(2 * n_pairs, Entry{0, 0, 0, 0, {0, 0, 0}}) {}

    const Entry* find(const ShortKey& key, int64_t size) {
        Entry* pair = pair_of(key, size);
        if (holds(pair[0], key, size)) return &pair[0];
        if (!holds(pair[1], key, size)) return nullptr;
        std::swap(pair[0], pair[1]);
        return &pair[0];
    }

    void insert(const ShortKey& key, int64_t size, const uint32_t* ids, uint32_t n_ids) {
        Entry* pair = pair_of(key, size);
        pair[1] = pair[0];
        pair[0] = {key.first, key.last, static_cast<uint16_t>(size), static_cast<uint16_t>(n_ids), {0, 0, 0}};
        std::memcpy(pair[0].ids, ids, n_ids * sizeof *ids);
    }

private:
    static constexpr size_t n_pairs = 1 << 15;

    static bool holds(const Entry& entry, const ShortKey& key, int64_t size) {
        return entry.first == key.first && entry.last == key.last && entry.size == size;
    }

    Entry* pair_of(const ShortKey& key, int64_t size) {
        uint64_t h = (key.first ^ static_cast<uint64_t>(size) << 56) * 0x9e3779b97f4a7c15u;
        h = (h ^ h >> 32 ^ key.last) * 0xd6e8feb86659fd93u;
        return &entries_[2 * (h >> 32 & (n_pairs - 1))];
    }

    std::vector<Entry> entries_;
};

// Longer words and words of more tokens, up to 64 bytes and 31 tokens; a new word replaces what stands in its place.
class LongWordCache {
public:
    struct Entry {
        uint8_t word[64];
        uint16_t size, n_ids;
        uint32_t ids[31];
    };
    static constexpr int64_t longest = 64;
    static constexpr uint32_t most_ids = 31;

    LongWordCache() : entries_(n_entries, Entry{}) {}

    const Entry* find(const uint8_t* word, int64_t size) const {
        const Entry& entry = entries_[place(word, size)];
        return entry.size == size && std::memcmp(entry.word, word, size) == 0 ? &entry : nullptr;
    }

    void insert(const uint8_t* word, int64_t size, const uint32_t* ids, uint32_t n_ids) {
        Entry& entry = entries_[place(word, size)];
        std::memcpy(entry.word, word, size);
        std::memcpy(entry.ids, ids, n_ids * sizeof *ids);
        entry.size = static_cast<uint16_t>(size);
        entry.n_ids = static_cast<uint16_t>(n_ids);
    }

private:
    static constexpr size_t n_entries = 1 << 12;

    static size_t place(const uint8_t* word, int64_t size) {
        uint64_t h = static_cast<uint64_t>(size);
        for (; size >= 8; word += 8, size -= 8) {
            uint64_t part;
            std::memcpy(&part, word, 8);
            h = (h ^ part) * 0x9e3779b97f4a7c15u;
            h ^= h >> 32;
        }
        for (; size > 0; ++word, --size) h = (h ^ *word) * 0x9e3779b97f4a7c15u;
        return (h ^ h >> 32) & (n_entries - 1);
    }

    std::vector<Entry> entries_;
};

}  // namespace llmctl
