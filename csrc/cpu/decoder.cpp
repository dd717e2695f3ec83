// A decoder-only model from tokens to logits in one call: the operations of its layers, one after another.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "boundary.h"
#include "cpu/bf16.h"
#include "cpu/dtype.h"
#include "cpu/kernels.h"
#include "cpu/operations.h"
#include "cpu/pool.h"
#include "cpu/quantized.h"
#include "cpu/scratch.h"
#include "llmctl.h"

namespace llmctl {
namespace {

using Layer = llmctl_decoder_layer;

struct Widths {
    int64_t q = 0, kv = 0, ffn = 0;
};

Widths widths_of(const llmctl_decoder& model) {
    Widths widest;
    for (int64_t i = 0; i < model.n_layers; ++i) {
        const Layer& layer = model.layers[i];
        widest.q = std::max(widest.q, layer.heads * layer.head_dim);
        widest.kv = std::max(widest.kv, layer.kv_heads * layer.head_dim);
        widest.ffn = std::max(widest.ffn, layer.up.n_out);
    }
    return widest;
}

class Pass {
public:
    Pass(const llmctl_decoder& model, const llmctl_decode_args& args)
        : m_(model), a_(args), n_(args.batch * args.n_new), size_(element_size(model.dtype)) {
        check();
        const Widths widths = widths_of(model);
        const int64_t scores = args.logits == nullptr || args.sampling != nullptr ? model.head.n_out : 0;
        const int64_t per_token[] = {m_.d_model, m_.d_model, m_.d_model, widths.q,
                                     widths.q,   widths.kv,  widths.kv,  widths.ffn, widths.ffn};
        const auto padded = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
        const int64_t logits = padded(args.batch * scores * size_);
        int64_t total = logits + padded(args.batch * scores * 4);
        for (const int64_t width : per_token) total += padded(n_ * width * size_);
        thread_local Scratch memory;
        char* at = memory.room(total);
        char** to[] = {&x_, &h_, &y_, &q_, &attended_, &k_, &v_, &gate_, &up_};
        for (int i = 0; i < 9; ++i) {
            *to[i] = at;
            at += padded(n_ * per_token[i] * size_);
        }
        logits_ = args.logits ? static_cast<char*>(args.logits) : at;
        scores_ = reinterpret_cast<float*>(at + logits);
    }

    void run() {
        constexpr llmctl_norm none{};
        embed();
        const char* x = m_.n_layers > 0 ? normalize(m_.layers[0].mixer_norm, x_, h_) : x_;
        for (int64_t i = 0; i < m_.n_layers; ++i) {
            const Layer& layer = m_.layers[i];
            attend(layer, a_.caches[i], x);
            x = add({layer.mixer_output_norm, layer.mixer_sum_norm, layer.ffn_norm});
            feed_forward(layer, x);
            const bool is_last = i + 1 == m_.n_layers;
            x = add({layer.ffn_output_norm, layer.ffn_sum_norm, is_last ? none : m_.layers[i + 1].mixer_norm});
        }
        predict();
    }

private:
    void check() const {
        check_dtype(m_.dtype);
        if (a_.batch < 0 || a_.n_new < 0 || a_.offset < 0) throw std::invalid_argument("a size is below 0");
        if (a_.offset + a_.n_new > a_.capacity) throw std::out_of_range("the cache has no room for the tokens");
        for (int64_t i = 0; i < n_; ++i) {
            if (a_.tokens[i] < 0 || a_.tokens[i] >= m_.n_tokens) throw std::out_of_range("a token is beyond the table");
        }
        if (m_.positions && a_.offset + a_.n_new > m_.n_positions) throw std::out_of_range("no position is left");
        for (int64_t i = 0; i < a_.n_rotaries; ++i) {
            if (a_.offset + a_.n_new > a_.rotaries[i].n_positions) throw std::out_of_range("a table is too short");
        }
        for (int64_t i = 0; i < m_.n_layers; ++i) {
            const llmctl_kv_cache& cache = a_.caches[i];
            const bool has_scales = cache.key_scales && cache.value_scales;
            if (cache.dtype != m_.dtype && cache.dtype != LLMCTL_BF16 && !(cache.dtype == LLMCTL_I8 && has_scales)) {
                throw std::invalid_argument("a cache of a type that does not go with the model's");
            }
            if (m_.layers[i].rotary >= a_.n_rotaries) throw std::out_of_range("a layer's table is not there");
        }
    }

