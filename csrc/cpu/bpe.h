// Byte-level BPE of whole documents.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "cpu/merges.h"
#include "cpu/word_cache.h"

namespace llmctl {

// Tokens that are found in a text as they are written, leftmost first and then longest.
class AddedTokens {
public:
    static constexpr uint32_t stays_text = UINT32_MAX;

    struct Match {
        const uint8_t *begin, *end;
        uint32_t id;
    };

    void add(std::string_view token, uint32_t id);
    bool empty() const { return tokens_.empty(); }

    // The first match in [p, end) that is a token; begin and end are `end` where there is none.
    Match find(const uint8_t* p, const uint8_t* end) const;

private:
    std::vector<std::pair<std::string, uint32_t>> tokens_;
    std::array<std::vector<uint32_t>, 256> by_first_byte_;  // positions in tokens_
};

// What a tokenizer is; read by every thread, changed by none once encoding has begun.
struct BpeModel {
    BpeModel(int32_t split_, const uint32_t* byte_ids_, const uint32_t* merges_, int64_t n_merges);

    int32_t split;
    std::array<uint32_t, 256> byte_ids;
    MergeTable merges;
    std::unordered_map<std::string, uint32_t> whole_words;
    AddedTokens added;
};

// Encodes text on one thread, remembering words.
class BpeWorker {
public:
    explicit BpeWorker(const BpeModel& model) : model_(model), merger_(model.merges) {}

    // Writes the ids of [p, end), at most one per byte, and returns the place behind the last.
    uint32_t* encode(const uint8_t* p, const uint8_t* end, uint32_t* ids);

private:
    uint32_t* encode_plain(const uint8_t* p, const uint8_t* end, uint32_t* ids);
    template <class Words>
    uint32_t* encode_words(Words words, const uint8_t* p, const uint8_t* end, uint32_t* ids);
    uint32_t* encode_word(const uint8_t* word, int64_t size, uint32_t* ids);
    uint32_t* encode_new_word(const uint8_t* word, int64_t size, uint32_t* ids);

    const BpeModel& model_;
    Merger merger_;
    ShortWordCache short_words_;
    LongWordCache long_words_;
};

// The documents of one call; fields as in llmctl_bpe_encode.
struct Documents {
    const uint8_t* text;
    const int64_t* text_offsets;
    int64_t n_documents;
    const uint32_t* front;
    int64_t n_front;
    const uint32_t* back;
    int64_t n_back;
};

class BpeEncoder {
public:
    BpeEncoder(int32_t split, const uint32_t* byte_ids, const uint32_t* merges, int64_t n_merges)
        : model(split, byte_ids, merges, n_merges) {}

    void encode(const Documents& documents, int32_t n_threads, uint32_t* ids, int64_t* id_offsets);

    BpeModel model;

private:
    std::unique_ptr<BpeWorker> take_worker();
    void give_back(std::unique_ptr<BpeWorker> worker);

    std::mutex mutex_;
    std::vector<std::unique_ptr<BpeWorker>> idle_;  // they keep the words that they know from call to call
};

}  // namespace llmctl
