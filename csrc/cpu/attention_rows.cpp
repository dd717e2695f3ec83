// The part of attention between its matrix products: a masked softmax over rows of scores, and its gradient.
#include <cmath>

#include "boundary.h"
#include "cpu/rows.h"

namespace llmctl {
namespace {

// The keys [begin, end) that each query may attend to; the queries of row r are those of r % n_queries.
struct Spans {
    const int32_t* begin;
    const int32_t* end;
    int64_t n_queries;
};

template <class T>
LLMCTL_INLINE void clear(T* row, int64_t first, int64_t last) {
    if (first < last) std::memset(static_cast<void*>(row + first), 0, (last - first) * sizeof(T));
}

// row becomes softmax(scale * row) over [begin, end) and 0 elsewhere; returns log of the sum of exp.
template <class T>
LLMCTL_INLINE float softmax_row(T* row, int64_t n, int64_t begin, int64_t end, float scale) {
    clear(row, 0, std::min(begin, n));
    clear(row, std::max<int64_t>(end, 0), n);
    if (begin >= end) return 0.0f;
    float highest = load(row[begin]) * scale;
#pragma omp simd reduction(max : highest)
    for (int64_t i = begin; i < end; ++i) highest = std::max(highest, load(row[i]) * scale);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; ++i) sum += exp_of_negative(load(row[i]) * scale - highest);
    const float share = 1.0f / sum;
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) store(row[i], exp_of_negative(load(row[i]) * scale - highest) * share);
    return highest + std::log(sum);
}

// scores become probabilities again; grads, d loss / d probability, become d loss / d score.
template <class T>
LLMCTL_INLINE void backward_row(T* scores, T* grads, int64_t n, int64_t begin, int64_t end, float scale, float log_sum,
                                float delta) {
    for (T* row : {scores, grads}) {
        clear(row, 0, std::min(begin, n));
        clear(row, std::max<int64_t>(end, 0), n);
    }
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
        // rounding of the scores and of their sum can leave the difference a little above 0
        const float p = exp_of_negative(std::min(load(scores[i]) * scale - log_sum, 0.0f));
        const float d = p * (load(grads[i]) - delta) * scale;
        store(scores[i], p);
        store(grads[i], d);
    }
}

template <class T>
LLMCTL_INLINE void softmax_rows(T* scores, int64_t first, int64_t last, int64_t n, Spans s, float scale,
                                float* log_sums) {
    for (int64_t r = first; r < last; ++r) {
        const int64_t q = r % s.n_queries;
        log_sums[r] = softmax_row(scores + r * n, n, s.begin[q], s.end[q], scale);
    }
}

template <class T>
LLMCTL_INLINE void backward_rows(T* scores, T* grads, int64_t first, int64_t last, int64_t n, Spans s, float scale,
                                 const float* log_sums, const float* deltas) {
    for (int64_t r = first; r < last; ++r) {
        const int64_t q = r % s.n_queries;
        backward_row(scores + r * n, grads + r * n, n, s.begin[q], s.end[q], scale, log_sums[r], deltas[r]);
    }
}

LLMCTL_FOR_EACH_ISA void forward(float* scores, int64_t first, int64_t last, int64_t n, Spans s, float scale,
                                 float* log_sums) {
    softmax_rows(scores, first, last, n, s, scale, log_sums);
}

LLMCTL_FOR_EACH_ISA void forward(Bf16* scores, int64_t first, int64_t last, int64_t n, Spans s, float scale,
                                 float* log_sums) {
    softmax_rows(scores, first, last, n, s, scale, log_sums);
}

LLMCTL_FOR_EACH_ISA void backward(float* scores, float* grads, int64_t first, int64_t last, int64_t n, Spans s,
                                  float scale, const float* log_sums, const float* deltas) {
    backward_rows(scores, grads, first, last, n, s, scale, log_sums, deltas);
}

LLMCTL_FOR_EACH_ISA void backward(Bf16* scores, Bf16* grads, int64_t first, int64_t last, int64_t n, Spans s,
                                  float scale, const float* log_sums, const float* deltas) {
    backward_rows(scores, grads, first, last, n, s, scale, log_sums, deltas);
}

void check_spans(const Spans& s, int64_t n_columns) {
    for (int64_t q = 0; q < s.n_queries; ++q) {
        if (s.begin[q] < 0 || s.end[q] > n_columns) throw std::out_of_range("a query's keys are beyond the row");
    }
}

}  // namespace
}  // namespace llmctl

int llmctl_attention_softmax(int32_t dtype, void* scores, int64_t n_rows, int64_t n_columns, const int32_t* begin,
                             const int32_t* end, int64_t n_queries, float scale, float* log_sums) {
    using namespace llmctl;
    return guarded([&] {
        check_dtype(dtype);
        const Spans spans{begin, end, n_queries};
        check_spans(spans, n_columns);
        for_rows(n_rows, [=](int64_t first, int64_t last) {
            if (dtype == LLMCTL_F32) {
                forward(static_cast<float*>(scores), first, last, n_columns, spans, scale, log_sums);
            } else {
                forward(static_cast<Bf16*>(scores), first, last, n_columns, spans, scale, log_sums);
            }
        });
    });
}

int llmctl_attention_softmax_backward(int32_t dtype, void* scores, void* grads, int64_t n_rows, int64_t n_columns,
                                      const int32_t* begin, const int32_t* end, int64_t n_queries, float scale,
                                      const float* log_sums, const float* deltas) {
    using namespace llmctl;
    return guarded([&] {
        check_dtype(dtype);
        const Spans spans{begin, end, n_queries};
        check_spans(spans, n_columns);
        for_rows(n_rows, [=](int64_t first, int64_t last) {
            if (dtype == LLMCTL_F32) {
                backward(static_cast<float*>(scores), static_cast<float*>(grads), first, last, n_columns, spans, scale,
                         log_sums, deltas);
            } else {
                backward(static_cast<Bf16*>(scores), static_cast<Bf16*>(grads), first, last, n_columns, spans, scale,
                         log_sums, deltas);
            }
        });
    });
}
