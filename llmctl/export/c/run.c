/* Continues texts with a language model: one C99 file and the model in another.
 *
 *     cc -O3 -o run run.c -lm && ./run model.bin "Once upon a time"
 *
 * -march=native makes it faster, -fopenmp uses all cores. Both files were written by `llmctl export-c`; the same seed gives
 * the text that `llmctl generate` gives. The parts, in this order: memory and the file; products of matrices, in float32 or
 * with int8 weights; the model (a stack of blocks, each norm -> attention or feed-forward -> sum); the tokenizer; drawing
 * tokens; the command line.
 */
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define FORMAT_VERSION 1u
#define LANES 16  /* sums run in so many parts side by side, which a compiler turns into vector instructions */
#define GROUP 32  /* int8 weights and activations share a scale in groups of so many */
#define BATCH 16  /* tokens of a prompt that are read together */

/* How an int8 activation is kept: processors that multiply bytes take one without a sign, so that it is shifted (and what
 * that adds to a sum is taken off again); others multiply 16-bit numbers fastest. */
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
typedef uint8_t Code;
#define CODE_SHIFT 128
#else
typedef int16_t Code;
#define CODE_SHIFT 0
#endif

/* ---- memory and the file ---------------------------------------------------------------------------------------------- */

static void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("run: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(1);
}

/* Zeroed memory that begins at a cache line; it is kept until the end. */
static void *allocate(size_t count, size_t size) {
    if (size && count > (SIZE_MAX - 64) / size) fail("out of memory for %lu values", (unsigned long)count);
    char *memory = calloc(count * size + 64, 1);
    if (!memory) fail("out of memory for %lu bytes", (unsigned long)(count * size));
    return memory + (64 - (uintptr_t)memory % 64);
}

static void *grown(void *memory, size_t count, size_t size) {
    memory = realloc(memory, count * size);
    if (!memory) fail("out of memory for %lu bytes", (unsigned long)(count * size));
    return memory;
}

typedef struct {
    FILE *file;
    const char *name;
    long left; /* bytes; below 0 where the system cannot say */
} Reader;

static void read_bytes(Reader *in, void *to, size_t size) {
    if (size && fread(to, 1, size, in->file) != size) fail("%s: the file ends too early; copy or export it again", in->name);
    if (in->left >= 0) in->left -= (long)size;
}

/* Refuses, before memory is taken for it, what the rest of the file cannot hold. */
static void expect(const Reader *in, size_t count, size_t size) {
    if (count > SIZE_MAX / size || (in->left >= 0 && count * size > (size_t)in->left)) {
        fail("%s: the file is too short for what it says it holds; copy or export it again", in->name);
    }
}

static uint32_t read_word(Reader *in) {
    unsigned char b[4];
    read_bytes(in, b, 4);
    return (uint32_t)b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24;
}

static float read_float(Reader *in) {
    uint32_t word = read_word(in);
    float value;
    memcpy(&value, &word, 4);
    return value;
}

static double read_double(Reader *in) {
    uint64_t word = read_word(in);
    double value;
    word |= (uint64_t)read_word(in) << 32;
    memcpy(&value, &word, 8);
    return value;
}

/* A number that has to be in [least, most]. */
static int read_count(Reader *in, uint32_t least, uint32_t most, const char *what) {
    uint32_t value = read_word(in);
    if (value < least || value > most) fail("%s: %s is %lu, which cannot be", in->name, what, (unsigned long)value);
    return (int)value;
}

static float *read_floats(Reader *in, size_t count) {
    const uint16_t probe = 1;
    expect(in, count, 4);
    float *values = allocate(count, 4);
    if (*(const unsigned char *)&probe) {
        read_bytes(in, values, 4 * count);
    } else {
        for (size_t i = 0; i < count; ++i) values[i] = read_float(in);
    }
    return values;
}

static Reader open_file(const char *name) {
    Reader in = {fopen(name, "rb"), name, -1};
    char magic[8];
    if (!in.file) fail("%s: cannot be opened", name);
    if (fseek(in.file, 0, SEEK_END) == 0) in.left = ftell(in.file);
    rewind(in.file);
    if (fread(magic, 1, 8, in.file) != 8 || memcmp(magic, "llmctl-c", 8) != 0) {
        fail("%s: not a model.bin that llmctl export-c wrote", name);
    }
    if (in.left >= 0) in.left -= 8;
    const uint32_t version = read_word(&in);
    if (version != FORMAT_VERSION) {
        fail("%s: its form is version %lu, this program reads %lu; use the run.c that was written with it", name,
             (unsigned long)version, (unsigned long)FORMAT_VERSION);
    }
    return in;
}

/* ---- arithmetic ------------------------------------------------------------------------------------------------------- */

static int padded(int n) { return (n + GROUP - 1) / GROUP * GROUP; }

static float sum_of_lanes(const float *lanes) {
    float sum = 0.0f;
    for (int k = 0; k < LANES; ++k) sum += lanes[k];
    return sum;
}

static float largest(const float *x, int n) {
    float lanes[LANES], most = x[0];
    int i = 0;
    for (int k = 0; k < LANES; ++k) lanes[k] = most;
    for (; i + LANES <= n; i += LANES) {
        for (int k = 0; k < LANES; ++k) lanes[k] = x[i + k] > lanes[k] ? x[i + k] : lanes[k];
    }
    for (int k = 0; k < LANES; ++k) most = lanes[k] > most ? lanes[k] : most;
    for (; i < n; ++i) most = x[i] > most ? x[i] : most;
    return most;
}

/* e^x of each in place, to float32's precision and without a call, so that it becomes vector instructions: 2^n times the
 * Taylor polynomial of the rest, which is at most ln(2) / 2. Two loops, for compilers cannot do both at once. */
static void exponentials(float *x, int n) {
    for (int i = 0; i < n; ++i) {
        x[i] = x[i] > -87.0f ? x[i] : -87.0f;
        x[i] = x[i] < 88.0f ? x[i] : 88.0f;
    }
    for (int i = 0; i < n; ++i) {
        const float shifted = x[i] * 1.44269504f + 12582912.0f; /* the last bits are the nearest whole number */
        int32_t bits;
        memcpy(&bits, &shifted, 4);
        const int32_t whole = bits - 0x4b400000;
        const float r = (x[i] - (float)whole * 0.693145752f) - (float)whole * 1.42860677e-6f;
        float power, p = 1.0f / 5040.0f;
        p = p * r + 1.0f / 720.0f;
        p = p * r + 1.0f / 120.0f;
        p = p * r + 1.0f / 24.0f;
        p = p * r + 1.0f / 6.0f;
        p = p * r + 0.5f;
        p = p * r + 1.0f;
        p = p * r + 1.0f;
        bits = (whole + 127) * (1 << 23);
        memcpy(&power, &bits, 4);
        x[i] = p * power;
    }
}

/* A matrix of `rows` x `columns`: float32, or int8 with a scale for each group of a row. Rows are padded with zeros. */
typedef struct {
    int rows, columns, stride;
    const float *f;
    const int8_t *q;
    const float *scales;
    const int16_t *shifts; /* what the shift of the codes adds to each group's sum */
} Matrix;

/* Vectors as the products take them: padded with zeros and, for int8 weights, quantized like these. */
typedef struct {
    int stride;
    float *f;
    Code *q;
    float *scales;
} Input;

static Input new_input(int columns) {
    Input input;
    input.stride = padded(columns);
    input.f = allocate((size_t)BATCH * input.stride, sizeof(float));
    input.q = allocate((size_t)BATCH * input.stride, sizeof(Code));
    input.scales = allocate((size_t)BATCH * input.stride / GROUP, sizeof(float));
    return input;
}

static int16_t *shifts_of(const int8_t *q, size_t groups) {
    int16_t *shifts = allocate(groups, sizeof(int16_t));
    for (size_t g = 0; g < groups; ++g) {
        for (int k = 0; k < GROUP; ++k) shifts[g] = (int16_t)(shifts[g] + q[g * GROUP + k]);
    }
    return shifts;
}

static Matrix read_matrix(Reader *in, int is_int8, int rows, int columns) {
    Matrix m = {rows, columns, padded(columns), NULL, NULL, NULL, NULL};
    const size_t size = (size_t)rows * m.stride;
    if (is_int8) {
        expect(in, size, 1);
        int8_t *q = allocate(size, 1);
        read_bytes(in, q, size);
        m.q = q;
        m.scales = read_floats(in, size / GROUP);
        if (CODE_SHIFT) m.shifts = shifts_of(q, size / GROUP);
        return m;
    }
    expect(in, (size_t)rows * columns, 4);
    if (m.stride == columns) {
        m.f = read_floats(in, size);
        return m;
    }
    float *f = allocate(size, 4);
    for (int i = 0; i < rows; ++i) {
        for (int j = 0; j < columns; ++j) f[(size_t)i * m.stride + j] = read_float(in);
    }
    m.f = f;
    return m;
}

static void quantize(Input *x, int count) {
    const int groups = count * x->stride / GROUP;
    for (int g = 0; g < groups; ++g) {
        const float *from = x->f + (size_t)g * GROUP;
        Code *to = x->q + (size_t)g * GROUP;
        float lanes[LANES] = {0}, most = 0.0f;
        for (int i = 0; i < GROUP; i += LANES) {
            for (int k = 0; k < LANES; ++k) {
                const float size = fabsf(from[i + k]);
                lanes[k] = size > lanes[k] ? size : lanes[k];
            }
        }
        for (int k = 0; k < LANES; ++k) most = lanes[k] > most ? lanes[k] : most;
        const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
        for (int i = 0; i < GROUP; ++i) {
            const float value = from[i] * inverse;
            to[i] = (Code)((int32_t)(value + (value < 0.0f ? -0.5f : 0.5f)) + CODE_SHIFT);
        }
        x->scales[g] = most / 127.0f;
    }
}

/* Four rows at once: what is read of x serves all of them. */
static void dot_four(float *restrict out, const float *restrict w, const float *restrict x, int stride) {
    const float *w0 = w, *w1 = w + stride, *w2 = w + 2 * (size_t)stride, *w3 = w + 3 * (size_t)stride;
    float a[LANES] = {0}, b[LANES] = {0}, c[LANES] = {0}, d[LANES] = {0};
    for (int i = 0; i < stride; i += LANES) {
        for (int k = 0; k < LANES; ++k) {
            a[k] += w0[i + k] * x[i + k];
            b[k] += w1[i + k] * x[i + k];
            c[k] += w2[i + k] * x[i + k];
            d[k] += w3[i + k] * x[i + k];
        }
    }
    out[0] = sum_of_lanes(a);
    out[1] = sum_of_lanes(b);
    out[2] = sum_of_lanes(c);
    out[3] = sum_of_lanes(d);
}

static float dot(const float *w, const float *x, int n) {
    float lanes[LANES] = {0}, rest = 0.0f;
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int k = 0; k < LANES; ++k) lanes[k] += w[i + k] * x[i + k];
    }
    for (; i < n; ++i) rest += w[i] * x[i];
    return sum_of_lanes(lanes) + rest;
}

static float dot_int8(const Matrix *m, int row, const Code *x, const float *x_scales) {
    const int groups = m->stride / GROUP;
    const int8_t *w = m->q + (size_t)row * m->stride;
    const float *w_scales = m->scales + (size_t)row * groups;
    const int16_t *shifts = CODE_SHIFT ? m->shifts + (size_t)row * groups : NULL;
    float sum = 0.0f;
    for (int g = 0; g < groups; ++g, w += GROUP, x += GROUP) {
        int32_t part = 0;
        for (int k = 0; k < GROUP; ++k) part += (int)w[k] * (int)x[k];
        if (CODE_SHIFT) part -= CODE_SHIFT * shifts[g];
        sum += (float)part * (w_scales[g] * x_scales[g]);
    }
    return sum;
}

