/* The whole C ABI of libllmctl: plain pointers and sizes, no exception crosses it.
 *
 * Functions that return int give 0 for success and 1 for failure; the message of the calling thread's last failure
 * is in llmctl_last_error(). Pointers may be null where their count is 0.
 */
#ifndef LLMCTL_H
#define LLMCTL_H

#include <stdint.h>

/* Raised by every change to this header; the Python side refuses a library with another number. */
#define LLMCTL_ABI 15

#define LLMCTL_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

LLMCTL_API int llmctl_abi_version(void);
LLMCTL_API const char* llmctl_last_error(void);

/* 1 where the CUDA kernels were compiled in. */
LLMCTL_API int llmctl_built_with_cuda(void);

/* What this processor and its operating system can run, not what the compiler was told. */
enum {
    LLMCTL_CPU_AVX2 = 1 << 0,        /* with FMA and F16C */
    LLMCTL_CPU_AVX512 = 1 << 1,      /* F, BW, DQ, VL */
    LLMCTL_CPU_AVX512_VNNI = 1 << 2,
    LLMCTL_CPU_AVX512_BF16 = 1 << 3,
    LLMCTL_CPU_AVX_VNNI = 1 << 4,
    LLMCTL_CPU_AMX_INT8 = 1 << 5,
    LLMCTL_CPU_AMX_BF16 = 1 << 6,
    LLMCTL_CPU_NEON = 1 << 7
};
LLMCTL_API uint64_t llmctl_cpu_features(void);

/* The instruction set that the kernels chosen at run time use: scalar, avx2, avx512, avx512_vnni, avx512_bf16 or amx.
 * By default the best that the processor runs; null goes back to it. One that it lacks is refused. */
LLMCTL_API int llmctl_set_isa(const char* name);
LLMCTL_API const char* llmctl_isa(void);

/* How many threads a kernel may use, the caller's among them: 0, as in the beginning, is one for each physical core
 * that the process may run on. The threads are started when first needed and live as long as the process; after a fork
 * the child starts its own. Calls from several threads at once are safe: one of them has the pool, the others do
 * without. */
LLMCTL_API int llmctl_set_threads(int32_t n_threads);
LLMCTL_API int32_t llmctl_threads(void);

/* How a byte-level BPE tokenizer cuts a text into words before it merges. */
enum {
    LLMCTL_SPLIT_NONE = 0,    /* the whole text is one word */
    LLMCTL_SPLIT_GPT2 = 1,    /* 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ */
    LLMCTL_SPLIT_CL100K = 2,  /* (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}
                                 | ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+ */
    LLMCTL_SPLIT_QWEN2 = 3,   /* the same with \p{N} for \p{N}{1,3} */
    LLMCTL_SPLIT_O200K = 4,   /* [^\r\n\p{L}\p{N}]?U*W+C?|[^\r\n\p{L}\p{N}]?U+W*C?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*
                                 |\s*[\r\n]+|\s+(?!\S)|\s+, where U is [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}],
                                 W [\p{Ll}\p{Lm}\p{Lo}\p{M}] and C (?i:'s|'t|'re|'ve|'m|'ll|'d) */
    LLMCTL_SPLIT_DIGITS = 5   /* each \p{N} alone, and what stands between them as GPT2 */
};

/* Makes an encoder. byte_ids [256]: the token of each byte. merges [n_merges, 3]: left id, right id, merged id, in
 * order of rank. Encoding from several threads at once is safe; llmctl_bpe_destroy takes the encoder or null. */
LLMCTL_API int llmctl_bpe_create(int32_t split, const uint32_t* byte_ids, const uint32_t* merges, int64_t n_merges,
                                 void** encoder);
LLMCTL_API void llmctl_bpe_destroy(void* encoder);

/* Words that become one token whatever the merges say: bytes of word i are bytes[offsets[i]..offsets[i + 1]]. */
LLMCTL_API int llmctl_bpe_add_words(void* encoder, const uint8_t* bytes, const int64_t* offsets, const uint32_t* ids,
                                    int64_t n_words);

