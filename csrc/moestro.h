// The C ABI of Moestro's native kernels: no Python, no torch. Called through ctypes by moestro/ops/native.py.
//
// Conventions: matrices are row-major with the stride of a row in elements; `type` is FLOAT32 or BFLOAT16; every function
// returns 0, or an error code for arguments it refuses (nothing has been read or written then). Results depend neither on
// the number of threads nor on what else is in the batch: every sum has one fixed order.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { MOESTRO_FLOAT32 = 0, MOESTRO_BFLOAT16 = 1 };
enum { MOESTRO_OK = 0, MOESTRO_BAD_TYPE = 1, MOESTRO_BAD_SIZE = 2, MOESTRO_NO_MEMORY = 3, MOESTRO_NO_ISA = 4 };

// Name of the instruction set in use: "avx512bf16", "avx512", "avx2", or "" where none of them can run.
const char *moestro_isa(void);
// Use at most this one of the names above; returns MOESTRO_NO_ISA where the machine cannot run it.
int moestro_set_isa(const char *name);

// out[m, n] = Σ_k a(m, k) · b(k, n), products in `type`, sums in fp32.
//   a_transposed: a(m, k) is a[k * a_stride + m], else a[m * a_stride + k];
//   b_transposed: b(k, n) is b[n * b_stride + k], else b[k * b_stride + n].
int moestro_matmul(void *out, const void *a, const void *b, int64_t m, int64_t n, int64_t k, int64_t out_stride,
                   int64_t a_stride, int64_t b_stride, int a_transposed, int b_transposed, int type, int out_type,
                   int threads);

// SwiGLU experts (moestro/ops/reference.py, grouped_experts). Slots 0 … S-1 are the choices sorted by expert; expert e has
// slots offsets[e] … offsets[e+1]-1; slot s serves row token[s] of x with weight weights[s].
//   x [N, D], gate_up [E, 2F, D], down [E, D, F]; saved: h [S, 2F]; y [S, D], the weighted results.
int moestro_experts_forward(void *y, void *h, const void *x, const void *gate_up, const void *down,
                            const int64_t *token, const float *weights, const int64_t *offsets, int64_t num_experts,
                            int64_t num_tokens, int64_t hidden, int64_t width, int type, int threads);

// Gradients: dy [N, D] by row of x; dx [S, D] by slot, d_weights [S], d_gate_up [E, 2F, D], d_down [E, D, F].
int moestro_experts_backward(void *dx, float *d_weights, void *d_gate_up, void *d_down, const void *dy, const void *x,
                             const void *h, const void *gate_up, const void *down, const int64_t *token,
                             const float *weights, const int64_t *offsets, int64_t num_experts, int64_t num_tokens,
                             int64_t hidden, int64_t width, int type, int threads);

// out[n] = Σ_a y[slot[n, a]], in the order of a; slots outside 0 … num_slots-1 add nothing. slot [N, A], y [S, D].
int moestro_combine(void *out, const void *y, const int64_t *slot, int64_t num_tokens, int64_t top_k, int64_t num_slots,
                    int64_t hidden, int type, int threads);

#ifdef __cplusplus
}
#endif