/* out[t] = m x[t] for `count` vectors; out[t] begins at t * out_stride. */
static void multiply(float *out, int out_stride, const Matrix *m, Input *x, int count) {
    const int groups = m->stride / GROUP;
    if (m->q) quantize(x, count);
#ifdef _OPENMP
#pragma omp parallel for if ((size_t)m->rows * m->stride * count > 65536)
#endif
    for (int block = 0; block < (m->rows + 3) / 4; ++block) {
        const int first = 4 * block, last = first + 4 < m->rows ? first + 4 : m->rows;
        for (int t = 0; t < count; ++t) {
            const float *xf = x->f + (size_t)t * x->stride;
            float *to = out + (size_t)t * out_stride;
            if (m->q) {
                for (int i = first; i < last; ++i) {
                    to[i] = dot_int8(m, i, x->q + (size_t)t * x->stride, x->scales + (size_t)t * groups);
                }
            } else if (last - first == 4) {
                dot_four(to + first, m->f + (size_t)first * m->stride, xf, m->stride);
            } else {
                for (int i = first; i < last; ++i) to[i] = dot(m->f + (size_t)i * m->stride, xf, m->stride);
            }
        }
    }
}

static void copy_row(float *out, const Matrix *m, int row) {
    const size_t first = (size_t)row * m->stride;
    for (int j = 0; j < m->columns; ++j) {
        out[j] = m->q ? (float)m->q[first + j] * m->scales[(first + j) / GROUP] : m->f[first + j];
    }
}

/* ---- the model -------------------------------------------------------------------------------------------------------- */

enum { NORM_NONE, NORM_RMS, NORM_LAYER };
enum { QK_NONE, QK_HEAD, QK_PROJECTION };
enum { FFN_NONE, FFN_MLP, FFN_GATED, FFN_EXPERTS };
enum { SILU, GELU, GELU_TANH, RELU };

typedef struct {
    int kind;
    float eps;
    const float *weight, *bias;
} Norm;

/* Radians per position of each pair of a head's first 2 * pairs elements; cos and sin are multiplied by `size`. */
typedef struct {
    int pairs;
    float size;
    const float *frequencies;
    float *cosines, *sines; /* of the batch: [BATCH][pairs] */
} Rope;

typedef struct {
    int n_heads, n_groups, size, window, rope; /* groups share keys and values; window 0: all; rope -1: none */
    float scale, softcap;
    int qk_norm;
    Norm q_norm, k_norm;
    Matrix qkv, out;
    const float *qkv_bias, *out_bias;
    float *keys;   /* [group][element][position] */
    float *values; /* [group][position][element] */
} Attention;

typedef struct {
    Matrix up, down; /* up holds the gate's rows first, where there is one */
    const float *up_bias, *down_bias;
} Expert;

typedef struct {
    int kind, d_ff, activation, n_experts, top_k, normalize;
    Matrix router;
    Expert *experts;
} Ffn;

/* norm_in -> branch -> norm_out, added to the stream, norm_sum; those that a model lacks do nothing. */
typedef struct {
    Norm norm_in, norm_out, norm_sum;
} Norms;

typedef struct {
    Attention attention;
    Ffn ffn;
    Norms around_attention, around_ffn;
} Layer;

typedef struct {
    int vocab_size, d_model, n_layers, max_positions, n_ropes, capacity;
    float embedding_scale, head_scale, head_softcap;
    Norm norm_embedding, norm_final;
    Matrix embedding, head;
    const float *positions, *head_bias;
    Rope *ropes;
    Layer *layers;
    /* room for what is being computed; widths are those of the widest layer */
    int widest_qkv, widest_heads, widest_ff, most_heads, most_experts;
    float *x, *y, *qkv, *hidden, *mixed, *scores, *logits, *shares, *weights;
    int *chosen;
    Input in_model, in_heads, in_ff;
} Model;

static int wider(int a, int b) { return a > b ? a : b; }

static Norm read_norm(Reader *in, int width) {
    Norm norm = {0, 0.0f, NULL, NULL};
    norm.kind = read_count(in, NORM_NONE, NORM_LAYER, "a kind of norm");
    if (norm.kind == NORM_NONE) return norm;
    norm.eps = read_float(in);
    norm.weight = read_floats(in, (size_t)width);
    if (norm.kind == NORM_LAYER) norm.bias = read_floats(in, (size_t)width);
    return norm;
}

static Norms read_norms(Reader *in, int width) {
    Norms norms;
    norms.norm_in = read_norm(in, width);
    norms.norm_out = read_norm(in, width);
    norms.norm_sum = read_norm(in, width);
    return norms;
}

static const float *read_bias(Reader *in, int width) {
    return read_count(in, 0, 1, "a flag of a bias") ? read_floats(in, (size_t)width) : NULL;
}

static void read_attention(Reader *in, Model *m, Attention *a, int is_int8) {
    a->n_heads = read_count(in, 1, 1 << 16, "a number of heads");
    a->n_groups = read_count(in, 1, (uint32_t)a->n_heads, "a number of key-value heads");
    a->size = read_count(in, 1, 1 << 16, "the size of a head");
    if (a->n_heads % a->n_groups) fail("%s: %d heads cannot share %d keys", in->name, a->n_heads, a->n_groups);
    a->window = read_count(in, 0, INT32_MAX, "a window");
    a->rope = read_count(in, 0, (uint32_t)m->n_ropes, "the number of a rope") - 1;
    if (a->rope >= 0 && 2 * m->ropes[a->rope].pairs > a->size) fail("%s: a rope is wider than a head", in->name);
    a->scale = read_float(in);
    a->softcap = read_float(in);
    const int heads = a->n_heads * a->size, groups = a->n_groups * a->size;
    a->qk_norm = read_count(in, QK_NONE, QK_PROJECTION, "a kind of norm");
    a->q_norm = read_norm(in, a->qk_norm == QK_PROJECTION ? heads : a->size);
    a->k_norm = read_norm(in, a->qk_norm == QK_PROJECTION ? groups : a->size);
    a->qkv = read_matrix(in, is_int8, heads + 2 * groups, m->d_model);
    a->qkv_bias = read_bias(in, heads + 2 * groups);
    a->out = read_matrix(in, is_int8, m->d_model, heads);
    a->out_bias = read_bias(in, m->d_model);
    m->widest_qkv = wider(m->widest_qkv, heads + 2 * groups);
    m->widest_heads = wider(m->widest_heads, heads);
    m->most_heads = wider(m->most_heads, a->n_heads);
}

static void read_ffn(Reader *in, Model *m, Ffn *f, int is_int8) {
    f->kind = read_count(in, FFN_NONE, FFN_EXPERTS, "a kind of feed-forward layer");
    if (f->kind == FFN_NONE) return;
    f->d_ff = read_count(in, 1, 1 << 24, "the width of a feed-forward layer");
    f->activation = read_count(in, SILU, RELU, "a kind of activation");
    f->n_experts = read_count(in, 1, 1 << 16, "a number of experts");
    f->top_k = read_count(in, 1, (uint32_t)f->n_experts, "how many experts a token meets");
    f->normalize = read_count(in, 0, 1, "a flag of experts");
    if (f->kind == FFN_EXPERTS) f->router = read_matrix(in, 0, f->n_experts, m->d_model);
    f->experts = allocate((size_t)f->n_experts, sizeof(Expert));
    const int parts = f->kind == FFN_MLP ? 1 : 2;
    for (int e = 0; e < f->n_experts; ++e) {
        f->experts[e].up = read_matrix(in, is_int8, parts * f->d_ff, m->d_model);
        f->experts[e].up_bias = read_bias(in, parts * f->d_ff);
        f->experts[e].down = read_matrix(in, is_int8, m->d_model, f->d_ff);
        f->experts[e].down_bias = read_bias(in, m->d_model);
    }
    m->widest_ff = wider(m->widest_ff, f->d_ff);
    m->most_experts = wider(m->most_experts, f->n_experts);
}

static void read_model(Reader *in, Model *m) {
    const int is_int8 = read_count(in, 0, 1, "the kind of weights");
    m->vocab_size = read_count(in, 1, 1 << 26, "the size of the vocabulary");
    m->d_model = read_count(in, 1, 1 << 20, "the width of the model");
    m->n_layers = read_count(in, 1, 1 << 16, "the number of layers");
    m->max_positions = read_count(in, 1, INT32_MAX, "the length of the context");
    m->embedding_scale = read_float(in);
    m->head_scale = read_float(in);
    m->head_softcap = read_float(in);
    m->n_ropes = read_count(in, 0, 64, "the number of ropes");
    m->ropes = allocate((size_t)m->n_ropes, sizeof(Rope));
    for (int i = 0; i < m->n_ropes; ++i) {
        Rope *rope = &m->ropes[i];
        rope->pairs = read_count(in, 1, 1 << 16, "the size of a rope");
        rope->size = read_float(in);
        rope->frequencies = read_floats(in, (size_t)rope->pairs);
        rope->cosines = allocate((size_t)BATCH * rope->pairs, 4);
        rope->sines = allocate((size_t)BATCH * rope->pairs, 4);
    }
    m->embedding = read_matrix(in, is_int8, m->vocab_size, m->d_model);
    if (read_count(in, 0, 1, "a flag of positions")) {
        m->positions = read_floats(in, (size_t)m->max_positions * m->d_model);
    }
    m->norm_embedding = read_norm(in, m->d_model);
    m->layers = allocate((size_t)m->n_layers, sizeof(Layer));
    m->widest_ff = 1;
    for (int i = 0; i < m->n_layers; ++i) {
        Layer *layer = &m->layers[i];
        layer->around_attention = read_norms(in, m->d_model);
        read_attention(in, m, &layer->attention, is_int8);
        layer->around_ffn = read_norms(in, m->d_model);
        read_ffn(in, m, &layer->ffn, is_int8);
    }
    m->norm_final = read_norm(in, m->d_model);
    m->head = read_count(in, 0, 1, "a flag of the head") ? read_matrix(in, is_int8, m->vocab_size, m->d_model)
                                                         : m->embedding;
    m->head_bias = read_bias(in, m->vocab_size);
    if (fgetc(in->file) != EOF) fail("%s: the file goes on behind its end; copy or export it again", in->name);
}

/* Room for a text of `capacity` tokens. */
static void make_room(Model *m, int capacity) {
    m->capacity = (capacity + LANES - 1) / LANES * LANES;
    for (int i = 0; i < m->n_layers; ++i) {
        Attention *a = &m->layers[i].attention;
        a->keys = allocate((size_t)a->n_groups * a->size * m->capacity, 4);
        a->values = allocate((size_t)a->n_groups * a->size * m->capacity, 4);
    }
    m->x = allocate((size_t)BATCH * m->d_model, 4);
    m->y = allocate((size_t)BATCH * m->d_model, 4);
    m->mixed = allocate((size_t)BATCH * m->d_model, 4);
    m->qkv = allocate((size_t)BATCH * m->widest_qkv, 4);
    m->hidden = allocate((size_t)BATCH * 2 * m->widest_ff, 4);
    m->scores = allocate((size_t)m->most_heads * m->capacity, 4);
    m->logits = allocate((size_t)m->vocab_size, 4);
    m->shares = allocate((size_t)BATCH * m->most_experts, 4);
    m->weights = allocate((size_t)m->most_experts, 4);
    m->chosen = allocate((size_t)m->most_experts, sizeof(int));
    m->in_model = new_input(m->d_model);
    m->in_heads = new_input(m->widest_heads);
    m->in_ff = new_input(m->widest_ff);
}

