// Spread documents over threads and gather their ids.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <system_error>
#include <thread>

#include "cpu/bpe.h"
#include "cpu/split.h"
#include "llmctl.h"

namespace llmctl {

namespace {

// Text that a thread takes at a time: long against the cost of taking it, short against a thread that ends last.
constexpr int64_t task_bytes = 1 << 16;

// A stretch of text in documents [first, last), whose ids are written from `ids_begin` on.
struct Task {
    int64_t first, last;
    int64_t begin, end;
    bool opens, closes;  // the stretch holds the start of its first document, the end of its last
    int64_t ids_begin, n_ids;
};

// `cuttable`: a long document may be cut where its words are cut anyway.
std::vector<Task> plan(const Documents& d, bool cuttable) {
    std::vector<Task> tasks;
    const int64_t origin = d.n_documents ? d.text_offsets[0] : 0;
    int64_t first = 0, begin = origin;
    bool opens = true;
    while (first < d.n_documents) {
        Task task{first, first, begin, begin, opens, true, 0, 0};
        while (task.last < d.n_documents && task.end - begin < task_bytes) task.end = d.text_offsets[++task.last];
        if (cuttable && task.end - begin > 2 * task_bytes) {
            const int64_t earliest = std::max(begin, d.text_offsets[task.last - 1]) + task_bytes;
            const uint8_t* cut = d.text + task.end;
            if (earliest < task.end) cut = sure_cut(d.text + earliest, d.text + task.end);
            task.closes = cut == d.text + task.end;
            task.end = cut - d.text;
        }
        // Every byte may become an id, so these places never overlap.
        task.ids_begin = begin - origin + first * (d.n_front + d.n_back) + (opens ? 0 : d.n_front);
        tasks.push_back(task);
        first = task.closes ? task.last : task.last - 1;
        opens = task.closes;
        begin = task.end;
    }
    return tasks;
}

// Encodes a task; id_offsets of the documents that end in it count from the task's first id.
void run(const Documents& d, BpeWorker& worker, Task& task, uint32_t* ids, int64_t* id_offsets) {
    uint32_t* const start = ids + task.ids_begin;
    uint32_t* next = start;
    for (int64_t i = task.first; i < task.last; ++i) {
        const int64_t begin = std::max(task.begin, d.text_offsets[i]);
        const int64_t end = std::min(task.end, d.text_offsets[i + 1]);
        if (i > task.first || task.opens) next = std::copy(d.front, d.front + d.n_front, next);
        next = worker.encode(d.text + begin, d.text + end, next);
        if (i + 1 == task.last && !task.closes) break;
        next = std::copy(d.back, d.back + d.n_back, next);
        id_offsets[i + 1] = next - start;
    }
    task.n_ids = next - start;
}

// Closes the gaps between the tasks' ids.
void gather(const std::vector<Task>& tasks, uint32_t* ids, int64_t* id_offsets) {
    int64_t total = 0;
    id_offsets[0] = 0;
    for (const Task& task : tasks) {
        std::memmove(ids + total, ids + task.ids_begin, task.n_ids * sizeof *ids);
        const int64_t ended = task.closes ? task.last : task.last - 1;
        for (int64_t i = task.first; i < ended; ++i) id_offsets[i + 1] += total;
        total += task.n_ids;
    }
}

// The first exception of any thread, for the thread that called.
class FirstFailure {
public:
    void keep() {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!failure_) failure_ = std::current_exception();
    }
    void rethrow() const {
        if (failure_) std::rethrow_exception(failure_);
    }

private:
    std::mutex mutex_;
    std::exception_ptr failure_;
};

}  // namespace

void BpeEncoder::encode(const Documents& documents, int32_t n_threads, uint32_t* ids, int64_t* id_offsets) {
    const bool cuttable = model.split != LLMCTL_SPLIT_NONE && model.added.empty();
    std::vector<Task> tasks = plan(documents, cuttable);
    std::atomic<size_t> next_task{0};
    FirstFailure failure;
    auto work = [&] {
        try {
            std::unique_ptr<BpeWorker> worker = take_worker();
            for (size_t i; (i = next_task++) < tasks.size();) run(documents, *worker, tasks[i], ids, id_offsets);
            give_back(std::move(worker));
        } catch (...) {
            failure.keep();
        }
    };
    std::vector<std::thread> threads;
    try {
        while (threads.size() + 1 < std::min(static_cast<size_t>(std::max(n_threads, 1)), tasks.size())) {
            threads.emplace_back(work);
        }
    } catch (const std::system_error&) {
        // The system gives no more threads; those there are do the work.
    }
    work();
    for (std::thread& thread : threads) thread.join();
    failure.rethrow();
    gather(tasks, ids, id_offsets);
}

std::unique_ptr<BpeWorker> BpeEncoder::take_worker() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!idle_.empty()) {
            auto worker = std::move(idle_.back());
            idle_.pop_back();
            return worker;
        }
    }
    return std::make_unique<BpeWorker>(model);
}

void BpeEncoder::give_back(std::unique_ptr<BpeWorker> worker) {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(std::move(worker));
}

}  // namespace llmctl
