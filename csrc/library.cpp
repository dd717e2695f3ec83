// The library's account of itself.
#include "llmctl.h"

#include <cstdio>

#include "boundary.h"

namespace {
// A fixed buffer, so that reporting "out of memory" needs none.
thread_local char last_error[512] = "";
}  // namespace

void llmctl::set_last_error(const char* message) noexcept {
    std::snprintf(last_error, sizeof last_error, "%s", message);
}

int llmctl_abi_version(void) { return LLMCTL_ABI; }

const char* llmctl_last_error(void) { return last_error; }

int llmctl_built_with_cuda(void) {
#ifdef LLMCTL_WITH_CUDA
    return 1;
#else
    return 0;
#endif
}