/* Strings that are tokens wherever they stand in a text, the longest first; one whose id is UINT32_MAX is found, and
 * so hides what overlaps it, but stays text. */
LLMCTL_API int llmctl_bpe_add_tokens(void* encoder, const uint8_t* bytes, const int64_t* offsets, const uint32_t* ids,
                                     int64_t n_tokens);

/* Encodes UTF-8 documents, document i being text[text_offsets[i]..text_offsets[i + 1]], on up to n_threads threads.
 * Ids of document i land in ids[id_offsets[i]..id_offsets[i + 1]], between the n_front and n_back ids that surround
 * each. ids needs room for text_offsets[n_documents] - text_offsets[0] + n_documents * (n_front + n_back) of them. */
LLMCTL_API int llmctl_bpe_encode(void* encoder, const uint8_t* text, const int64_t* text_offsets, int64_t n_documents,
                                 const uint32_t* front, int64_t n_front, const uint32_t* back, int64_t n_back,
                                 int32_t n_threads, uint32_t* ids, int64_t* id_offsets);

/* Element types of the tensors below. */
enum {
    LLMCTL_F32 = 0,
    LLMCTL_BF16 = 1,
    LLMCTL_F16 = 2, /* of scales alone */
    LLMCTL_I8 = 3   /* of cached keys and values alone: (byte - 128) times a scale for each token and head */
};

/* out = x weight^T + bias for x [n_rows, n_in], weight [n_out, n_in], bias [n_out] or null and out [n_rows, n_out]; the
 * strides count elements from row to row. An element of out depends on its own row of x and of weight alone, to the
 * last bit: neither on n_rows nor on the number of threads. With `high` not 0 floats may be multiplied as the sums of two
 * bfloat16 each, to about 2^-16 of each product, where that is faster; what is not finite then gives NaN or infinity. */
LLMCTL_API int llmctl_linear(int32_t dtype, int32_t high, const void* x, int64_t x_stride, const void* weight,
                             int64_t weight_stride, const void* bias, void* out, int64_t out_stride, int64_t n_rows,
                             int64_t n_in, int64_t n_out);

/* Weights [n_out, n_in] in 4 or 8 bits: (code - zero) * scale. A unit is `unit` (32, 64 or 128) weights of one output,
 * counted from the row's first, which share a scale (float32, bfloat16 or float16) and, unless zeros is null, a zero;
 * without it that is 8 for 4 bits, 128 for 8. In memory: panels of 16 outputs; of a panel blocks of 128 weights; of a
 * block runs of 32; of a run quads of 4, output by output: 64 bytes in 8 bits, and in 4 the quads 0 to 3 in the lower
 * halves of 64 bytes each, 4 to 7 in the upper. Scales and zeros: panels, blocks, units, 16 outputs. What fills up the
 * last panel and block has codes and scales of 0. */
typedef struct {
    const uint8_t* codes;
    const void* scales;
    const uint8_t* zeros;
    int64_t n_in, n_out, unit;
    int32_t bits, scales_dtype;
} llmctl_quantized_weight;

/* The same as llmctl_linear with such weights. Each 128 elements of a row of x are rounded to a scale times whole numbers
 * of 8 bits; a row with NaN or infinity gives NaN, and of 128 elements none above 1e-30 count as 0. */
LLMCTL_API int llmctl_quantized_linear(int32_t dtype, const void* x, int64_t x_stride,
                                       const llmctl_quantized_weight* weight, const void* bias, void* out,
                                       int64_t out_stride, int64_t n_rows, int64_t n_in, int64_t n_out);

/* softmax(softcap(scale q k^T) + bias) v for queries that each see one range of keys. Strides count elements; those of a
 * tensor are from sequence to sequence, head to head and token to token, and the head_dim elements of a token's head lie
 * side by side. Query head h uses the kv head h / (heads / kv_heads). */
