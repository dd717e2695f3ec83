// Element types as they cross the C ABI.
#pragma once

#include <stdexcept>

#include "llmctl.h"

namespace llmctl {

inline void check_dtype(int32_t dtype) {
    if (dtype != LLMCTL_F32 && dtype != LLMCTL_BF16) throw std::invalid_argument("expected float32 or bfloat16");
}

}  // namespace llmctl
