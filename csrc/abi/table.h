// The functions of one instruction set, behind one table. moestro.h explains the arguments.
#pragma once
#include <cstdint>
#include <mutex>
#include <type_traits>

struct MatmulSizes {
    int64_t m, n, k, out_stride, a_stride, b_stride;
    bool a_transposed, b_transposed;
};

struct ExpertsForward {
    void *y, *h;
    const void *x;
    const void *const *gate_up, *const *down;
    const int64_t *token;
    const float *weights;
    const int64_t *offsets;
    int64_t num_experts, hidden, width;
};

struct ExpertsBackward {
    void *dx;
    float *d_weights;
    void *const *d_gate_up, *const *d_down;
    const void *dy, *x, *h;
    const void *const *gate_up, *const *down;
    const int64_t *token;
    const float *weights;
    const int64_t *offsets;
    int64_t num_experts, hidden, width;
};

struct CrossEntropy {
    float *nll;
    int64_t *argmax;
    void *d_hidden;
    float *d_weight;
    const void *hidden, *weight;
    const int64_t *targets;
    const float *row_weights;
    int64_t rows, vocabulary, width;
};

struct PackedLinear {
    void *out;
    const void *x;
    const char *panels;
    int64_t groups, n, m, k;
};

struct PackedExperts {
    void *out;
    const void *x;
    const int64_t *ids;
    const float *weights;
    const void *const *gate_up, *const *down;
    int64_t num_tokens, top_k, num_experts, hidden, width;
};

// Bytes of a row of `width` values in an FP8 cache: `coded` codes, the scales of their tiles, the rest in bf16.
constexpr int64_t FP8_TILE = 128;
inline int64_t fp8_row_bytes(int64_t coded, int64_t width) {
    return coded + (coded + FP8_TILE - 1) / FP8_TILE * 4 + (width - coded) * 2;
}

struct Fp8CacheRows {
    char *pages;
    const void *x;
    const int64_t *slots;
    int64_t num_rows, width, coded;
};

struct PagedAttention {
    void *out;
    const void *q, *pages;
    const int32_t *tables;
    const int64_t *starts, *first;
    int64_t num_sequences, max_pages, num_heads, key_width, value_width, page_width, groups, value_offset;
    const int32_t *selection;
    int64_t selected;
    float scale;
    bool fp8;  // pages of FP8 rows; page_width counts their values
};

struct Rope {
    void *out;
    const void *x;
    const float *cos, *sin;
    int64_t rows, groups, width, out_row, out_group, x_row, x_group;
    bool inverse;
};

struct Route {
    int64_t *ids;
    float *weights;
    const float *logits, *bias;
    int64_t rows, num_experts, num_groups, top_k_groups, top_k;
    float scale;
    int function, group_best;
    bool multiply, normalize, given;
};

// Row n of head h begins at data + n · row + h · head, in elements.
struct HeadRows {
    const void *data;
    int64_t row, head;
};

struct Documents {
    const int64_t *starts;
    int64_t num_documents, num_rows, num_heads, num_kv_heads, key_width, value_width;
    float scale;
};

struct FlashForward {
    void *out;
    float *log_sums;
    HeadRows q, k, v;
    Documents documents;
};

struct FlashBackward {
    void *dq, *dk, *dv;
    HeadRows d_out, q, k, v;
    const void *out;
    const float *log_sums, *dots;  // dots [H, N]: computed by the kernel itself
    Documents documents;
};

struct NormBackward {
    void *dx, *d_weight;
    const void *dy, *x, *weight;
    int64_t rows, width;
    float eps;
};

struct JoinHeads {
    void *out;
    const void *plain, *rotary;
    const float *cos, *sin;
    int64_t rows, heads, plain_width, rotary_width, plain_row, plain_head, rotary_row, rotary_head;
};

struct SplitHeads {
    void *d_plain, *d_rotary;
    const void *d_out;
    const float *cos, *sin;
    int64_t rows, heads, plain_width, rotary_width;
    bool shared;
};

