#include "cpu/pool.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "boundary.h"
#include "cpu/cores.h"
#include "llmctl.h"

namespace llmctl {
namespace {

// How long a thread looks for work before it sleeps: longer than the gap between two kernels of one decode step, and
// short enough to leave the cores to others.
constexpr int spins = 2000;

constexpr int32_t max_lanes = 256;  // threads of one parallel_for

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// A stretch of pieces: its thread takes them from the front, the others, when they have done theirs, from the back.
class alignas(64) Lane {
public:
    void set(uint64_t begin, uint64_t end) { ends_.store(end << 32 | begin, std::memory_order_relaxed); }

    // A piece, or -1 where none is left.
    int64_t take(bool from_back) {
        uint64_t ends = ends_.load(std::memory_order_relaxed);
        for (;;) {
            const uint64_t begin = ends & UINT32_MAX, end = ends >> 32;
            if (begin >= end) return -1;
            const uint64_t rest = from_back ? ends - (uint64_t{1} << 32) : ends + 1;
            if (ends_.compare_exchange_weak(ends, rest, std::memory_order_relaxed)) {
                return static_cast<int64_t>(from_back ? end - 1 : begin);
            }
        }
    }

private:
    std::atomic<uint64_t> ends_{0};
};

// One parallel_for. Threads join while it is open; it ends when it is closed and all who joined have left.
//
// Each thread has a stretch of pieces of its own: where pieces are stretches of memory, it reads on and on, as the
// processor's prefetching expects. Two threads that take every other piece reach two thirds of the bandwidth.
struct Job {
    // `lanes` is where the pieces of n_lanes threads are noted; they last as long as the job.
    Job(const PieceWork& body, int64_t n_pieces, Lane* lanes, int32_t n_lanes)
        : body(&body), lanes(lanes), n_lanes(n_lanes) {
        for (int64_t i = 0; i < n_lanes; ++i) lanes[i].set(n_pieces * i / n_lanes, n_pieces * (i + 1) / n_lanes);
    }

    const PieceWork* body;
    Lane* lanes;
    int32_t n_lanes;
    std::exception_ptr failure;
    std::atomic<bool> failed{false};

    // What thread number `thread` of the pool does of it.
    void run(int32_t thread) {
        const int32_t own = thread % n_lanes;
        for (int32_t i = 0; i < n_lanes; ++i) {
            Lane& lane = lanes[(own + i) % n_lanes];
            for (int64_t piece; !failed.load(std::memory_order_relaxed) && (piece = lane.take(i > 0)) >= 0;) {
                run_piece(piece);
            }
        }
    }

    void run_piece(int64_t piece) {
        try {
            (*body)(piece);
        } catch (...) {
            if (!failed.exchange(true)) failure = std::current_exception();
        }
    }
};

class Pool {
public:
    // Calls body for every piece on this thread and up to n - 1 others; false where the pool is somebody else's just now.
    bool run(const PieceWork& body, int64_t n_pieces, int32_t n) {
        if (busy_.exchange(true, std::memory_order_acquire)) return false;
        start_threads(n - 1);
        const int32_t n_lanes = std::min(n, std::min(n_started_ + 1, max_lanes));
        Job job(body, n_pieces, lanes_, n_lanes);
        job_ = &job;
        places_.store(n_lanes - 1);
        ++ticket_;
        if (sleeping_ > 0) wake_all();
        job.run(0);
        close();
        busy_.store(false, std::memory_order_release);
        if (job.failure) std::rethrow_exception(job.failure);
        return true;
    }

private:
    void start_threads(int32_t n) {
        if (n_started_ >= n) return;
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are the business of the threads that Python knows
        try {
            for (; n_started_ < n; ++n_started_) std::thread(&Pool::live, this, n_started_ + 1).detach();
        } catch (const std::system_error&) {
            // The system gives no more threads; those there are do the work.
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    void wake_all() {
        std::lock_guard<std::mutex> lock(mutex_);
        wake_.notify_all();
    }

    // Takes the places that are left and waits for those who hold one. Opposite `enter`: each writes its own variable
    // before it reads the other's, in one order for all threads, so that not both can miss the other.
    void close() {
        places_.exchange(0);
        for (int i = 0; inside_ != 0; ++i) {
            if (i < spins) {
                pause();
            } else {
                std::this_thread::yield();  // a helper was put off its core in the middle of a piece
            }
        }
    }

    bool enter() {
        ++inside_;
        int32_t left = places_;
        while (left > 0) {
            if (places_.compare_exchange_weak(left, left - 1)) return true;
        }
        --inside_;
        return false;
    }

    void live(int32_t number) {
        for (uint64_t seen = 0;;) {
            seen = next_ticket(seen);
            if (!enter()) continue;  // it came too late to help
            job_->run(number);
            --inside_;
        }
    }

    uint64_t next_ticket(uint64_t seen) {
        for (int i = 0; i < spins; ++i) {
            if (ticket_ != seen) return ticket_;
            pause();
        }
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleeping_;
        wake_.wait(lock, [&] { return ticket_ != seen; });
        --sleeping_;
        return ticket_;
    }

    std::atomic<bool> busy_{false};
    int32_t n_started_ = 0;
    Job* job_ = nullptr;
    Lane lanes_[max_lanes];
    std::atomic<int32_t> places_{0}, inside_{0}, sleeping_{0};
    std::atomic<uint64_t> ticket_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
};

std::atomic<Pool*> pool{nullptr};
std::atomic<int32_t> wanted_threads{0};

// A child of fork has none of the threads, and may have a copy of the pool amid a change: it makes one of its own.
void forget_pool() { pool = nullptr; }

// Never destroyed: its threads sleep until the process is gone, and need it until then.
Pool& the_pool() {
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
    static_cast<void>(registered);
    Pool* present = pool;
    if (present == nullptr) {
        auto* made = new Pool;
        if (pool.compare_exchange_strong(present, made)) return *made;
        delete made;
    }
    return *present;
}

}  // namespace

void set_threads(int32_t n) { wanted_threads = std::max(n, 0); }

int32_t threads() {
    static const int32_t cores = physical_cores();
    const int32_t wanted = wanted_threads;
    return wanted > 0 ? wanted : cores;
}

void parallel_for(int64_t n_pieces, const PieceWork& body) {
    const auto n = static_cast<int32_t>(std::min<int64_t>(threads(), n_pieces));
    const bool is_countable = n_pieces <= INT32_MAX;  // in a lane
    if (n > 1 && is_countable && the_pool().run(body, n_pieces, n)) return;
    for (int64_t i = 0; i < n_pieces; ++i) body(i);
}

}  // namespace llmctl

int llmctl_set_threads(int32_t n_threads) {
    return llmctl::guarded([&] {
        if (n_threads < 0) throw std::invalid_argument("the number of threads is below 0");
        llmctl::set_threads(n_threads);
    });
}

int32_t llmctl_threads(void) { return llmctl::threads(); }