static void normalize(float *out, const float *x, const Norm *norm, int n) {
    if (norm->kind == NORM_NONE) {
        if (out != x) memcpy(out, x, (size_t)n * sizeof(float));
        return;
    }
    float mean = 0.0f;
    if (norm->kind == NORM_LAYER) {
        for (int i = 0; i < n; ++i) mean += x[i];
        mean /= (float)n;
        for (int i = 0; i < n; ++i) out[i] = x[i] - mean;
        x = out;
    }
    const float factor = 1.0f / sqrtf(dot(x, x, n) / (float)n + norm->eps);
    for (int i = 0; i < n; ++i) out[i] = x[i] * factor * norm->weight[i];
    for (int i = 0; norm->bias && i < n; ++i) out[i] += norm->bias[i];
}

static void add(float *x, const float *y, int n) {
    for (int i = 0; y && i < n; ++i) x[i] += y[i];
}

static void turn(Model *m, int first, int count) {
    for (int r = 0; r < m->n_ropes; ++r) {
        const Rope *rope = &m->ropes[r];
        for (int i = 0; i < count * rope->pairs; ++i) {
            const float angle = (float)(first + i / rope->pairs) * rope->frequencies[i % rope->pairs];
            rope->cosines[i] = cosf(angle) * rope->size;
            rope->sines[i] = sinf(angle) * rope->size;
        }
    }
}

/* One head: element i turns together with element i + pairs. */
static void rotate(float *x, const Rope *rope, int t) {
    const float *cosines = rope->cosines + (size_t)t * rope->pairs, *sines = rope->sines + (size_t)t * rope->pairs;
    float *y = x + rope->pairs;
    for (int i = 0; i < rope->pairs; ++i) {
        const float a = x[i], b = y[i];
        x[i] = a * cosines[i] - b * sines[i];
        y[i] = b * cosines[i] + a * sines[i];
    }
}

static void softmax(float *x, int n) {
    const float most = largest(x, n);
    float lanes[LANES] = {0}, sum = 0.0f;
    int i = 0;
    for (int j = 0; j < n; ++j) x[j] -= most;
    exponentials(x, n);
    for (; i + LANES <= n; i += LANES) {
        for (int k = 0; k < LANES; ++k) lanes[k] += x[i + k];
    }
    for (; i < n; ++i) sum += x[i];
    const float factor = 1.0f / (sum + sum_of_lanes(lanes));
    for (int j = 0; j < n; ++j) x[j] *= factor;
}

/* What one query makes of the keys and values of positions [first, last]. */
static void attend(float *restrict out, const float *q, const Attention *a, int group, int first, int last,
                   int capacity, float *restrict scores) {
    const float *keys = a->keys + (size_t)group * a->size * capacity + first;
    const float *values = a->values + ((size_t)group * capacity + first) * a->size;
    const int n = last - first + 1, size = a->size;
    int i = 0, t = 0;
    for (int j = 0; j < n; ++j) scores[j] = 0.0f;
    for (; i + 4 <= size; i += 4) {
        const float *k0 = keys + (size_t)i * capacity, *k1 = k0 + capacity, *k2 = k1 + capacity, *k3 = k2 + capacity;
        const float q0 = q[i] * a->scale, q1 = q[i + 1] * a->scale, q2 = q[i + 2] * a->scale, q3 = q[i + 3] * a->scale;
        for (int j = 0; j < n; ++j) scores[j] += (q0 * k0[j] + q1 * k1[j]) + (q2 * k2[j] + q3 * k3[j]);
    }
    for (; i < size; ++i) {
        for (int j = 0; j < n; ++j) scores[j] += q[i] * a->scale * keys[(size_t)i * capacity + j];
    }
    for (int j = 0; a->softcap > 0.0f && j < n; ++j) scores[j] = a->softcap * tanhf(scores[j] / a->softcap);
    softmax(scores, n);
    for (int j = 0; j < size; ++j) out[j] = 0.0f;
    for (; t + 4 <= n; t += 4) {
        const float *v = values + (size_t)t * size;
        const float s0 = scores[t], s1 = scores[t + 1], s2 = scores[t + 2], s3 = scores[t + 3];
        for (int j = 0; j < size; ++j) {
            out[j] += (s0 * v[j] + s1 * v[j + size]) + (s2 * v[j + 2 * size] + s3 * v[j + 3 * size]);
        }
    }
    for (; t < n; ++t) {
        for (int j = 0; j < size; ++j) out[j] += scores[t] * values[(size_t)t * size + j];
    }
}

/* Adds keys and values of a token to the cache. */
static void remember(const Attention *a, const float *k, const float *v, int position, int capacity) {
    for (int g = 0; g < a->n_groups; ++g) {
        for (int j = 0; j < a->size; ++j) {
            a->keys[((size_t)g * a->size + j) * capacity + position] = k[g * a->size + j];
            a->values[((size_t)g * capacity + position) * a->size + j] = v[g * a->size + j];
        }
    }
}

static void run_attention(Model *m, const Attention *a, int position, int count) {
    const int heads = a->n_heads * a->size, groups = a->n_groups * a->size, width = heads + 2 * groups;
    multiply(m->qkv, width, &a->qkv, &m->in_model, count);
    m->in_heads.stride = a->out.stride;
    memset(m->in_heads.f, 0, (size_t)count * m->in_heads.stride * sizeof(float));
    for (int t = 0; t < count; ++t) {
        float *q = m->qkv + (size_t)t * width, *k = q + heads;
        add(q, a->qkv_bias, width);
        if (a->qk_norm == QK_PROJECTION) {
            normalize(q, q, &a->q_norm, heads);
            normalize(k, k, &a->k_norm, groups);
        }
        for (int h = 0; h < a->n_heads + a->n_groups; ++h) {
            float *head = q + (size_t)h * a->size; /* the heads of k follow those of q */
            if (a->qk_norm == QK_HEAD) normalize(head, head, h < a->n_heads ? &a->q_norm : &a->k_norm, a->size);
            if (a->rope >= 0) rotate(head, &m->ropes[a->rope], t);
        }
        remember(a, k, k + groups, position + t, m->capacity);
    }
#ifdef _OPENMP
#pragma omp parallel for if ((size_t)(position + count) * heads > 65536)
#endif
    for (int h = 0; h < a->n_heads; ++h) {
        for (int t = 0; t < count; ++t) {
            const int last = position + t, first = a->window && last >= a->window ? last - a->window + 1 : 0;
            attend(m->in_heads.f + (size_t)t * m->in_heads.stride + (size_t)h * a->size,
                   m->qkv + (size_t)t * width + (size_t)h * a->size, a, h / (a->n_heads / a->n_groups), first, last,
                   m->capacity, m->scores + (size_t)h * m->capacity);
        }
    }
    multiply(m->y, m->d_model, &a->out, &m->in_heads, count);
    for (int t = 0; t < count; ++t) add(m->y + (size_t)t * m->d_model, a->out_bias, m->d_model);
}

/* out = activation(x), times `by` where there is such. */
static void activate(float *restrict out, const float *restrict x, const float *restrict by, int n, int kind) {
    if (kind == SILU || kind == GELU_TANH) { /* x (1 + tanh(u)) / 2 is x / (1 + e^(-2u)) */
        for (int i = 0; i < n; ++i) out[i] = kind == SILU ? -x[i] : -1.59576912f * (x[i] + 0.044715f * x[i] * x[i] * x[i]);
        exponentials(out, n);
        for (int i = 0; i < n; ++i) out[i] = x[i] / (1.0f + out[i]);
    }
    for (int i = 0; kind == GELU && i < n; ++i) out[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678f));
    for (int i = 0; kind == RELU && i < n; ++i) out[i] = x[i] > 0.0f ? x[i] : 0.0f;
    for (int i = 0; by && i < n; ++i) out[i] *= by[i];
}

/* y = expert(x) for the tokens in `x`. */
static void run_expert(Model *m, const Ffn *f, const Expert *expert, Input *x, float *y, int count) {
    const int gated = f->kind != FFN_MLP, width = (1 + gated) * f->d_ff;
    multiply(m->hidden, width, &expert->up, x, count);
    m->in_ff.stride = expert->down.stride;
    for (int t = 0; t < count; ++t) {
        float *up = m->hidden + (size_t)t * width, *to = m->in_ff.f + (size_t)t * m->in_ff.stride;
        add(up, expert->up_bias, width);
        activate(to, up, gated ? up + f->d_ff : NULL, f->d_ff, f->activation);
        for (int i = f->d_ff; i < m->in_ff.stride; ++i) to[i] = 0.0f;
    }
    multiply(y, m->d_model, &expert->down, &m->in_ff, count);
    for (int t = 0; t < count; ++t) add(y + (size_t)t * m->d_model, expert->down_bias, m->d_model);
}

/* Each token through the experts that its router finds likeliest. */
static void run_experts(Model *m, const Ffn *f, int count) {
    multiply(m->shares, f->n_experts, &f->router, &m->in_model, count);
    for (int t = 0; t < count; ++t) {
        float *share = m->shares + (size_t)t * f->n_experts, *y = m->y + (size_t)t * m->d_model, total = 0.0f;
        Input x = m->in_model;
        x.f += (size_t)t * x.stride;
        softmax(share, f->n_experts);
        for (int n = 0; n < f->top_k; ++n) {
            int best = 0;
            for (int e = 1; e < f->n_experts; ++e) best = share[e] > share[best] ? e : best;
            m->chosen[n] = best;
            m->weights[n] = share[best];
            total += share[best];
            share[best] = -1.0f;
        }
        memset(y, 0, (size_t)m->d_model * sizeof(float));
        for (int n = 0; n < f->top_k; ++n) {
            const float weight = f->normalize ? m->weights[n] / total : m->weights[n];
            run_expert(m, f, &f->experts[m->chosen[n]], &x, m->mixed, 1);
            for (int i = 0; i < m->d_model; ++i) y[i] += weight * m->mixed[i];
        }
    }
}

static void into_branch(Model *m, const Norm *norm, int count) {
    for (int t = 0; t < count; ++t) {
        normalize(m->in_model.f + (size_t)t * m->in_model.stride, m->x + (size_t)t * m->d_model, norm, m->d_model);
    }
}

static void out_of_branch(Model *m, const Norms *norms, int count) {
    for (int t = 0; t < count; ++t) {
        float *x = m->x + (size_t)t * m->d_model, *y = m->y + (size_t)t * m->d_model;
        normalize(y, y, &norms->norm_out, m->d_model);
        add(x, y, m->d_model);
        normalize(x, x, &norms->norm_sum, m->d_model);
    }
}

/* Reads up to BATCH tokens, of which the first stands at `position`. */
static void read_tokens(Model *m, const int *tokens, int count, int position) {
    turn(m, position, count);
    for (int t = 0; t < count; ++t) {
        float *x = m->x + (size_t)t * m->d_model;
        copy_row(x, &m->embedding, tokens[t]);
        for (int i = 0; i < m->d_model; ++i) x[i] *= m->embedding_scale;
        if (m->positions) add(x, m->positions + (size_t)(position + t) * m->d_model, m->d_model);
        normalize(x, x, &m->norm_embedding, m->d_model);
    }
    for (int i = 0; i < m->n_layers; ++i) {
        const Layer *layer = &m->layers[i];
        into_branch(m, &layer->around_attention.norm_in, count);
        run_attention(m, &layer->attention, position, count);
        out_of_branch(m, &layer->around_attention, count);
        if (layer->ffn.kind == FFN_NONE) continue;
        into_branch(m, &layer->around_ffn.norm_in, count);
        if (layer->ffn.kind == FFN_EXPERTS) {
            run_experts(m, &layer->ffn, count);
        } else {
            run_expert(m, &layer->ffn, &layer->ffn.experts[0], &m->in_model, m->y, count);
        }
        out_of_branch(m, &layer->around_ffn, count);
    }
}