struct Fp8Quantize {
    uint16_t *values;
    uint8_t *codes;
    float *scales;
    const void *x;
    const float *x_scales;
    const int64_t *rows, *bounds;
    const float *given;
    int64_t num_groups, width;
    bool tall, wide, e5m6, power_of_two;
};

// Rows that share scales: of a group, from the first on; their scales are row `index`.
struct Fp8Tile {
    int64_t group, first, rows, index;
};

struct Fp8Rows {
    uint16_t *out;
    const uint16_t *a;
    const float *a_scales;
    const int64_t *rows;
    const void *const *b, *const *b_scales;
    const int64_t *bounds;
    int64_t num_groups, m, k;
    bool back;
};

struct Fp8Columns {
    float *out;
    const uint16_t *a;
    const float *a_scales;
    const uint16_t *b;
    const float *b_scales;
    const int64_t *bounds;
    int64_t num_groups, m, k;
};

struct Fp8Swiglu {
    uint16_t *act, *dh;
    float *d_weights;
    const uint16_t *d_act;
    const uint8_t *h;
    const float *h_scales, *weights;
    int64_t rows, width;
};

struct Kernels {
    int (*matmul)(void *out, const void *a, const void *b, const MatmulSizes &sizes, int type, int out_type,
                  int threads);
    int (*experts_forward)(const ExpertsForward &, int type, int threads);
    int (*experts_backward)(const ExpertsBackward &, int type, int threads);
    void (*combine)(void *out, const void *y, const int64_t *slot, int64_t num_tokens, int64_t top_k, int64_t num_slots,
                    int64_t hidden, int type, int threads);
    int (*pack)(char *panels, const void *x, int64_t m, int64_t k, int kind, int type, int threads);
    int (*pack_codes)(char *panels, const uint8_t *codes, const float *scales, int64_t m, int64_t k, int threads);
    int (*packed_linear)(const PackedLinear &, int kind, int type, int threads);
    int (*packed_experts)(const PackedExperts &, int kind, int type, int threads);
    int (*paged_attention)(const PagedAttention &, int type, int threads);
    void (*store_fp8_rows)(const Fp8CacheRows &, int type, int threads);
    void (*rms_norm)(void *out, const void *x, const void *weight, int64_t rows, int64_t width, float eps, int type,
                     int weight_type, int threads);
    void (*swiglu)(void *out, const void *gate_up, int64_t rows, int64_t width, int type, int threads);
    int64_t (*multiply_in_registers)(int64_t rounds, int type, int threads);
    int (*cross_entropy)(const CrossEntropy &, int type, int threads);
    void (*rope)(const Rope &, int type, int threads);
    int (*route)(const Route &, int threads);
    void (*add)(void *out, const void *a, const void *b, int64_t rows, int64_t width, int type, int threads);
    int (*flash_forward)(const FlashForward &, int type, int threads);
    int (*flash_backward)(const FlashBackward &, int type, int threads);
    int (*rms_norm_backward)(const NormBackward &, int type, int weight_type, int threads);
    void (*swiglu_backward)(void *d_gate_up, const void *dy, const void *gate_up, int64_t rows, int64_t width, int type,
                            int threads);
    void (*join_heads)(const JoinHeads &, int type, int threads);
    void (*split_heads)(const SplitHeads &, int type, int threads);
    int (*fp8_quantize)(const Fp8Quantize &, int type, int threads);
    void (*fp8_widen)(uint16_t *values, const uint8_t *codes, int64_t count, int threads);
    int (*fp8_rows)(const Fp8Rows &, int threads);
    int (*fp8_columns)(const Fp8Columns &, int threads);
    void (*fp8_swiglu)(uint16_t *out, const uint16_t *h, const float *weights, int64_t rows, int64_t width,
                       int threads);
    int (*fp8_swiglu_backward)(const Fp8Swiglu &, int threads);
};

// What dispatch.cpp chose (null: nothing runs here), and the lock of kernels that share memory and all cores.
const Kernels *kernels_in_use();
std::mutex &kernel_lock();