    // Where a token stands in its own text; 0 for padding.
    int64_t position(int64_t i) const {
        const int64_t column = a_.offset + i % a_.n_new;
        return a_.starts ? std::max<int64_t>(column - a_.starts[i / a_.n_new], 0) : column;
    }

    void embed() {
        const int64_t bytes = m_.d_model * size_;
        for (int64_t i = 0; i < n_; ++i) {
            std::memcpy(x_ + i * bytes, static_cast<const char*>(m_.embedding) + a_.tokens[i] * bytes, bytes);
        }
        if (m_.embedding_scale != 1.0f) run_scale(m_.dtype, x_, m_.embedding_scale, n_ * m_.d_model);
        for (int64_t i = 0; m_.positions && i < n_; ++i) {
            const char* added = static_cast<const char*>(m_.positions) + position(i) * bytes;
            run_add(m_.dtype, x_ + i * bytes, added, m_.d_model);
        }
        normalize(m_.embedding_norm, x_, x_);
    }

    // Adds a branch's result, which is y, to x: where the next branch's input is.
    const char* add(const ResidualNorms& norms) {
        run_residual(m_.dtype, norms, x_, y_, h_, n_, m_.d_model);
        return norms.next.kind == LLMCTL_NO_NORM ? x_ : h_;
    }

    // Where the result is: `to`, or `from` where there is nothing to do.
    const char* normalize(const llmctl_norm& norm, const char* from, char* to) {
        if (norm.kind == LLMCTL_NO_NORM) return from;
        run_norm(m_.dtype, norm, from, m_.d_model, to, n_, m_.d_model);
        return to;
    }

    void multiply(const llmctl_matrix& matrix, const char* x, char* out, int64_t n_rows) {
        const Linear product{x,           matrix.weight, matrix.bias, out,           n_rows,
                             matrix.n_in, matrix.n_out,  matrix.n_in, matrix.stride, matrix.n_out};
        if (matrix.quantized == nullptr) return run_linear(m_.dtype, product);
        run_quantized_linear(m_.dtype, quantized_linear_of(*matrix.quantized, product));
    }

    void attend(const Layer& l, const llmctl_kv_cache& cache, const char* x) {
        multiply(l.q, x, q_, n_);
        multiply(l.k, x, k_, n_);
        multiply(l.v, x, v_, n_);
        normalize_heads(l.q_norm, l.qk_norm_per_head, q_, l.heads, l.head_dim);
        normalize_heads(l.k_norm, l.qk_norm_per_head, k_, l.kv_heads, l.head_dim);
        parallel_for_tokens(l, [&](int64_t i) { place(l, cache, i); });
        run_attention(m_.dtype, attention_of(l, cache));
        multiply(l.o, attended_, y_, n_);
    }

    template <class Body>
    void parallel_for_tokens(const Layer& l, const Body& body) {
        const int64_t width = (l.heads + 2 * l.kv_heads) * l.head_dim;
        const int64_t at_a_time = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, width));
        parallel_for((n_ + at_a_time - 1) / at_a_time, [&](int64_t piece) {
            for (int64_t i = piece * at_a_time; i < std::min((piece + 1) * at_a_time, n_); ++i) body(i);
        });
    }

    void normalize_heads(const llmctl_norm& norm, bool per_head, char* x, int64_t heads, int64_t head_dim) {
        if (norm.kind == LLMCTL_NO_NORM) return;
        const int64_t rows = per_head ? heads : 1, width = heads * head_dim / rows;
        run_norm(m_.dtype, norm, x, width, x, n_ * rows, width);
    }