typedef struct {
    const void* q;                                       /* [batch, heads, queries, head_dim] */
    const void* k;                                       /* [batch, kv_heads, keys, head_dim] */
    const void* v;                                       /* the same */
    void* out;                                           /* like q */
    int64_t batch, heads, kv_heads, queries, keys, head_dim;
    int64_t q_strides[3], k_strides[3], v_strides[3], out_strides[3];
    const int64_t* first;                                /* [batch, queries]: the first key that each query sees, or null */
    const int64_t* end;                                  /* the key behind the last, or null */
    int64_t first_strides[2], end_strides[2];
    const int64_t* origins;                              /* [batch]: from where sums count in sections of keys, or null */
    int64_t causal_offset;                               /* query t sees no key behind this + t; below 0: any */
    const float* bias;                                   /* [batch, heads, queries, keys] or null */
    int64_t bias_strides[4];
    float scale, softcap;                                /* softcap 0 is none: c tanh(score / c) */
    const float* k_scales;                               /* [batch, kv_heads, keys] of LLMCTL_I8, else null */
    const float* v_scales;
    int64_t scale_strides[2];                            /* from sequence to sequence and head to head */
    int32_t kv_dtype;                                    /* the queries' own, LLMCTL_BF16 or LLMCTL_I8: see there */
} llmctl_attention_args;

/* A query that sees no key gets 0. Its result depends, to the last bit, on its own vector and on the keys and values from
 * the sequence's origin on, so an origin at the first token behind the padding makes padding invisible. head_dim is at
 * most LLMCTL_ATTENTION_MAX_HEAD_DIM. */
#define LLMCTL_ATTENTION_MAX_HEAD_DIM 256
LLMCTL_API int llmctl_attention(int32_t dtype, const llmctl_attention_args* args);

/* For each group_size weights of a row [n_rows, n_in] a scale, of 16 bits (LLMCTL_F16 or LLMCTL_BF16), and a zero, a whole
 * number: the parts `shrinks` of the group's range are tried, and the one kept with the least sum of importance [n_in] (null:
 * 1) times the squared error of the nearest codes. Symmetric scales may be negative, their zero is 2^(bits - 1). Scales of
 * least_scale and below are 1; so are those of a group with NaN, whose zero is 0. scales and zeros are [n_rows, groups]. */
typedef struct {
    const float* weight;
    const float* importance;
    const float* shrinks;
    float* scales;
    float* zeros;
    int64_t n_rows, n_in, weight_stride, group_size, n_shrinks;
    float least_scale;
    int32_t bits, is_symmetric, scales_dtype;
} llmctl_group_scales_args;
LLMCTL_API int llmctl_group_scales(const llmctl_group_scales_args* args);

/* out = activation(x) * up, element by element, or activation(x) where up is null; out may be x or up. */
enum {
    LLMCTL_SILU = 0,
    LLMCTL_GELU = 1,      /* with erf */
    LLMCTL_GELU_TANH = 2, /* with the usual approximation by tanh */
    LLMCTL_RELU = 3
};
LLMCTL_API int llmctl_activation(int32_t dtype, int32_t kind, const void* x, const void* up, void* out, int64_t n);

/* Of y = activation(x) * up the gradients of x and up, from that of y; each rounded once. */
LLMCTL_API int llmctl_gated_gradient(int32_t dtype, int32_t kind, const void* grad, const void* x, const void* up,
                                     void* grad_x, void* grad_up, int64_t n);

/* out = x / sqrt(mean(x^2) + eps) * (offset + weight) for each row of x [n_rows, n_columns]; weight [n_columns], or null
 * for none. out is contiguous and may be x where that is. */
LLMCTL_API int llmctl_rms_norm(int32_t dtype, const void* x, int64_t x_stride, const void* weight, float offset,
                               float eps, void* out, int64_t n_rows, int64_t n_columns);

/* Its gradient, for grad, x and grad_x contiguous. Each LLMCTL_ROWS_PER_SUM rows write a row of weight_sums float32 (null: not
 * wanted), the sum of which over all of them is the gradient of the weight. */
