// Memory for a piece of work, for files that are compiled for one instruction set: they have no inline functions of the
// standard library.
#pragma once

#include <cstdint>

namespace llmctl {

// `bytes` bytes of the calling thread on a boundary of 64, good until it asks again; throws std::bad_alloc.
char* piece_scratch(int64_t bytes);

}  // namespace llmctl
