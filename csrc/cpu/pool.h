// The threads that all kernels share. They live as long as the process, and none waits for them longer than for the
// piece of work that a thread has already begun.
#pragma once

#include <cstdint>

namespace llmctl {

// How many threads a kernel may use, the caller's included; 0 is one for each physical core that the process may use.
void set_threads(int32_t n);
int32_t threads();

// A callable that takes the number of a piece; it is borrowed, so it costs no allocation.
class PieceWork {
public:
    template <class Body>
    PieceWork(const Body& body)  // NOLINT: implicit, as a lambda is passed
        : context_(&body), call_([](const void* context, int64_t i) { (*static_cast<const Body*>(context))(i); }) {}
    void operator()(int64_t i) const { call_(context_, i); }

private:
    const void* context_;
    void (*call_)(const void*, int64_t);
};

// Calls body(i) for each i in [0, n_pieces), on the calling thread and on whichever of the others are free; returns
// when all are done. The first exception that a piece throws is thrown here, and pieces not yet begun are left out.
// A call from within a piece, or while another thread's call holds the pool, runs on the calling thread alone.
void parallel_for(int64_t n_pieces, const PieceWork& body);

}  // namespace llmctl