#define LLMCTL_ROWS_PER_SUM 32
LLMCTL_API int llmctl_rms_norm_gradient(int32_t dtype, const void* grad, const void* x, const void* weight, float offset,
                                        float eps, void* grad_x, float* weight_sums, int64_t n_rows, int64_t n_columns);

/* out = (x - mean) / sqrt(variance + eps) * weight + bias for each row, of the same shapes; bias may be null. */
LLMCTL_API int llmctl_layer_norm(int32_t dtype, const void* x, int64_t x_stride, const void* weight, const void* bias,
                                 float eps, void* out, int64_t n_rows, int64_t n_columns);

/* Rotary positions: the first `dims` elements of each head of x, sizes [batch, heads, tokens, head_dim], in pairs
 * (i, i + dims / 2); cos and sin are [batch, tokens, dims], their strides from sequence to sequence and token to token.
 * The strides of x and out are from sequence to sequence, head to head and token to token: out may lie in a cache. */
LLMCTL_API int llmctl_rotate(int32_t dtype, const void* x, const int64_t* x_strides, const void* cos, const void* sin,
                             const int64_t* table_strides, void* out, const int64_t* out_strides,
                             const int64_t* sizes, int64_t dims);

/* Draws a token for each row of scores [n_rows, n_tokens]: of the scores over the temperature, those that top_k (0: all),
 * then top_p (1: all), then log_min_p below the highest (-infinity: all) leave; ties with the last one kept are kept. The
 * token with the largest sum of score and Gumbel noise wins; its noise comes from Philox4x32-10 with the seed as the key
 * and the counter (token / 4, position, sequence, 0), of which token % 4 picks the word. A greedy row takes the largest
 * score, the first of equals. The token of a row with NaN is -1.
 *
 * Before all that, scores of tokens that were `seen` are divided by the row's `repetition` where positive, else multiplied
 * by it; then `frequency` times a token's count is subtracted, and `presence` where it has one. The log-probabilities are
 * those of the scores as they come: of the token drawn, and of the n_top likeliest, the best and of equals the first in
 * front. (The CUDA sampler knows nothing of this paragraph.) */
typedef struct {
    const float* scores;
    int64_t n_rows, n_tokens, scores_stride;
    const float* temperature;
    const int64_t* top_k;
    const double* top_p;
    const float* log_min_p;
    const uint8_t* greedy;
    const int64_t* seeds;
    const int64_t* sequences;
    int64_t position;
    const uint8_t* seen;                                 /* [n_rows, n_tokens], or null */
    const float* counts;                                 /* the same */
    const float* repetition;                             /* [n_rows]; null only where seen is, and the next two */
    const float* presence;                               /* where counts is */
    const float* frequency;
    float* logprobs;                                     /* [n_rows], or null: then the next two are not written */
    int64_t* top_tokens;                                 /* [n_rows, n_top] */
    float* top_logprobs;                                 /* the same */
    int64_t n_top;
} llmctl_sample_args;
LLMCTL_API int llmctl_sample(const llmctl_sample_args* args, int64_t* tokens);

/* A decoder-only model as values and pointers, for llmctl_decode. Its elements all have one type, `dtype`. */
enum {
    LLMCTL_NO_NORM = 0,
    LLMCTL_RMS_NORM = 1,
    LLMCTL_LAYER_NORM = 2
};
typedef struct {
    const void* weight;
    const void* bias;
    int32_t kind;
    float offset, eps;
} llmctl_norm;

/* x -> x weight^T + bias; the weights are those of `quantized` unless it is null. n_out 0: there is none. */
typedef struct {
    const void* weight;
    const llmctl_quantized_weight* quantized;
    const void* bias;
    int64_t n_in, n_out, stride;
} llmctl_matrix;