/* The logits behind token t of those that were read last. */
static const float *logits_of(Model *m, int t) {
    normalize(m->in_model.f, m->x + (size_t)t * m->d_model, &m->norm_final, m->d_model);
    for (int i = 0; i < m->d_model; ++i) m->in_model.f[i] *= m->head_scale;
    multiply(m->logits, m->vocab_size, &m->head, &m->in_model, 1);
    add(m->logits, m->head_bias, m->vocab_size);
    for (int i = 0; m->head_softcap > 0.0f && i < m->vocab_size; ++i) {
        m->logits[i] = m->head_softcap * tanhf(m->logits[i] / m->head_softcap);
    }
    return m->logits;
}

/* ---- the tokenizer ---------------------------------------------------------------------------------------------------- */

enum { TOKENIZER_NONE, TOKENIZER_BYTES, TOKENIZER_CHARACTERS, TOKENIZER_UNIGRAM };
enum { SPLIT_NONE, SPLIT_GPT2, SPLIT_CL100K, SPLIT_QWEN2, SPLIT_O200K, SPLIT_DIGITS, SPLIT_BEFORE_MARK, SPLIT_MARK_RUNS };
enum { STEP_PREPEND, STEP_REPLACE, STEP_TRIM, STEP_PREFIX_UNLESS, STEP_NFC };
enum { PREFIX_NEVER, PREFIX_FIRST, PREFIX_ALWAYS, PREFIX_SPACE };
enum { KIND_OTHER, KIND_LETTER, KIND_NUMBER, KIND_SPACE, KIND_NEWLINE };
enum { TRAIT_NONE, TRAIT_UPPER, TRAIT_LOWER, TRAIT_UNCASED, TRAIT_MARK, TRAIT_DIGIT };
enum { ADDED_LEFT = 1, ADDED_RIGHT = 2, ADDED_NORMALIZED = 4 };

#define POINTS 0x110000u
#define MARK "\xe2\x96\x81" /* U+2581, which stands for a space */

typedef unsigned char Byte;

typedef struct {
    Byte *bytes;
    size_t size, room;
} Text;

typedef struct {
    int *ids;
    size_t count, room;
} Ids;

typedef struct {
    Text content; /* as it is looked for */
    int id, flags;
} Added;

typedef struct {
    int kind;
    Text from, to;
    int n_texts;
    Text *texts;
} Step;

typedef struct {
    uint32_t point, first, second; /* second 0: it becomes another character alone */
    int composes;
} Decomposition;

typedef struct {
    uint64_t key; /* a pair of ids, or a hash of bytes */
    int value, rank;
} Entry;

/* Open addressing; `value` -1 is a free place. */
typedef struct {
    Entry *entries;
    uint64_t mask;
} Table;

typedef struct {
    int kind, n_tokens, split, prefix, stripped, unknown, fuse_unknown, whole_words, n_added, n_steps, n_front, n_back;
    int start, n_decompositions, n_pieces;
    size_t longest_piece;
    Text *tokens;    /* the bytes that each stands for in a text */
    Byte *skipped;   /* special tokens, which are not shown */
    int byte_ids[256];
    Table merges, characters, words;
    Added *added;
    Step *steps;
    Text *pieces;
    int *piece_ids;
    double *piece_scores, unknown_score;
    int *front, *back;
    Byte *kinds, *traits, *classes; /* by code point */
    Decomposition *decompositions;
} Tokenizer;

static void append(Text *text, const void *bytes, size_t size) {
    if (text->size + size + 1 > text->room) {
        text->room = 2 * (text->size + size + 1);
        text->bytes = grown(text->bytes, text->room, 1);
    }
    if (size) memcpy(text->bytes + text->size, bytes, size);
    text->size += size;
    text->bytes[text->size] = 0;
}

static void push(Ids *ids, int id) {
    if (ids->count == ids->room) {
        ids->room = 2 * ids->room + 64;
        ids->ids = grown(ids->ids, ids->room, sizeof(int));
    }
    ids->ids[ids->count++] = id;
}

static uint64_t mixed(uint64_t key) {
    key ^= key >> 33;
    key *= 0xff51afd7ed558ccdu;
    key ^= key >> 33;
    key *= 0xc4ceb9fe1a85ec53u;
    return key ^ key >> 33;
}

static Table new_table(size_t count) {
    Table table;
    size_t size = 16;
    while (size < 2 * count) size *= 2;
    table.entries = allocate(size, sizeof(Entry));
    table.mask = size - 1;
    for (size_t i = 0; i < size; ++i) table.entries[i].value = -1;
    return table;
}

static void put(Table *table, uint64_t key, int value, int rank) {
    uint64_t i = mixed(key) & table->mask;
    while (table->entries[i].value >= 0 && table->entries[i].key != key) i = (i + 1) & table->mask;
    if (table->entries[i].value >= 0) return;
    table->entries[i].key = key;
    table->entries[i].value = value;
    table->entries[i].rank = rank;
}

static const Entry *get(const Table *table, uint64_t key) {
    for (uint64_t i = mixed(key) & table->mask; table->entries[i].value >= 0; i = (i + 1) & table->mask) {
        if (table->entries[i].key == key) return &table->entries[i];
    }
    return NULL;
}

static uint64_t pair(int left, int right) { return (uint64_t)(uint32_t)left << 32 | (uint32_t)right; }

static uint64_t hash(const Byte *bytes, size_t size) {
    uint64_t value = 0xcbf29ce484222325u; /* FNV-1a */
    for (size_t i = 0; i < size; ++i) value = (value ^ bytes[i]) * 0x100000001b3u;
    return value;
}

/* The code point at p < end and its bytes; a byte that begins no whole character is one alone. */
static uint32_t point_at(const Byte *p, const Byte *end, int *size) {
    const int n = *p < 0xc0 ? 1 : *p < 0xe0 ? 2 : *p < 0xf0 ? 3 : 4;
    *size = 1;
    if (*p < 0x80) return *p;
    if (n == 1 || end - p < n) return POINTS;
    uint32_t point = *p & (0x7fu >> n);
    for (int i = 1; i < n; ++i) point = point << 6 | (p[i] & 0x3fu);
    *size = n;
    return point < POINTS ? point : POINTS;
}

static void append_point(Text *text, uint32_t point) {
    Byte b[4] = {(Byte)point, 0, 0, 0};
    int n = point < 0x80 ? 1 : point < 0x800 ? 2 : point < 0x10000 ? 3 : 4;
    for (int i = n - 1; n > 1 && i > 0; --i, point >>= 6) b[i] = (Byte)(0x80u | (point & 0x3fu));
    if (n > 1) b[0] = (Byte)((0xf00u >> n & 0xffu) | point);
    append(text, b, (size_t)n);
}

static Text read_text(Reader *in) {
    Text text = {NULL, 0, 0};
    const size_t size = read_word(in);
    expect(in, size, 1);
    append(&text, "", 0);
    text.bytes = grown(text.bytes, size + 1, 1);
    read_bytes(in, text.bytes, size);
    text.bytes[size] = 0;
    text.size = size;
    text.room = size + 1;
    return text;
}

static int read_id(Reader *in, const Tokenizer *t) {
    return read_count(in, 0, (uint32_t)t->n_tokens, "the id of a token") - 1; /* -1: none */
}

static int *read_ids(Reader *in, const Tokenizer *t, int *count) {
    *count = read_count(in, 0, 1 << 16, "a number of tokens");
    int *ids = allocate((size_t)*count, sizeof(int));
    for (int i = 0; i < *count; ++i) ids[i] = read_id(in, t);
    return ids;
}

/* Ranges of code points, each with its class. */
static Byte *read_classes(Reader *in) {
    const int count = read_count(in, 0, POINTS, "a number of ranges of characters");
    if (!count) return NULL;
    expect(in, (size_t)count, 12);
    Byte *classes = allocate(POINTS + 1, 1);
    for (int i = 0; i < count; ++i) {
        const uint32_t first = read_word(in), last = read_word(in), value = read_word(in);
        if (last >= POINTS) fail("%s: a range of characters ends at %lu", in->name, (unsigned long)last);
        for (uint32_t point = first; point <= last; ++point) classes[point] = (Byte)value;
    }
    return classes;
}

static void read_added(Reader *in, Tokenizer *t) {
    t->n_added = read_count(in, 0, 1 << 24, "a number of added tokens");
    expect(in, (size_t)t->n_added, 12);
    t->added = allocate((size_t)t->n_added, sizeof(Added));
    for (int i = 0; i < t->n_added; ++i) {
        t->added[i].id = read_id(in, t);
        t->added[i].flags = read_count(in, 0, 7, "the flags of a token");
        t->added[i].content = read_text(in);
    }
}

static void read_steps(Reader *in, Tokenizer *t) {
    t->n_steps = read_count(in, 0, 64, "a number of steps of normalization");
    t->steps = allocate((size_t)t->n_steps, sizeof(Step));
    for (int i = 0; i < t->n_steps; ++i) {
        Step *step = &t->steps[i];
        step->kind = read_count(in, STEP_PREPEND, STEP_NFC, "a step of normalization");
        if (step->kind == STEP_REPLACE) step->from = read_text(in);
        if (step->kind == STEP_REPLACE && !step->from.size) fail("%s: an empty text is to be replaced", in->name);
        if (step->kind == STEP_PREPEND || step->kind == STEP_REPLACE) step->to = read_text(in);
        if (step->kind != STEP_PREFIX_UNLESS) continue;
        step->n_texts = read_count(in, 0, 1 << 24, "a number of symbols");
        expect(in, (size_t)step->n_texts, 4);
        step->texts = allocate((size_t)step->n_texts, sizeof(Text));
        for (int j = 0; j < step->n_texts; ++j) step->texts[j] = read_text(in);
    }
    t->n_decompositions = read_count(in, 0, 1 << 20, "a number of decompositions");
    expect(in, (size_t)t->n_decompositions, 16);
    t->decompositions = allocate((size_t)t->n_decompositions, sizeof(Decomposition));
    for (int i = 0; i < t->n_decompositions; ++i) {
        Decomposition *d = &t->decompositions[i];
        d->point = read_word(in);
        d->first = read_word(in);
        d->second = read_word(in);
        d->composes = read_count(in, 0, 1, "a flag of a decomposition");
    }
    t->classes = read_classes(in);
}

static void read_merges(Reader *in, Tokenizer *t) {
    const int count = read_count(in, 0, INT32_MAX / 2, "a number of merges");
    expect(in, (size_t)count, 12);
    t->merges = new_table((size_t)count);
    for (int rank = 0; rank < count; ++rank) {
        const int left = read_id(in, t), right = read_id(in, t), joined = read_id(in, t);
        if (left < 0 || right < 0 || joined < 0) fail("%s: a merge of no tokens", in->name);
        put(&t->merges, pair(left, right), joined, rank);
    }
}

