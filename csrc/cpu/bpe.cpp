#include "cpu/bpe.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "cpu/split.h"
#include "llmctl.h"

namespace llmctl {

void AddedTokens::add(std::string_view token, uint32_t id) {
    if (token.empty()) throw std::invalid_argument("an added token is empty");
    auto& same_first_byte = by_first_byte_[static_cast<uint8_t>(token[0])];
    same_first_byte.push_back(static_cast<uint32_t>(tokens_.size()));
    tokens_.emplace_back(token, id);
    std::stable_sort(same_first_byte.begin(), same_first_byte.end(), [this](uint32_t a, uint32_t b) {
        return tokens_[a].first.size() > tokens_[b].first.size();
    });
}

AddedTokens::Match AddedTokens::find(const uint8_t* p, const uint8_t* end) const {
    while (p < end) {
        const uint8_t* next = p + 1;
        for (const uint32_t i : by_first_byte_[*p]) {
            const auto& [token, id] = tokens_[i];
            if (static_cast<size_t>(end - p) < token.size() || std::memcmp(token.data(), p, token.size()) != 0) continue;
            next = p + token.size();
            if (id != stays_text) return {p, next, id};
            break;
        }
        p = next;
    }
    return {end, end, stays_text};
}

BpeModel::BpeModel(int32_t split_, const uint32_t* byte_ids_, const uint32_t* merges_, int64_t n_merges)
    : split(split_), merges(merges_, n_merges) {
    if (split < LLMCTL_SPLIT_NONE || split > LLMCTL_SPLIT_DIGITS) {
        throw std::invalid_argument("unknown way to split text: " + std::to_string(split));
    }
    std::copy(byte_ids_, byte_ids_ + 256, byte_ids.begin());
}

uint32_t* BpeWorker::encode(const uint8_t* p, const uint8_t* end, uint32_t* ids) {
    if (model_.added.empty()) return encode_plain(p, end, ids);
    while (p < end) {
        const AddedTokens::Match match = model_.added.find(p, end);
        ids = encode_plain(p, match.begin, ids);
        if (match.begin < match.end) *ids++ = match.id;
        p = match.end;
    }
    return ids;
}

uint32_t* BpeWorker::encode_plain(const uint8_t* p, const uint8_t* end, uint32_t* ids) {
    switch (model_.split) {
        case LLMCTL_SPLIT_GPT2: return encode_words(Gpt2Words(), p, end, ids);
        case LLMCTL_SPLIT_CL100K: return encode_words(Cl100kWords<3>(), p, end, ids);
        case LLMCTL_SPLIT_QWEN2: return encode_words(Cl100kWords<1>(), p, end, ids);
        case LLMCTL_SPLIT_O200K: return encode_words(O200kWords(), p, end, ids);
        case LLMCTL_SPLIT_DIGITS: return encode_words(Gpt2WordsDigitsApart(), p, end, ids);
        default: return encode_words(WholeText(), p, end, ids);
    }
}

template <class Words>
uint32_t* BpeWorker::encode_words(Words words, const uint8_t* p, const uint8_t* end, uint32_t* ids) {
    while (p < end) {
        const uint8_t* next = words.next(p, end);
        ids = encode_word(p, next - p, ids);
        p = next;
    }
    return ids;
}

uint32_t* BpeWorker::encode_word(const uint8_t* word, int64_t size, uint32_t* ids) {
    if (size <= ShortKey::longest) {
        const ShortKey key(word, size);
        if (const auto* entry = short_words_.find(key, size)) {
            for (uint32_t i = 0; i < entry->n_ids; ++i) ids[i] = entry->ids[i];
            return ids + entry->n_ids;
        }
        uint32_t* last = encode_new_word(word, size, ids);
        const auto n_ids = static_cast<uint32_t>(last - ids);
        if (n_ids <= ShortWordCache::most_ids) short_words_.insert(key, size, ids, n_ids);
        return last;
    }
    return encode_new_word(word, size, ids);
}

uint32_t* BpeWorker::encode_new_word(const uint8_t* word, int64_t size, uint32_t* ids) {
    const bool fits = size <= LongWordCache::longest && size > 4;
    if (fits) {
        if (const auto* entry = long_words_.find(word, size)) {
            return std::copy(entry->ids, entry->ids + entry->n_ids, ids);
        }
    }
    if (!model_.whole_words.empty()) {
        const auto found = model_.whole_words.find(std::string(reinterpret_cast<const char*>(word), size));
        if (found != model_.whole_words.end()) {
            *ids = found->second;
            return ids + 1;
        }
    }
    for (int64_t i = 0; i < size; ++i) ids[i] = model_.byte_ids[word[i]];
    const int64_t n_ids = merger_.merge(ids, size);
    if (fits && n_ids <= LongWordCache::most_ids) long_words_.insert(word, size, ids, static_cast<uint32_t>(n_ids));
    return ids + n_ids;
}

}  // namespace llmctl