/* x = sum_norm(x + output_norm(f(norm(x)))), first with attention as f, then with the feed-forward part. */
typedef struct {
    llmctl_norm mixer_norm, mixer_output_norm, mixer_sum_norm, ffn_norm, ffn_output_norm, ffn_sum_norm;
    llmctl_norm q_norm, k_norm;
    llmctl_matrix q, k, v, o;
    llmctl_matrix gate, up, down;                        /* down(activation(gate(x)) * up(x)); without gate of up alone */
    int64_t heads, kv_heads, head_dim, window;           /* window 0: none */
    float scale, softcap;                                /* softcap 0: none */
    int32_t qk_norm_per_head, rotary, activation;        /* rotary: which of the tables, below 0: none */
} llmctl_decoder_layer;

typedef struct {
    const llmctl_decoder_layer* layers;
    const void* embedding;                               /* [n_tokens, d_model] */
    const void* positions;                               /* [n_positions, d_model], added to it, or null */
    llmctl_norm embedding_norm, final_norm;
    llmctl_matrix head;                                  /* n_out 0: none, and no logits */
    int64_t n_layers, n_tokens, d_model, n_positions;
    float embedding_scale, head_scale;                   /* of what goes into the head */
    int32_t dtype;
} llmctl_decoder;

/* cos and sin [n_positions, dims] of the positions that a text may have. */
typedef struct {
    const void* cos;
    const void* sin;
    int64_t n_positions, dims;
} llmctl_rotary;

/* Of a layer; strides from sequence to sequence, head to head and token to token. */
typedef struct {
    void* keys;
    void* values;
    float* key_scales;                                   /* [batch, kv_heads, capacity] of LLMCTL_I8, else null */
    float* value_scales;
    int64_t strides[3], scale_strides[2];
    int32_t dtype;                                       /* the model's own, LLMCTL_BF16 or LLMCTL_I8 */
} llmctl_kv_cache;

typedef struct {
    const int64_t* tokens;                               /* [batch, n_new] */
    const int64_t* starts;                               /* [batch]: padding in front of each text, or null */
    const llmctl_rotary* rotaries;
    const llmctl_kv_cache* caches;                       /* of each layer, with `capacity` places */
    void* logits;                                        /* [batch, head.n_out], those after the last token, or null */
    const llmctl_sample_args* sampling;                  /* draws from the logits, or null; its `scores` are not read */
    int64_t* drawn;                                      /* [batch] */
    int64_t batch, n_new, n_rotaries, offset, capacity;  /* the tokens stand at offset, offset + 1, ... */
} llmctl_decode_args;

/* The whole model in one call: reads the tokens, writes their keys and values, and predicts what follows. Each row gives
 * the bits that the functions above give one by one, and so does not depend on the others. */
LLMCTL_API int llmctl_decode(const llmctl_decoder* decoder, const llmctl_decode_args* args);

/* Cross-entropy of each row of logits [n_rows, n_columns] (contiguous) with its target, plus z_loss * log(Z)^2, into
 * losses [n_rows]; the logits are overwritten with the gradient of the summed losses. A negative target is not
 * learned: loss and gradient 0. A row with NaN or infinity gives the loss NaN. */
LLMCTL_API int llmctl_cross_entropy(int32_t dtype, void* logits, int64_t n_rows, int64_t n_columns,
                                    const int64_t* targets, float z_loss, float* losses);

/* Attention's softmax. Row r of scores [n_rows, n_columns] (contiguous) belongs to query q = r % n_queries, which may
 * attend to the columns begin[q] to end[q] - 1 (none where begin[q] >= end[q]). scores become softmax(scale * scores)
 * over those columns and 0 elsewhere; log_sums [n_rows] gets the logarithm of each softmax's denominator. */
LLMCTL_API int llmctl_attention_softmax(int32_t dtype, void* scores, int64_t n_rows, int64_t n_columns,
                                        const int32_t* begin, const int32_t* end, int64_t n_queries, float scale,
                                        float* log_sums);

/* Its gradient: scores become the probabilities again, from log_sums; grads, on entry the loss's derivative by each
 * probability, become that by each score. deltas [n_rows] is the sum over a row of probability times derivative. */