static void read_pieces(Reader *in, Tokenizer *t) {
    t->unknown_score = read_double(in);
    t->n_pieces = read_count(in, 0, 1 << 26, "a number of pieces");
    expect(in, (size_t)t->n_pieces, 16);
    t->pieces = allocate((size_t)t->n_pieces, sizeof(Text));
    t->piece_ids = allocate((size_t)t->n_pieces, sizeof(int));
    t->piece_scores = allocate((size_t)t->n_pieces, sizeof(double));
    t->words = new_table((size_t)t->n_pieces);
    for (int i = 0; i < t->n_pieces; ++i) {
        t->piece_ids[i] = read_id(in, t);
        t->piece_scores[i] = read_double(in);
        t->pieces[i] = read_text(in);
        if (t->pieces[i].size > t->longest_piece) t->longest_piece = t->pieces[i].size;
        put(&t->words, hash(t->pieces[i].bytes, t->pieces[i].size), i, 0);
    }
}

static void read_tokenizer(Reader *in, Tokenizer *t) {
    t->kind = read_count(in, TOKENIZER_NONE, TOKENIZER_UNIGRAM, "the kind of tokenizer");
    if (t->kind == TOKENIZER_NONE) return;
    t->n_tokens = read_count(in, 1, 1 << 26, "the number of tokens");
    expect(in, (size_t)t->n_tokens, 8);
    t->tokens = allocate((size_t)t->n_tokens, sizeof(Text));
    t->skipped = allocate((size_t)t->n_tokens, 1);
    for (int i = 0; i < t->n_tokens; ++i) {
        t->skipped[i] = (Byte)read_count(in, 0, 1, "a flag of a token");
        t->tokens[i] = read_text(in);
    }
    for (int i = 0; i < 256; ++i) t->byte_ids[i] = read_id(in, t);
    t->split = read_count(in, SPLIT_NONE, SPLIT_MARK_RUNS, "how words are split");
    t->prefix = read_count(in, PREFIX_NEVER, PREFIX_SPACE, "how words begin");
    t->stripped = read_count(in, 0, 1 << 16, "a number of spaces");
    t->unknown = read_id(in, t);
    t->fuse_unknown = read_count(in, 0, 1, "a flag of the tokenizer");
    t->whole_words = read_count(in, 0, 1, "a flag of the tokenizer");
    t->start = read_id(in, t);
    t->front = read_ids(in, t, &t->n_front);
    t->back = read_ids(in, t, &t->n_back);
    read_added(in, t);
    read_steps(in, t);
    t->kinds = read_classes(in);
    t->traits = read_classes(in);
    read_merges(in, t);
    const int n_characters = read_count(in, 0, 1 << 26, "a number of characters");
    expect(in, (size_t)n_characters, 8);
    t->characters = new_table((size_t)n_characters);
    for (int i = 0; i < n_characters; ++i) {
        const uint32_t point = read_word(in);
        put(&t->characters, point, read_id(in, t), 0);
    }
    read_pieces(in, t);
}

/* -- normalization: canonical composition (Unicode's form NFC), with the tables of the file -- */

typedef struct {
    uint32_t *points;
    size_t count, room;
} Points;

static void push_point(Points *points, uint32_t point) {
    if (points->count == points->room) {
        points->room = 2 * points->room + 64;
        points->points = grown(points->points, points->room, sizeof(uint32_t));
    }
    points->points[points->count++] = point;
}

static void decompose(const Tokenizer *t, Points *to, uint32_t point) {
    if (point >= 0xac00 && point < 0xac00 + 11172) { /* a Hangul syllable, by rule */
        const uint32_t n = point - 0xac00;
        push_point(to, 0x1100 + n / 588);
        push_point(to, 0x1161 + n % 588 / 28);
        if (n % 28) push_point(to, 0x11a7 + n % 28);
        return;
    }
    int low = 0, high = t->n_decompositions;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (t->decompositions[middle].point < point) low = middle + 1;
        else high = middle;
    }
    if (low == t->n_decompositions || t->decompositions[low].point != point) {
        push_point(to, point);
        return;
    }
    /* what it becomes are smaller characters of the table or none, so this ends */
    const Decomposition *d = &t->decompositions[low];
    if (d->first == point || d->second == point) return;
    decompose(t, to, d->first);
    if (d->second) decompose(t, to, d->second);
}

static uint32_t composed(const Tokenizer *t, uint32_t first, uint32_t second) {
    if (first - 0x1100 < 19 && second - 0x1161 < 21) return 0xac00 + (first - 0x1100) * 588 + (second - 0x1161) * 28;
    if (first - 0xac00 < 11172 && (first - 0xac00) % 28 == 0 && second - 0x11a8 < 27) return first + second - 0x11a7;
    for (int i = 0; i < t->n_decompositions; ++i) {
        const Decomposition *d = &t->decompositions[i];
        if (d->composes && d->first == first && d->second == second) return d->point;
    }
    return 0;
}

static int class_of(const Tokenizer *t, uint32_t point) { return t->classes ? t->classes[point] : 0; }

static void compose(const Tokenizer *t, Text *text) {
    Points points = {NULL, 0, 0};
    const Byte *p = text->bytes, *end = p + text->size;
    size_t n = 0;
    int plain = 1, size;
    for (size_t i = 0; plain && i < text->size; ++i) plain = text->bytes[i] < 0xcc; /* nothing from U+0300 on */
    if (plain) return;
    for (; p < end; p += size) decompose(t, &points, point_at(p, end, &size));
    uint32_t *x = points.points;
    for (size_t i = 1; i < points.count; ++i) { /* marks behind a letter stand in the order of their classes */
        const uint32_t point = x[i];
        const int class = class_of(t, point);
        size_t j = i;
        for (; class && j > 0 && class_of(t, x[j - 1]) > class; --j) x[j] = x[j - 1];
        x[j] = point;
    }
    size_t starter = points.count;
    int last_class = 0;
    for (size_t i = 0; i < points.count; ++i) {
        const int class = class_of(t, x[i]);
        const int reaches = starter < n && (starter + 1 == n || (last_class < class && class));
        const uint32_t whole = reaches ? composed(t, x[starter], x[i]) : 0;
        if (whole) {
            x[starter] = whole;
            continue;
        }
        last_class = class;
        if (!class) starter = n;
        x[n++] = x[i];
    }
    text->size = 0;
    for (size_t i = 0; i < n; ++i) append_point(text, x[i]);
    free(points.points);
}

static int is_at(const Byte *p, const Byte *end, const Text *text) {
    return (size_t)(end - p) >= text->size && memcmp(p, text->bytes, text->size) == 0;
}

static void replace(Text *text, const Text *from, const Text *to) {
    Text made = {NULL, 0, 0};
    const Byte *p = text->bytes, *end = p + text->size;
    append(&made, "", 0);
    while (p < end) {
        const int found = is_at(p, end, from);
        append(&made, found ? to->bytes : p, found ? to->size : 1);
        p += found ? from->size : 1;
    }
    free(text->bytes);
    *text = made;
}

/* Spaces at the beginning, spaces and marks at the end, and all but one of several spaces go. */
static void trim(Text *text) {
    size_t n = 0, first = 0, last = text->size;
    const Byte *b = text->bytes;
    while (first < last && b[first] == ' ') ++first;
    while (last > first) {
        if (b[last - 1] == ' ') last -= 1;
        else if (last - first >= 3 && memcmp(b + last - 3, MARK, 3) == 0) last -= 3;
        else break;
    }
    for (size_t i = first; i < last; ++i) {
        if (b[i] != ' ' || i == first || b[i - 1] != ' ') text->bytes[n++] = b[i];
    }
    text->size = n;
}

static void prepend(Text *text, const Text *prefix) {
    Text made = {NULL, 0, 0};
    append(&made, prefix->bytes, prefix->size);
    append(&made, text->bytes, text->size);
    free(text->bytes);
    *text = made;
}

static void normalize_text(const Tokenizer *t, Text *text) {
    Byte mark_bytes[] = MARK;
    const Text mark = {mark_bytes, 3, 4};
    for (int i = 0; i < t->n_steps; ++i) {
        const Step *step = &t->steps[i];
        int is_symbol = 0;
        for (int j = 0; j < step->n_texts && !is_symbol; ++j) {
            is_symbol = step->texts[j].size == text->size && is_at(text->bytes, text->bytes + text->size, &step->texts[j]);
        }
        if (step->kind == STEP_NFC) compose(t, text);
        if (step->kind == STEP_TRIM) trim(text);
        if (step->kind == STEP_REPLACE) replace(text, &step->from, &step->to);
        if (step->kind == STEP_PREPEND && text->size) prepend(text, &step->to);
        if (step->kind == STEP_PREFIX_UNLESS && text->size && !is_symbol) prepend(text, &mark);
    }
}

/* -- words: where the regular expressions of the known tokenizers cut a text, one word at a time -- */

typedef struct {
    int kind, trait, size;
} Char;

static Char char_at(const Tokenizer *t, const Byte *p, const Byte *end) {
    Char c;
    const uint32_t point = point_at(p, end, &c.size);
    c.kind = t->kinds ? t->kinds[point] : KIND_OTHER;
    c.trait = t->traits ? t->traits[point] : TRAIT_NONE;
    return c;
}

static const Byte *skip(const Tokenizer *t, const Byte *p, const Byte *end, int kind) {
    while (p < end) {
        const Char c = char_at(t, p, end);
        if (c.kind != kind) break;
        p += c.size;
    }
    return p;
}

/* \s*[\r\n]+ (where asked) | \s+(?!\S) | \s+: a run of white space leaves its last character to what follows it. */
static const Byte *skip_spaces(const Tokenizer *t, const Byte *p, const Byte *end, int end_at_newline) {
    const Byte *last = p, *next = p, *after_newline = NULL;
    while (next < end) {
        const Char c = char_at(t, next, end);
        if (c.kind < KIND_SPACE) break;
        last = next;
        next += c.size;
        if (c.kind == KIND_NEWLINE) after_newline = next;
    }
    if (end_at_newline && after_newline) return after_newline;
    return next == end || last == p ? next : last;
}

/* Bytes of s|t|re|ve|m|ll|d at p, else 0; in any case where asked (the long s U+017F is an s then). */
static int contraction(const Byte *p, const Byte *end, int any_case) {
    if (p == end) return 0;
    const int bit = any_case ? 0x20 : 0, a = *p | bit;
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 1;
    if (end - p < 2) return 0;
    if (any_case && *p == 0xc5 && p[1] == 0xbf) return 2;
    const int b = p[1] | bit;
    return ((a == 'r' || a == 'v') && b == 'e') || (a == 'l' && b == 'l') ? 2 : 0;
}

/* \p{N}{1,most} of which the first is in front of p. */
static const Byte *skip_digits(const Tokenizer *t, const Byte *p, const Byte *end, int most) {
    for (int n = 1; n < most && p < end; ++n) {
        const Char c = char_at(t, p, end);
        if (c.kind != KIND_NUMBER) break;
        p += c.size;
    }
    return p;
}

static const Byte *gpt2_word(const Tokenizer *t, const Byte *p, const Byte *end) {
    const int short_form = *p == '\'' ? contraction(p + 1, end, 0) : 0;
    if (short_form) return p + 1 + short_form;
    const Byte *q = p + (*p == ' ' && end - p > 1);
    const Char c = char_at(t, q, end);
    return c.kind >= KIND_SPACE ? skip_spaces(t, p, end, 0) : skip(t, q + c.size, end, c.kind);
}

