// The functions of one instruction set, behind one table.
#pragma once
#include <cstdint>
#include <type_traits>

struct MatmulSizes {
    int64_t m, n, k, out_stride, a_stride, b_stride;
    bool a_transposed, b_transposed;
};

struct ExpertsForward {
    void *y, *h;
    const void *x, *gate_up, *down;
    const int64_t *token;
    const float *weights;
    const int64_t *offsets;
    int64_t num_experts, hidden, width;
};

struct ExpertsBackward {
    void *dx;
    float *d_weights;
    void *d_gate_up, *d_down;
    const void *dy, *x, *h, *gate_up, *down;
    const int64_t *token;
    const float *weights;
    const int64_t *offsets;
    int64_t num_experts, hidden, width;
};

struct Kernels {
    int (*matmul)(void *out, const void *a, const void *b, const MatmulSizes &sizes, int type, int out_type, int threads);
    int (*experts_forward)(const ExpertsForward &, int type, int threads);
    int (*experts_backward)(const ExpertsBackward &, int type, int threads);
    void (*combine)(void *out, const void *y, const int64_t *slot, int64_t num_tokens, int64_t top_k, int64_t num_slots,
                    int64_t hidden, int type, int threads);
};
