// The C face of the BPE encoder.
#include "boundary.h"
#include "cpu/bpe.h"
#include "llmctl.h"

using llmctl::BpeEncoder;
using llmctl::guarded;

namespace {

std::string_view slice(const uint8_t* bytes, const int64_t* offsets, int64_t i) {
    return {reinterpret_cast<const char*>(bytes) + offsets[i], static_cast<size_t>(offsets[i + 1] - offsets[i])};
}

}  // namespace

int llmctl_bpe_create(int32_t split, const uint32_t* byte_ids, const uint32_t* merges, int64_t n_merges,
                      void** encoder) {
    return guarded([&] { *encoder = new BpeEncoder(split, byte_ids, merges, n_merges); });
}

void llmctl_bpe_destroy(void* encoder) { delete static_cast<BpeEncoder*>(encoder); }

int llmctl_bpe_add_words(void* encoder, const uint8_t* bytes, const int64_t* offsets, const uint32_t* ids,
                         int64_t n_words) {
    return guarded([&] {
        auto& words = static_cast<BpeEncoder*>(encoder)->model.whole_words;
        words.reserve(words.size() + n_words);
        for (int64_t i = 0; i < n_words; ++i) words.emplace(slice(bytes, offsets, i), ids[i]);
    });
}

int llmctl_bpe_add_tokens(void* encoder, const uint8_t* bytes, const int64_t* offsets, const uint32_t* ids,
                          int64_t n_tokens) {
    return guarded([&] {
        auto& added = static_cast<BpeEncoder*>(encoder)->model.added;
        for (int64_t i = 0; i < n_tokens; ++i) added.add(slice(bytes, offsets, i), ids[i]);
    });
}

int llmctl_bpe_encode(void* encoder, const uint8_t* text, const int64_t* text_offsets, int64_t n_documents,
                      const uint32_t* front, int64_t n_front, const uint32_t* back, int64_t n_back, int32_t n_threads,
                      uint32_t* ids, int64_t* id_offsets) {
    return guarded([&] {
        const llmctl::Documents documents{text, text_offsets, n_documents, front, n_front, back, n_back};
        static_cast<BpeEncoder*>(encoder)->encode(documents, n_threads, ids, id_offsets);
    });
}