LLMCTL_API int llmctl_attention_softmax_backward(int32_t dtype, void* scores, void* grads, int64_t n_rows,
                                                 int64_t n_columns, const int32_t* begin, const int32_t* end,
                                                 int64_t n_queries, float scale, const float* log_sums,
                                                 const float* deltas);

/* Causal attention of training in one pass: everything is bfloat16 and contiguous but log_sums. q, out and grad_q are
 * [batch, heads, tokens, head_dim], k and v [batch, kv_heads, tokens, head_dim]. A query attends to the keys from
 * first_keys [batch, tokens] (null: 0), which is not above its own index, to its own. The backward pass takes out and
 * log_sums as the forward pass left them, and grad_out; grad_k and grad_v are, where kv_heads is heads, like k, else
 * float32 [batch, heads, tokens, head_dim]: what each head of a group adds to its gradient. */
typedef struct {
    const void* q;
    const void* k;
    const void* v;
    const int64_t* first_keys;
    void* out;
    float* log_sums; /* [batch, heads, tokens]: of each softmax's denominator */
    const void* grad_out;
    void* grad_q;
    void* grad_k;
    void* grad_v;
    int64_t batch, heads, kv_heads, tokens, head_dim;
    float scale;
} llmctl_training_attention;
/* Whether the two functions that follow can be called for this dtype and size of a head here. */
LLMCTL_API int llmctl_has_training_attention(int32_t dtype, int64_t head_dim);
LLMCTL_API int llmctl_training_attention_forward(const llmctl_training_attention* args);
LLMCTL_API int llmctl_training_attention_backward(const llmctl_training_attention* args);

/* The same on a CUDA device: every pointer, but for structs, strides and sizes, is one of the device, and the work is put into
 * the stream (a cudaStream_t), which nobody waits for. A library without CUDA fails. Differences: attention is made for few
 * queries to many keys, takes `scratch` of as many bytes as llmctl_cuda_attention_scratch says, and promises no bits. */
LLMCTL_API int llmctl_cuda_rms_norm(int32_t dtype, const void* x, int64_t x_stride, const void* weight, float offset,
                                    float eps, void* out, int64_t n_rows, int64_t n_columns, void* stream);
LLMCTL_API int llmctl_cuda_rotate(int32_t dtype, const void* x, const int64_t* x_strides, const void* cos,
                                  const void* sin, const int64_t* table_strides, void* out, const int64_t* out_strides,
                                  const int64_t* sizes, int64_t dims, void* stream);
LLMCTL_API int llmctl_cuda_activation(int32_t dtype, int32_t kind, const void* x, const void* up, void* out, int64_t n,
                                      void* stream);
LLMCTL_API int llmctl_cuda_attention_scratch(const llmctl_attention_args* args, int64_t* bytes);
LLMCTL_API int llmctl_cuda_attention(int32_t dtype, const llmctl_attention_args* args, void* scratch, void* stream);
LLMCTL_API int llmctl_cuda_sample(const llmctl_sample_args* args, int64_t* tokens, void* stream);

/* x -> x weight^T + bias with weights in few bits, which are read once for every 32 rows: sums of exact products, but for
 * float32's own rounding. `weight` itself is of the host, what it points at of the device. */
LLMCTL_API int llmctl_cuda_quantized_linear_scratch(const llmctl_quantized_weight* weight, int64_t n_rows, int64_t* bytes);
LLMCTL_API int llmctl_cuda_quantized_linear(int32_t dtype, const void* x, int64_t x_stride,
                                            const llmctl_quantized_weight* weight, const void* bias, void* out,
                                            int64_t out_stride, int64_t n_rows, void* scratch, void* stream);
/* The weights themselves, rounded once: out [n_out, n_in], contiguous. */
LLMCTL_API int llmctl_cuda_dequantize(int32_t dtype, const llmctl_quantized_weight* weight, void* out, void* stream);

#ifdef __cplusplus
}
#endif
#endif