static const Byte *cl100k_word(const Tokenizer *t, const Byte *p, const Byte *end, int most_digits) {
    const int short_form = *p == '\'' ? contraction(p + 1, end, 1) : 0;
    if (short_form) return p + 1 + short_form;
    const Char first = char_at(t, p, end);
    const Byte *q = p + first.size, *marks = first.kind == KIND_OTHER ? q : NULL;
    if (first.kind == KIND_LETTER) return skip(t, q, end, KIND_LETTER);
    if (first.kind == KIND_NUMBER) return skip_digits(t, q, end, most_digits);
    if (first.kind != KIND_NEWLINE && q < end) {
        const Char second = char_at(t, q, end);
        if (second.kind == KIND_LETTER) return skip(t, q + second.size, end, KIND_LETTER);
        if (*p == ' ' && second.kind == KIND_OTHER) marks = q + second.size;
    }
    return marks ? skip(t, skip(t, marks, end, KIND_OTHER), end, KIND_NEWLINE) : skip_spaces(t, p, end, 1);
}

static int may_be(int trait, int case_of) {
    return trait == case_of || trait == TRAIT_UNCASED || trait == TRAIT_MARK;
}

/* [upper]*[lower]+ or, where that finds nothing and is allowed to, [upper]+, with a contraction; NULL where neither is. */
static const Byte *cased_word(const Tokenizer *t, const Byte *p, const Byte *end, int allow_upper) {
    const Byte *start = p, *after_lower = NULL;
    int trait = TRAIT_NONE;
    while (p < end) {
        const Char c = char_at(t, p, end);
        trait = c.trait;
        if (!may_be(trait, TRAIT_UPPER)) break;
        p += c.size;
        if (may_be(trait, TRAIT_LOWER)) after_lower = p;
    }
    if (p < end && trait == TRAIT_LOWER) {
        for (Char c = char_at(t, p, end); p < end && may_be(c.trait, TRAIT_LOWER);) {
            p += c.size;
            if (p < end) c = char_at(t, p, end);
        }
        after_lower = p;
    }
    if (after_lower) p = after_lower;
    else if (!allow_upper || p == start) return NULL;
    const int short_form = p < end && *p == '\'' ? contraction(p + 1, end, 1) : 0;
    return short_form ? p + 1 + short_form : p;
}

static const Byte *o200k_other(const Tokenizer *t, const Byte *p, const Byte *end) {
    p = skip(t, p, end, KIND_OTHER);
    while (p < end && (*p == '\r' || *p == '\n' || *p == '/')) ++p;
    return p;
}

static const Byte *o200k_word(const Tokenizer *t, const Byte *p, const Byte *end) {
    const Char first = char_at(t, p, end);
    const Byte *q = p + first.size;
    if (first.kind == KIND_NUMBER) return skip_digits(t, q, end, 3);
    if (first.kind == KIND_NEWLINE) return skip_spaces(t, p, end, 1);
    const int is_mark = first.kind == KIND_OTHER && first.trait == TRAIT_MARK;
    const Byte *stop = first.kind == KIND_LETTER ? NULL : cased_word(t, q, end, !is_mark);
    if (stop) return stop;
    if (first.kind == KIND_LETTER || is_mark) return cased_word(t, p, end, 1);
    if (first.kind == KIND_OTHER) return o200k_other(t, q, end);
    if (*p == ' ' && q < end) {
        const Char second = char_at(t, q, end);
        if (second.kind == KIND_OTHER) return o200k_other(t, q + second.size, end);
    }
    return skip_spaces(t, p, end, 1);
}

static int is_digit(const Char *c, Byte first) { return first < 0x80 ? c->kind == KIND_NUMBER : c->trait == TRAIT_DIGIT; }

/* GPT-2's words of the stretches between digits, each of which stands alone. */
static const Byte *digits_word(const Tokenizer *t, const Byte *p, const Byte *end) {
    Char c = char_at(t, p, end);
    if (is_digit(&c, *p)) return p + c.size;
    const Byte *stop = p;
    while (stop < end) {
        c = char_at(t, stop, end);
        if (is_digit(&c, *stop)) break;
        stop += c.size;
    }
    return gpt2_word(t, p, stop);
}

/* In front of a mark (each, or each run of them). */
static const Byte *mark_word(const Byte *p, const Byte *end, int runs) {
    const Byte *q = p;
    while (runs && end - q >= 3 && memcmp(q, MARK, 3) == 0) q += 3;
    for (q += q == p; q < end && !(end - q >= 3 && memcmp(q, MARK, 3) == 0);) ++q;
    return q;
}

static const Byte *next_word(const Tokenizer *t, const Byte *p, const Byte *end) {
    switch (t->split) {
    case SPLIT_GPT2: return gpt2_word(t, p, end);
    case SPLIT_CL100K: return cl100k_word(t, p, end, 3);
    case SPLIT_QWEN2: return cl100k_word(t, p, end, 1);
    case SPLIT_O200K: return o200k_word(t, p, end);
    case SPLIT_DIGITS: return digits_word(t, p, end);
    case SPLIT_BEFORE_MARK: return mark_word(p, end, 0);
    case SPLIT_MARK_RUNS: return mark_word(p, end, 1);
    default: return end;
    }
}

/* -- byte pair encoding: the pair of the lowest rank joins, the leftmost of equals, until none is left -- */

typedef struct {
    int id, before, after; /* places of the neighbours, -1 at an end */
} Symbol;

typedef struct {
    int rank, place, left, right, joined;
} Candidate;

typedef struct {
    Candidate *items;
    size_t count, room;
} Heap;

static int comes_first(const Candidate *a, const Candidate *b) {
    return a->rank != b->rank ? a->rank < b->rank : a->place < b->place;
}

static void heap_push(Heap *heap, Candidate item) {
    if (heap->count == heap->room) {
        heap->room = 2 * heap->room + 64;
        heap->items = grown(heap->items, heap->room, sizeof(Candidate));
    }
    size_t i = heap->count++;
    for (; i && comes_first(&item, &heap->items[(i - 1) / 2]); i = (i - 1) / 2) heap->items[i] = heap->items[(i - 1) / 2];
    heap->items[i] = item;
}

static Candidate heap_pop(Heap *heap) {
    const Candidate top = heap->items[0], last = heap->items[--heap->count];
    size_t i = 0;
    for (size_t child = 1; child < heap->count; child = 2 * i + 1) {
        if (child + 1 < heap->count && comes_first(&heap->items[child + 1], &heap->items[child])) ++child;
        if (!comes_first(&heap->items[child], &last)) break;
        heap->items[i] = heap->items[child];
        i = child;
    }
    heap->items[i] = last;
    return top;
}

static void propose(const Tokenizer *t, Heap *heap, const Symbol *symbols, int place) {
    if (place < 0 || symbols[place].after < 0) return;
    const int left = symbols[place].id, right = symbols[symbols[place].after].id;
    const Entry *found = left < 0 || right < 0 ? NULL : get(&t->merges, pair(left, right));
    if (!found) return;
    const Candidate item = {found->rank, place, left, right, found->value};
    heap_push(heap, item);
}

static void merge(const Tokenizer *t, int *ids, size_t *count) {
    Heap heap = {NULL, 0, 0};
    Symbol *symbols = grown(NULL, *count, sizeof(Symbol));
    const int n = (int)*count;
    for (int i = 0; i < n; ++i) {
        const Symbol symbol = {ids[i], i - 1, i + 1 < n ? i + 1 : -1};
        symbols[i] = symbol;
    }
    for (int i = 0; i < n; ++i) propose(t, &heap, symbols, i);
    while (heap.count) {
        const Candidate best = heap_pop(&heap);
        Symbol *left = &symbols[best.place];
        if (left->id != best.left || left->after < 0 || symbols[left->after].id != best.right) continue; /* is no more */
        Symbol *right = &symbols[left->after];
        left->id = best.joined;
        left->after = right->after;
        right->id = -1;
        if (left->after >= 0) symbols[left->after].before = best.place;
        propose(t, &heap, symbols, left->before);
        propose(t, &heap, symbols, best.place);
    }
    *count = 0;
    for (int i = 0; i >= 0 && i < n; i = symbols[i].after) ids[(*count)++] = symbols[i].id;
    free(symbols);
    free(heap.items);
}

static void push_unknown(const Tokenizer *t, Ids *ids, size_t from) {
    if (t->unknown < 0) return;
    if (t->fuse_unknown && ids->count > from && ids->ids[ids->count - 1] == t->unknown) return;
    push(ids, t->unknown);
}

/* The bytes of a character that is no token; 0 where not every byte is one. */
static int push_bytes(const Tokenizer *t, Ids *ids, const Byte *p, int size) {
    for (int i = 0; i < size; ++i) {
        if (t->byte_ids[p[i]] < 0) return 0;
    }
    for (int i = 0; i < size; ++i) push(ids, t->byte_ids[p[i]]);
    return 1;
}

static void encode_word(const Tokenizer *t, const Byte *p, const Byte *end, Ids *ids) {
    const size_t from = ids->count;
    if (t->whole_words) {
        const Entry *found = get(&t->words, hash(p, (size_t)(end - p)));
        const Text *piece = found ? &t->pieces[found->value] : NULL;
        if (piece && piece->size == (size_t)(end - p) && is_at(p, end, piece)) {
            push(ids, t->piece_ids[found->value]);
            return;
        }
    }
    while (p < end) {
        int size = 1;
        if (t->kind == TOKENIZER_BYTES) {
            push(ids, t->byte_ids[*p]);
        } else {
            const uint32_t point = point_at(p, end, &size);
            const Entry *found = get(&t->characters, point);
            if (found) push(ids, found->value);
            else if (!push_bytes(t, ids, p, size)) push_unknown(t, ids, from);
        }
        p += size;
    }
    size_t count = ids->count - from;
    if (count > 1) merge(t, ids->ids + from, &count);
    ids->count = from + count;
}

/* -- unigram: the pieces of the largest sum of scores (Viterbi) -- */

typedef struct {
    double score;
    size_t start;
    int piece; /* -1: a character that is in no piece */
} Best;

static void encode_unigram(const Tokenizer *t, const Byte *p, const Byte *end, Ids *ids) {
    const size_t n = (size_t)(end - p);
    Best *best = grown(NULL, n + 1, sizeof(Best));
    for (size_t i = 0; i <= n; ++i) {
        best[i].score = i ? -1e300 : 0.0;
        best[i].start = 0;
        best[i].piece = -1;
    }
    int size;
    for (size_t i = 0; i < n; i += (size_t)size) {
        int has_single = 0;
        point_at(p + i, end, &size);
        for (size_t length = 1; length <= t->longest_piece && i + length <= n; ++length) {
            if (i + length < n && (p[i + length] & 0xc0) == 0x80) continue; /* inside of a character */
            const Entry *found = get(&t->words, hash(p + i, length));
            const Text *piece = found ? &t->pieces[found->value] : NULL;
            if (!piece || piece->size != length || !is_at(p + i, end, piece)) continue;
            const double score = best[i].score + t->piece_scores[found->value];
            if (score > best[i + length].score) {
                best[i + length].score = score;
                best[i + length].start = i;
                best[i + length].piece = found->value;
            }
            has_single |= length == (size_t)size;
        }
        const double score = best[i].score + t->unknown_score;
        if (!has_single && score > best[i + (size_t)size].score) {
            best[i + (size_t)size].score = score;
            best[i + (size_t)size].start = i;
            best[i + (size_t)size].piece = -1;
        }
    }
    /* the path, from its end; unknown characters side by side are one stretch */
    size_t n_cuts = 0, *cuts = grown(NULL, n + 1, sizeof(size_t));
    for (size_t at = n; at > 0; at = best[at].start) {
        if (best[at].piece < 0 && n_cuts && best[cuts[n_cuts - 1]].piece < 0) {
            best[cuts[n_cuts - 1]].start = best[at].start;
            continue;
        }
        cuts[n_cuts++] = at;
    }
    while (n_cuts--) {
        const Best *b = &best[cuts[n_cuts]];
        if (b->piece >= 0) push(ids, t->piece_ids[b->piece]);
        else if (!push_bytes(t, ids, p + b->start, (int)(cuts[n_cuts] - b->start))) push(ids, t->unknown);
    }
    free(best);
    free(cuts);
}