    // Turns the queries and keys of token i, and writes the keys and values into the cache.
    void place(const Layer& l, const llmctl_kv_cache& cache, int64_t i) {
        const int64_t sequence = i / a_.n_new, token = a_.offset + i % a_.n_new, bytes = l.head_dim * size_;
        for (int64_t head = 0; head < l.kv_heads; ++head) {
            const int64_t from = (i * l.kv_heads + head) * bytes;
            const int64_t at = sequence * cache.strides[0] + head * cache.strides[1] + token * cache.strides[2];
            const int64_t scale = sequence * cache.scale_strides[0] + head * cache.scale_strides[1] + token;
            turn(l, i, k_ + from);
            keep(cache, k_ + from, l.head_dim, cache.keys, at, cache.key_scales + scale);
            keep(cache, v_ + from, l.head_dim, cache.values, at, cache.value_scales + scale);
        }
        for (int64_t head = 0; head < l.heads && l.rotary >= 0; ++head) {
            char* q = q_ + (i * l.heads + head) * bytes;
            turn(l, i, q);
        }
    }

    // n elements to place `at` of a cache, in its type.
    void keep(const llmctl_kv_cache& cache, const char* from, int64_t n, void* to, int64_t at, float* scale) const {
        if (cache.dtype == m_.dtype) {
            std::memcpy(static_cast<char*>(to) + at * size_, from, n * size_);
        } else if (cache.dtype == LLMCTL_BF16) {
            const auto* x = reinterpret_cast<const float*>(from);
            for (int64_t i = 0; i < n; ++i) store(static_cast<Bf16*>(to)[at + i], x[i]);
        } else if (m_.dtype == LLMCTL_F32) {
            *scale = encode(reinterpret_cast<const float*>(from), n, static_cast<uint8_t*>(to) + at);
        } else {
            *scale = encode(reinterpret_cast<const Bf16*>(from), n, static_cast<uint8_t*>(to) + at);
        }
    }

    // Codes of the elements, the largest of which becomes 127 times the scale; NaN for the scale where one is not finite.
    template <class Element>
    static float encode(const Element* x, int64_t n, uint8_t* codes) {
        float most = 0.0f;
        bool is_finite = true;
        for (int64_t i = 0; i < n; ++i) {
            const float size = std::fabs(load(x[i]));
            is_finite &= size <= FLT_MAX;
            most = std::max(most, size);
        }
        const float scale = most / 127.0f;
        const bool is_zero = !is_finite || scale < FLT_MIN;
        for (int64_t i = 0; i < n; ++i) {
            codes[i] = static_cast<uint8_t>(kv_zero + (is_zero ? 0 : std::lrint(load(x[i]) / scale)));
        }
        return is_finite ? (is_zero ? 0.0f : scale) : NAN;
    }

    void turn(const Layer& l, int64_t i, char* x) const {
        if (l.rotary < 0) return;
        const llmctl_rotary& table = a_.rotaries[l.rotary];
        const int64_t at = position(i) * table.dims * size_;
        const RotateKernel kernel = m_.dtype == LLMCTL_F32 ? kernels().rotate_f32 : kernels().rotate_bf16;
        kernel(x, static_cast<const char*>(table.cos) + at, static_cast<const char*>(table.sin) + at, x, l.head_dim,
               table.dims);
    }

