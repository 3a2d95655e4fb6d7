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
enum { MOESTRO_KIND_FP32 = 0, MOESTRO_KIND_BF16 = 1, MOESTRO_KIND_INT8 = 2, MOESTRO_KIND_INT4 = 3 };
enum { MOESTRO_SIGMOID = 0, MOESTRO_SOFTMAX = 1, MOESTRO_SQRT_SOFTPLUS = 2 };
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

// What follows is for serving: a row of results depends on that row's inputs alone, bit for bit.

// out [n, G, m] = x [n, G, k] times G matrices [m, k], packed as `kind` (docs/kernels.md: panels of 64 outputs). Quantised
// kinds quantise the rows of x block by block too.
int moestro_packed_linear(void *out, const void *x, const void *panels, int64_t groups, int64_t n, int64_t m, int64_t k,
                          int kind, int type, int threads);

// out [N, D] = Σ_a weights[n, a] · expert ids[n, a] of x [N, D]; id E is not carried out. ids, weights [N, A]; packed
// gate_up: for each expert panels of 32 gates and the 32 ups of the same index; packed down: [E, D, F].
int moestro_packed_experts(void *out, const void *x, const int64_t *ids, const float *weights, const void *gate_up,
                           const void *down, int64_t num_tokens, int64_t top_k, int64_t num_experts, int64_t hidden,
                           int64_t width, int kind, int type, int threads);

// out [N, H, V] of q [N, H, K]. Sequence s owns rows starts[s] … starts[s+1]-1, at positions first[s], first[s]+1, …; a row at
// position p sees rows 0 … p of its sequence: row i is pages[tables[s, i / 64], i % 64], of page_width = groups · w values,
// group g's key from g · w on, its value from g · w + value_offset on. Heads h use group h · groups / H.
// pages [P, 64, page_width]; tables [S, max_pages]; starts [S + 1]; first [S].
int moestro_paged_attention(void *out, const void *q, const void *pages, const int32_t *tables, const int64_t *starts,
                            const int64_t *first, int64_t num_rows, int64_t num_pages, int64_t num_sequences,
                            int64_t max_pages, int64_t num_heads, int64_t key_width, int64_t value_width,
                            int64_t page_width, int64_t groups, int64_t value_offset, float scale, int type, int threads);

// out = x / rms(x) · weight, rows of x [rows, width]; weight [width] of weight_type.
int moestro_rms_norm(void *out, const void *x, const void *weight, int64_t rows, int64_t width, float eps, int type,
                     int weight_type, int threads);
// out [rows, width] = silu(gate) · up of gate_up [rows, 2 · width], gates first.
int moestro_swiglu(void *out, const void *gate_up, int64_t rows, int64_t width, int type, int threads);
// Scores of logits [rows, width]: the sigmoid, the softmax of a row, or √softplus.
int moestro_score(float *out, const float *logits, int64_t rows, int64_t width, int function, int threads);

// What follows is for training again.

// Gradients of moestro_rms_norm: dx, dy, x [rows, width]; d_weight, weight [width] of weight_type. d_weight is summed over
// blocks of rows, then over the blocks, whatever the threads.
int moestro_rms_norm_backward(void *dx, void *d_weight, const void *dy, const void *x, const void *weight, int64_t rows,
                              int64_t width, float eps, int type, int weight_type, int threads);
// Gradient of moestro_swiglu: d_gate_up, gate_up [rows, 2 · width], dy [rows, width].
int moestro_swiglu_backward(void *d_gate_up, const void *dy, const void *gate_up, int64_t rows, int64_t width, int type,
                            int threads);

// out [rows, heads, P + R]: P values of plain, then R of rotary, whose pairs (0, 1), (2, 3), … are turned by the row's angles;
// cos, sin [rows, R / 2]. Value j of row n and head h is plain[n · plain_row + h · plain_head + j], and so for rotary;
// rotary_head = 0 lets all heads share it.
int moestro_join_heads(void *out, const void *plain, const void *rotary, const float *cos, const float *sin, int64_t rows,
                       int64_t heads, int64_t plain_width, int64_t rotary_width, int64_t plain_row, int64_t plain_head,
                       int64_t rotary_row, int64_t rotary_head, int type, int threads);
// Its gradients: d_out [rows, heads, P + R]; d_plain [rows, heads, P], d_rotary [rows, heads, R] or, shared, [rows, R].
int moestro_split_heads(void *d_plain, void *d_rotary, const void *d_out, const float *cos, const float *sin, int64_t rows,
                        int64_t heads, int64_t plain_width, int64_t rotary_width, int shared, int type, int threads);

#ifdef __cplusplus
}
#endif
