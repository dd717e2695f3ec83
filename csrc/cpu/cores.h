#pragma once

#include <cstdint>

namespace llmctl {

// Physical cores that this process may run on, at least 1: two hardware threads of a core share what a kernel needs.
int32_t physical_cores();

}  // namespace llmctl