    AttentionArgs attention_of(const Layer& l, const llmctl_kv_cache& cache) {
        const int64_t token = l.heads * l.head_dim;
        AttentionArgs args{};
        args.q = q_, args.k = cache.keys, args.v = cache.values, args.out = attended_;
        args.batch = a_.batch, args.heads = l.heads, args.kv_heads = l.kv_heads, args.queries = a_.n_new;
        args.keys = a_.offset + a_.n_new, args.head_dim = l.head_dim;
        for (int64_t* strides : {args.q_strides, args.out_strides}) {
            strides[0] = a_.n_new * token, strides[1] = l.head_dim, strides[2] = token;
        }
        std::copy_n(cache.strides, 3, args.k_strides);
        std::copy_n(cache.strides, 3, args.v_strides);
        args.k_scales = cache.key_scales, args.v_scales = cache.value_scales, args.kv_dtype = cache.dtype;
        std::copy_n(cache.scale_strides, 2, args.scale_strides);
        args.origins = a_.starts, args.causal_offset = a_.offset;
        args.scale = l.scale, args.softcap = l.softcap;
        if (a_.starts || (l.window > 0 && args.keys > l.window)) {
            find_first_keys(l.window);
            args.first = first_.data(), args.first_strides[0] = a_.n_new, args.first_strides[1] = 1;
        }
        return args;
    }

    // The first key that each token sees: behind the padding and within the window; padding sees itself.
    void find_first_keys(int64_t window) {
        first_.resize(n_);
        for (int64_t i = 0; i < n_; ++i) {
            const int64_t column = a_.offset + i % a_.n_new;
            first_[i] = a_.starts ? std::min(a_.starts[i / a_.n_new], column) : 0;
            if (window > 0) first_[i] = std::max(first_[i], column - window + 1);
        }
    }

    void feed_forward(const Layer& l, const char* x) {
        multiply(l.up, x, up_, n_);
        const bool is_gated = l.gate.n_out > 0;
        if (is_gated) multiply(l.gate, x, gate_, n_);
        run_activation(m_.dtype, l.activation, is_gated ? gate_ : up_, is_gated ? up_ : nullptr, up_,
                       n_ * l.up.n_out);
        multiply(l.down, up_, y_, n_);
    }

    // The last token of each row, through the final norm and the head.
    void predict() {
        if (m_.head.n_out == 0 || n_ == 0) return;
        const int64_t bytes = m_.d_model * size_;
        for (int64_t row = 0; row < a_.batch; ++row) {
            std::memmove(x_ + row * bytes, x_ + ((row + 1) * a_.n_new - 1) * bytes, bytes);
        }
        const char* hidden = x_;
        if (m_.final_norm.kind != LLMCTL_NO_NORM) {
            run_norm(m_.dtype, m_.final_norm, x_, m_.d_model, h_, a_.batch, m_.d_model);
            hidden = h_;
        }
        if (m_.head_scale != 1.0f) run_scale(m_.dtype, const_cast<char*>(hidden), m_.head_scale, a_.batch * m_.d_model);
        multiply(m_.head, hidden, logits_, a_.batch);
        if (a_.sampling) draw();
    }

    void draw() {
        llmctl_sample_args sampling = *a_.sampling;
        if (sampling.n_rows != a_.batch) throw std::invalid_argument("settings for another number of rows");
        sampling.n_tokens = sampling.scores_stride = m_.head.n_out;
        sampling.scores = reinterpret_cast<const float*>(logits_);
        if (m_.dtype == LLMCTL_BF16) {
            const auto* from = reinterpret_cast<const Bf16*>(logits_);
            for (int64_t i = 0; i < a_.batch * m_.head.n_out; ++i) scores_[i] = load(from[i]);
            sampling.scores = scores_;
        }
        run_sampling(sampling, a_.drawn);
    }

    const llmctl_decoder& m_;
    const llmctl_decode_args& a_;
    int64_t n_, size_;
    char *x_, *h_, *y_, *q_, *attended_, *k_, *v_, *gate_, *up_, *logits_;
    float* scores_;
    std::vector<int64_t> first_;
};

}  // namespace
}  // namespace llmctl

int llmctl_decode(const llmctl_decoder* decoder, const llmctl_decode_args* args) {
    using namespace llmctl;
    return guarded([&] { Pass(*decoder, *args).run(); });
}