/* Text between added tokens, normalized. */
static void encode_plain(const Tokenizer *t, const Byte *p, const Byte *end, int is_first, Ids *ids) {
    Byte space_bytes[] = " ", mark_bytes[] = MARK;
    const Text space = {space_bytes, 1, 2}, mark = {mark_bytes, 3, 4};
    Text text = {NULL, 0, 0};
    if (p == end) return;
    append(&text, p, (size_t)(end - p));
    if (t->prefix == PREFIX_SPACE && text.bytes[0] != ' ') prepend(&text, &space);
    if (t->prefix == PREFIX_FIRST || t->prefix == PREFIX_ALWAYS) {
        replace(&text, &space, &mark);
        const int is_marked = is_at(text.bytes, text.bytes + text.size, &mark);
        if ((is_first || t->prefix == PREFIX_ALWAYS) && !is_marked) prepend(&text, &mark);
    }
    p = text.bytes;
    end = p + text.size;
    while (p < end) {
        const Byte *stop = next_word(t, p, end);
        if (t->kind == TOKENIZER_UNIGRAM) encode_unigram(t, p, stop, ids);
        else encode_word(t, p, stop, ids);
        p = stop;
    }
    free(text.bytes);
}

/* Behind the white space at p, or in front of that which ends at p. */
static const Byte *over_spaces(const Tokenizer *t, const Byte *p, const Byte *bound, int forward) {
    while (p != bound) {
        const Byte *q = forward ? p : p - 1;
        while (!forward && q > bound && (*q & 0xc0) == 0x80) --q;
        const Char c = char_at(t, q, forward ? bound : p);
        if (c.kind < KIND_SPACE) break;
        p = forward ? q + c.size : q;
    }
    return p;
}

/* Added tokens stand for themselves wherever they are written, the longest first: those that are looked for in the text
 * as it is, then the others in what lies between, once that is normalized. */
static void encode_with_added(const Tokenizer *t, const Byte *p, const Byte *end, int normalized, int is_first, Ids *ids) {
    const Byte *start = p, *from = p;
    while (p <= end) {
        const Added *found = NULL;
        for (int i = 0; p < end && i < t->n_added; ++i) {
            const Added *added = &t->added[i];
            const int fits = !!(added->flags & ADDED_NORMALIZED) == normalized && added->content.size;
            const int is_longer = !found || added->content.size > found->content.size;
            if (fits && is_longer && is_at(p, end, &added->content)) found = added;
        }
        if (!found && p < end) {
            ++p;
            continue;
        }
        const Byte *stop = found && found->flags & ADDED_LEFT ? over_spaces(t, p, from, 0) : p;
        if (normalized) {
            encode_plain(t, from, stop, is_first && from == start, ids);
        } else if (stop > from) {
            Text text = {NULL, 0, 0};
            append(&text, from, (size_t)(stop - from));
            normalize_text(t, &text);
            encode_with_added(t, text.bytes, text.bytes + text.size, 1, from == start, ids);
            free(text.bytes);
        }
        if (!found) break;
        push(ids, found->id);
        p += found->content.size;
        if (found->flags & ADDED_RIGHT) p = over_spaces(t, p, end, 1);
        from = p;
    }
}

/* The ids of a prompt; an empty one begins a new text. */
static Ids encode(const Tokenizer *t, const char *text) {
    Ids ids = {NULL, 0, 0};
    const Byte *bytes = (const Byte *)text;
    for (int i = 0; i < t->n_front; ++i) push(&ids, t->front[i]);
    encode_with_added(t, bytes, bytes + strlen(text), 0, 1, &ids);
    for (int i = 0; i < t->n_back; ++i) push(&ids, t->back[i]);
    if (!ids.count && t->start < 0) fail("the prompt is empty and the tokenizer has neither a BOS nor an EOS token");
    if (!ids.count) push(&ids, t->start);
    return ids;
}

/* -- ids to text, in whole characters: what is no UTF-8 becomes U+FFFD -- */

typedef struct {
    Byte bytes[4];
    int count, strip, shows;
} Decoder;

static void show(Decoder *d, const Byte *bytes, int count) {
    if (d->strip && count == 1 && *bytes == ' ') {
        --d->strip;
        return;
    }
    d->strip = 0;
    if (d->shows) fwrite(bytes, 1, (size_t)count, stdout);
}

static void show_broken(Decoder *d) {
    if (d->count) show(d, (const Byte *)"\xef\xbf\xbd", 3);
    d->count = 0;
}

static int is_continued(const Byte *b, int count, Byte next) {
    if (next < 0x80 || next > 0xbf) return 0;
    if (count > 1) return 1;
    if (*b == 0xe0) return next >= 0xa0;
    if (*b == 0xed) return next <= 0x9f;
    if (*b == 0xf0) return next >= 0x90;
    return *b != 0xf4 || next <= 0x8f;
}

static void decode_byte(Decoder *d, Byte byte) {
    if (d->count && !is_continued(d->bytes, d->count, byte)) show_broken(d);
    if (!d->count && byte < 0x80) {
        show(d, &byte, 1);
        return;
    }
    d->bytes[d->count++] = byte;
    const Byte first = d->bytes[0];
    const int size = first < 0xc2 || first > 0xf4 ? 0 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
    if (!size) {
        show_broken(d);
    } else if (d->count == size) {
        show(d, d->bytes, size);
        d->count = 0;
    }
}

static void decode(const Tokenizer *t, Decoder *d, int id) {
    if (id >= t->n_tokens || t->skipped[id]) return;
    for (size_t i = 0; i < t->tokens[id].size; ++i) decode_byte(d, t->tokens[id].bytes[i]);
}

/* ---- drawing tokens --------------------------------------------------------------------------------------------------- */

typedef struct {
    int max_new_tokens, top_k, ignore_eos, n_ends;
    float temperature, repetition_penalty, presence_penalty, frequency_penalty;
    double top_p, min_p;
    uint64_t seed;
    int *ends; /* tokens that end a text */
} Sampling;

typedef struct {
    float *scores, *sorted;
    int *counts; /* of each token in the new text */
    Byte *seen;  /* also in the prompt */
} Sampler;

static void read_sampling(Reader *in, Sampling *s) {
    s->max_new_tokens = read_count(in, 0, INT32_MAX, "a number of new tokens");
    s->top_k = read_count(in, 0, INT32_MAX, "top-k");
    s->temperature = read_float(in);
    s->repetition_penalty = read_float(in);
    s->presence_penalty = read_float(in);
    s->frequency_penalty = read_float(in);
    s->top_p = read_double(in);
    s->min_p = read_double(in);
    s->n_ends = read_count(in, 0, 1 << 16, "a number of tokens that end a text");
    s->ends = allocate((size_t)s->n_ends, sizeof(int));
    for (int i = 0; i < s->n_ends; ++i) s->ends[i] = read_count(in, 0, INT32_MAX, "the id of a token");

}

/* Philox4x32-10 (Salmon et al., SC'11): four random words for a token's block and position. */
static void random_words(uint64_t seed, uint32_t block, uint32_t position, uint32_t words[4]) {
    uint32_t a = block, b = position, c = 0, d = 0, key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; ++round, key0 += 0x9e3779b9u, key1 += 0xbb67ae85u) {
        const uint64_t p = (uint64_t)a * 0xd2511f53u, q = (uint64_t)c * 0xcd9e8d57u;
        a = (uint32_t)(q >> 32) ^ b ^ key0;
        b = (uint32_t)q;
        c = (uint32_t)(p >> 32) ^ d ^ key1;
        d = (uint32_t)p;
    }
    words[0] = a;
    words[1] = b;
    words[2] = c;
    words[3] = d;
}

