// Memory that a thread keeps for the kernels it calls; a user of it has one `thread_local Scratch` of its own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

namespace llmctl {

class Scratch {
public:
    // `bytes` bytes on a boundary of 64, good until the next call; throws std::bad_alloc. What is larger than `kept` is
    // freed by the next call that needs less.
    char* room(int64_t bytes) {
        if (bytes > size_ || (size_ > kept && bytes <= kept)) {
            bytes_.reset();
            size_ = 0;
            bytes_.reset(static_cast<char*>(::operator new(std::max<int64_t>(bytes, 64), std::align_val_t{64})));
            size_ = bytes;
        }
        return bytes_.get();
    }

private:
    static constexpr int64_t kept = 32 << 20;
    struct Free {
        void operator()(char* p) const { ::operator delete(p, std::align_val_t{64}); }
    };

    std::unique_ptr<char, Free> bytes_;
    int64_t size_ = 0;
};

}  // namespace llmctl