static int descending(const void *a, const void *b) {
    const float x = *(const float *)a, y = *(const float *)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

/* The score that top-k, top-p and min-p ask for at least: a tie with the last token kept is kept. */
static float threshold(const Sampling *s, Sampler *sampler, int n) {
    const float most = largest(sampler->scores, n);
    float lowest = -INFINITY;
    int count = n;
    const int has_k = s->top_k > 0 && s->top_k < n;
    if (has_k || s->top_p < 1.0) {
        memcpy(sampler->sorted, sampler->scores, (size_t)n * sizeof(float));
        qsort(sampler->sorted, (size_t)n, sizeof(float), descending);
    }
    if (has_k) {
        lowest = sampler->sorted[s->top_k - 1];
        for (count = s->top_k; count < n && sampler->sorted[count] == lowest;) ++count;
    }
    if (s->top_p < 1.0) {
        double total = 0.0, before = 0.0;
        for (int i = 0; i < count; ++i) total += exp((double)sampler->sorted[i] - most);
        for (int i = 0; i < count && before < s->top_p * total; ++i) {
            lowest = sampler->sorted[i];
            before += exp((double)sampler->sorted[i] - most);
        }
    }
    if (s->min_p > 0.0) {
        const float least = most + (float)log(s->min_p);
        lowest = least > lowest ? least : lowest;
    }
    return lowest;
}

/* The exponential race: the token of the largest score + Gumbel noise is a draw from the softmax of the scores. */
static int race(const Sampling *s, const Sampler *sampler, int n, float lowest, int position) {
    double most = -INFINITY;
    int winner = -1;
    uint32_t words[4];
    for (int i = 0; i < n; ++i) {
        if (sampler->scores[i] < lowest) continue;
        if (winner < 0 || i % 4 == 0 || sampler->scores[i - 1] < lowest) {
            random_words(s->seed, (uint32_t)i / 4, (uint32_t)position, words);
        }
        const double u = (words[i % 4] + 0.5) / 4294967296.0;
        /* noise is below -log(u): logarithms only for those that can still win */
        if (winner >= 0 && u > 1.001 * (double)expf((float)(sampler->scores[i] - most)) + 1e-30) continue;
        const double score = sampler->scores[i] - log(-log1p(-u));
        if (score > most) {
            most = score;
            winner = i;
        }
    }
    return winner;
}

/* The new token number `position` of a text. */
static int draw(const Sampling *s, Sampler *sampler, const float *logits, int n, int position) {
    const int greedy = s->temperature < 1e-5f || s->top_k == 1;
    int best = 0;
    for (int i = 0; i < n; ++i) {
        float score = logits[i];
        if (sampler->seen[i]) score = score > 0.0f ? score / s->repetition_penalty : score * s->repetition_penalty;
        if (sampler->counts[i]) score -= s->frequency_penalty * (float)sampler->counts[i] + s->presence_penalty;
        if (score != score) fail("the model's logits are not numbers");
        sampler->scores[i] = greedy ? score : score / s->temperature;
        if (sampler->scores[i] > sampler->scores[best]) best = i;
    }
    if (!greedy) best = race(s, sampler, n, threshold(s, sampler, n), position);
    if (best < 0) fail("the model's logits are not numbers");
    sampler->seen[best] = 1;
    sampler->counts[best] += 1;
    return best;
}

/* ---- the command line ------------------------------------------------------------------------------------------------- */

static const char usage[] =
    "usage: run MODEL [PROMPT] [options]      continue PROMPT (or standard input) with the model in a file\n"
    "  -n, --max-new-tokens N    stop after so many tokens\n"
    "  --temperature, --temp T   divide logits by this; 0 takes the likeliest token\n"
    "  --top-k K, --top-p P      draw from the K likeliest tokens; of those, from the likeliest that reach P together\n"
    "  --min-p P                 drop tokens less likely than this share of the likeliest\n"
    "  --repetition-penalty X, --presence-penalty X, --frequency-penalty X\n"
    "  --seed N                  the same seed gives the same text\n"
    "  --ignore-eos              go on past the end of a text\n"
    "  --no-echo                 do not print the prompt\n"
    "  --ids                     PROMPT is ids, and so is what is printed\n"
    "  --tokenize                print the ids of PROMPT, and stop\n"
    "  --logits                  write the logits behind each token of PROMPT as float32, and stop\n"
    "  --stats                   say on standard error how fast it was\n";

typedef struct {
    const char *model, *prompt;
    int echo, ids, tokenize, logits, stats;
} Options;

static void misused(const char *format, const char *what) {
    fputs("run: ", stderr);
    fprintf(stderr, format, what);
    fputs("; run --help says what there is\n", stderr);
    exit(2);
}

static double number(const char *flag, const char *text, double least, double most) {
    char *end;
    const double value = text ? strtod(text, &end) : 0.0;
    if (!text) misused("%s needs a value", flag);
    if (end == text || *end || !(value >= least && value <= most)) {
        fprintf(stderr, "run: %s %s: expected a number from %g to %g\n", flag, text, least, most);
        exit(2);
    }
    return value;
}

static uint64_t whole(const char *flag, const char *text, uint64_t most) {
    uint64_t value = 0;
    if (!text) misused("%s needs a value", flag);
    int fits = *text != 0;
    for (const char *c = text ? text : ""; *c && fits; ++c) {
        const uint64_t digit = (uint64_t)(*c - '0');
        fits = *c >= '0' && *c <= '9' && value <= (most - digit) / 10;
        value = 10 * value + digit;
    }
    if (!fits) misused("%s: expected a whole number that is not too large", flag);
    return value;
}

static int is(const char *argument, const char *name) { return strcmp(argument, name) == 0; }

/* A flag that takes no value; 0 where it is none. */
static int take_switch(Options *o, Sampling *s, const char *flag) {
    if (is(flag, "--ignore-eos")) s->ignore_eos = 1;
    else if (is(flag, "--no-echo")) o->echo = 0;
    else if (is(flag, "--ids")) o->ids = 1;
    else if (is(flag, "--tokenize")) o->tokenize = 1;
    else if (is(flag, "--logits")) o->logits = 1;
    else if (is(flag, "--stats")) o->stats = 1;
    else return 0;
    return 1;
}

/* A flag with its value; 0 where it is none. */
static int take_value(Sampling *s, const char *flag, const char *value) {
    if (is(flag, "-n") || is(flag, "--max-new-tokens")) s->max_new_tokens = (int)whole(flag, value, INT32_MAX);
    else if (is(flag, "--temperature") || is(flag, "--temp")) s->temperature = (float)number(flag, value, 0, 1e6);
    else if (is(flag, "--top-k")) s->top_k = (int)whole(flag, value, INT32_MAX);
    else if (is(flag, "--top-p")) s->top_p = number(flag, value, 1e-9, 1);
    else if (is(flag, "--min-p")) s->min_p = number(flag, value, 0, 1);
    else if (is(flag, "--repetition-penalty")) s->repetition_penalty = (float)number(flag, value, 1e-6, 1e6);
    else if (is(flag, "--presence-penalty")) s->presence_penalty = (float)number(flag, value, -1e6, 1e6);
    else if (is(flag, "--frequency-penalty")) s->frequency_penalty = (float)number(flag, value, -1e6, 1e6);
    else if (is(flag, "--seed")) s->seed = whole(flag, value, UINT64_MAX);
    else return 0;
    return 1;
}

/* The settings of the file are the defaults of the flags, so the flags are read twice: for MODEL, and once it is open. */
static Options read_arguments(int argc, char **argv, Sampling *s) {
    Options o = {NULL, NULL, 1, 0, 0, 0, 0};
    int only_words = 0;
    for (int i = 1; i < argc; ++i) {
        const int is_flag = !only_words && argv[i][0] == '-' && argv[i][1];
        if (is_flag && is(argv[i], "--")) {
            only_words = 1;
        } else if (is_flag && (is(argv[i], "-h") || is(argv[i], "--help"))) {
            fputs(usage, stdout);
            exit(0);
        } else if (is_flag && take_switch(&o, s, argv[i])) {
            continue;
        } else if (is_flag) {
            if (!take_value(s, argv[i], i + 1 < argc ? argv[i + 1] : NULL)) misused("%s: no such option", argv[i]);
            ++i;
        } else if (!o.model) {
            o.model = argv[i];
        } else if (!o.prompt) {
            o.prompt = argv[i];
        } else {
            misused("%s: one prompt is enough; put it in quotes", argv[i]);
        }
    }
    if (!o.model) {
        fputs(usage, stderr);
        exit(2);
    }
    return o;
}

/* Standard input, less the newline at its end. */
static const char *read_prompt(void) {
    Text text = {NULL, 0, 0};
    char buffer[4096];
    size_t n;
    append(&text, "", 0);
    while ((n = fread(buffer, 1, sizeof buffer, stdin)) > 0) append(&text, buffer, n);
    if (memchr(text.bytes, 0, text.size)) fail("the prompt holds a zero byte");
    if (text.size && text.bytes[text.size - 1] == '\n') text.bytes[--text.size] = 0;
    return (const char *)text.bytes;
}

static void require_utf8(const char *text) {
    Decoder d = {{0}, 0, 0, 0};
    for (const Byte *p = (const Byte *)text; *p; ++p) {
        const int had = d.count;
        const int begins = !had && (*p < 0x80 || (*p >= 0xc2 && *p <= 0xf4));
        if (!begins && !(had && is_continued(d.bytes, had, *p))) {
            fail("the prompt is not UTF-8: byte 0x%02x at offset %lu", *p, (unsigned long)(p - (const Byte *)text));
        }
        decode_byte(&d, *p);
    }
    if (d.count) fail("the prompt is not UTF-8: it ends within a character");
}

static Ids parse_ids(const char *text) {
    Ids ids = {NULL, 0, 0};
    while (*text) {
        char word[16];
        size_t n = strspn(text, " ,\t\n");
        text += n;
        n = strcspn(text, " ,\t\n");
        if (!n) break;
        if (n >= sizeof word) fail("the prompt: %.20s is no id", text);
        memcpy(word, text, n);
        word[n] = 0;
        push(&ids, (int)whole("the prompt's ids", word, INT32_MAX));
        text += n;
    }
    if (!ids.count) fail("the prompt holds no ids");
    return ids;
}

static double seconds(void) {
#ifdef _OPENMP
    return omp_get_wtime();
#else
    return (double)clock() / CLOCKS_PER_SEC;
#endif
}

/* Reads the prompt; the logits behind its last token, or all of them on standard output. */
static const float *read_all(Model *m, const Ids *ids, int print) {
    int count = 0;
    for (size_t first = 0; first < ids->count; first += (size_t)count) {
        count = ids->count - first < BATCH ? (int)(ids->count - first) : BATCH;
        read_tokens(m, ids->ids + first, count, (int)first);
        for (int t = 0; print && t < count; ++t) {
            if (fwrite(logits_of(m, t), sizeof(float), (size_t)m->vocab_size, stdout) != (size_t)m->vocab_size) {
                fail("standard output cannot be written");
            }
        }
    }
    return print ? NULL : logits_of(m, count - 1);
}

static int ends_text(const Sampling *s, int token) {
    for (int i = 0; !s->ignore_eos && i < s->n_ends; ++i) {
        if (s->ends[i] == token) return 1;
    }
    return 0;
}

static void generate(Model *m, const Tokenizer *t, const Sampling *s, const Options *o, const Ids *ids) {
    Decoder decoder = {{0}, 0, t->stripped, 0};
    Sampler sampler;
    int count = 0, token, limit = s->max_new_tokens;
    const int room = m->max_positions - (int)ids->count + 1; /* the last token is not read back */
    limit = limit < room ? limit : room;
    make_room(m, (int)ids->count + limit);
    sampler.scores = allocate((size_t)m->vocab_size, sizeof(float));
    sampler.sorted = allocate((size_t)m->vocab_size, sizeof(float));
    sampler.counts = allocate((size_t)m->vocab_size, sizeof(int));
    sampler.seen = allocate((size_t)m->vocab_size, 1);
    for (size_t i = 0; i < ids->count; ++i) {
        sampler.seen[ids->ids[i]] = 1;
        if (!o->ids) decode(t, &decoder, ids->ids[i]);
    }
    decoder.shows = 1;
    const double began = seconds();
    const float *logits = read_all(m, ids, 0);
    const double read = seconds();
    while (count < limit) {
        token = draw(s, &sampler, logits, m->vocab_size, count);
        ++count;
        if (ends_text(s, token)) break;
        if (o->ids) printf(count > 1 ? " %d" : "%d", token);
        else decode(t, &decoder, token);
        fflush(stdout);
        if (count < limit) {
            read_tokens(m, &token, 1, (int)ids->count + count - 1);
            logits = logits_of(m, 0);
        }
    }
    show_broken(&decoder);
    putchar('\n');
    if (o->stats) {
        const double ended = seconds();
        fprintf(stderr, "seed %llu, prompt of %lu tokens in %.3f s, then %d tokens, %.1f tokens/s\n",
                (unsigned long long)s->seed, (unsigned long)ids->count, read - began, count,
                count > 1 ? (count - 1) / (ended - read + 1e-9) : 0.0);
    }
}

int main(int argc, char **argv) {
    static Model model;
    static Tokenizer tokenizer;
    static Sampling sampling;
    Options o = read_arguments(argc, argv, &sampling);
    Reader in = open_file(o.model);
    read_sampling(&in, &sampling);
    read_tokenizer(&in, &tokenizer);
    read_model(&in, &model);
    fclose(in.file);
    sampling.seed = (uint64_t)time(NULL) * 1000003u + (uint64_t)clock();
    o = read_arguments(argc, argv, &sampling);
    if (!o.ids && tokenizer.kind == TOKENIZER_NONE) misused("%s holds no tokenizer: give --ids", o.model);
    if (!o.prompt || is(o.prompt, "-")) o.prompt = read_prompt();
    if (!o.ids) require_utf8(o.prompt);
    const Ids ids = o.ids ? parse_ids(o.prompt) : encode(&tokenizer, o.prompt);
    for (size_t i = 0; o.tokenize && i < ids.count; ++i) printf("%d%c", ids.ids[i], i + 1 < ids.count ? ' ' : '\n');
    if (o.tokenize) return 0;
    if (ids.count > (size_t)model.max_positions) {
        fail("the prompt has %lu tokens; the model's context is %d", (unsigned long)ids.count, model.max_positions);
    }
    for (size_t i = 0; i < ids.count; ++i) {
        if (ids.ids[i] < 0 || ids.ids[i] >= model.vocab_size) {
            fail("the prompt has token %d; the model's vocabulary ends at %d", ids.ids[i], model.vocab_size - 1);
        }
    }
    if (o.logits) {
        make_room(&model, (int)ids.count);
        read_all(&model, &ids, 1);
        return 0;
    }
    if (o.echo && !o.ids) fputs(o.prompt, stdout);
    generate(&model, &tokenizer, &sampling, &o, &ids);
    return ferror(stdout) ? 1 : 0;
}
