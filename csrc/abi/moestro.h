// The C ABI of Moestro's native kernels: no Python, no torch. Called through ctypes by moestro/ops/library.py.
//
// Numbers, the struct and all declarations come from moestro/ops/abi.py, through generated.h, which setup.py writes.
// This file declares each function once more, to explain it; if the two disagree, nothing compiles.
//
// Conventions: matrices are row-major with the stride of a row in elements; `type` is FLOAT32 or BFLOAT16; every
// function returns 0, or an error code for arguments it refuses (nothing has been read or written then). Results depend
// neither on the number of threads nor on what else is in the batch: every sum has one fixed order.
#pragma once
#include "abi/generated.h"

#ifdef __cplusplus
extern "C" {
#endif

// The version of moestro/ops/abi.py that this library was built from.
uint32_t moestro_abi(void);
// Name of the instruction set in use, one of MOESTRO_ISAS, or "" where none of them can run.
const char *moestro_isa(void);
// Use at most this one of the names above; returns MOESTRO_NO_ISA if the machine cannot run it.
int moestro_set_isa(const char *name);

// out[m, n] = Σ_k a(m, k) · b(k, n), products in `type`, sums in fp32.
//   a_transposed: a(m, k) is a[k * a_stride + m], else a[m * a_stride + k];
//   b_transposed: b(k, n) is b[n * b_stride + k], else b[k * b_stride + n].
int moestro_matmul(void *out, const void *a, const void *b, int64_t m, int64_t n, int64_t k, int64_t out_stride,
                   int64_t a_stride, int64_t b_stride, int a_transposed, int b_transposed, int type, int out_type,
                   int threads);

// SwiGLU experts (moestro/ops/training/reference.py, grouped_experts). Slots 0 … S-1 are the choices sorted by expert;
// expert e has slots offsets[e] … offsets[e+1]-1; slot s serves row token[s] of x with weight weights[s]. Every expert
// has its own address: gate_up[e] points to [2F, D], down[e] to [D, F]. Only experts without slots may have a null
// address (MOESTRO_NO_ADDRESS).
//   x [N, D]; saved: h [S, 2F]; y [S, D], the weighted results.
int moestro_experts_forward(void *y, void *h, const void *x, const void *const *gate_up, const void *const *down,
                            const int64_t *token, const float *weights, const int64_t *offsets, int64_t num_experts,
                            int64_t num_tokens, int64_t hidden, int64_t width, int type, int threads);

// Gradients: dy [N, D] by row of x; dx [S, D] by slot, d_weights [S]; d_gate_up[e] and d_down[e] point to the gradients
// of an expert, zeros where it has no slots, so none of them may be null.
int moestro_experts_backward(void *dx, float *d_weights, void *const *d_gate_up, void *const *d_down, const void *dy,
                             const void *x, const void *h, const void *const *gate_up, const void *const *down,
                             const int64_t *token, const float *weights, const int64_t *offsets, int64_t num_experts,
                             int64_t num_tokens, int64_t hidden, int64_t width, int type, int threads);

// out[n] = Σ_a y[slot[n, a]], in the order of a; slots outside 0 … num_slots-1 add nothing. slot [N, A], y [S, D].
int moestro_combine(void *out, const void *y, const int64_t *slot, int64_t num_tokens, int64_t top_k, int64_t num_slots,
                    int64_t hidden, int type, int threads);

// Multiplies without touching memory, to measure what the machine can do: *operations is what `rounds` rounds took.
int moestro_multiply_in_registers(int64_t *operations, int64_t rounds, int type, int threads);

// Output head and cross-entropy. hidden [N, D], weight [V, D], targets [N] (negative: none) -> nll [N] in nats, 0
// without a target; argmax [N]; and, unless d_hidden is null, the gradients of Σ w · nll: d_hidden [N, D] is written,
// d_weight [V, D] added to. w is row_weights [N], or all 1 if that is null.
int moestro_cross_entropy(float *nll, int64_t *argmax, void *d_hidden, float *d_weight, const void *hidden,
                          const void *weight, const int64_t *targets, const float *row_weights, int64_t num_rows,
                          int64_t vocabulary, int64_t width, int type, int threads);

// From here on for serving: a row of results depends only on that row's inputs, bit for bit.

// Packs a matrix x [m, k] into panels as `kind` (docs/kernels.md has the layout).
int moestro_pack(void *panels, const void *x, int64_t m, int64_t k, int kind, int type, int threads);

// Packs E4M3 codes [m, k] and fp32 scales [m, ⌈k / 128⌉], one for each row and 128 codes, into panels of kind fp8.
int moestro_pack_codes(void *panels, const void *codes, const float *scales, int64_t m, int64_t k, int threads);

// out [n, G, m] = x [n, G, k] times G matrices [m, k], packed as `kind` (docs/kernels.md: panels of 64 outputs).
// int8 and int4 quantise the rows of x block by block too; fp8 does not; fp8_both multiplies the same panels by rows
// that are rounded to E4M3 in tiles of 128.
int moestro_packed_linear(void *out, const void *x, const void *panels, int64_t groups, int64_t n, int64_t m, int64_t k,
                          int kind, int type, int threads);

// out [N, D] = Σ_a weights[n, a] · expert ids[n, a] of x [N, D]; id E is not carried out. ids, weights [N, A]. Every
// expert has its own address: gate_up[e] points to its packed panels of 32 gates and the 32 ups of the same index,
// down[e] to its packed [D, F]. Only experts that are not chosen may have a null address (MOESTRO_NO_ADDRESS).
int moestro_packed_experts(void *out, const void *x, const int64_t *ids, const float *weights,
                           const void *const *gate_up, const void *const *down, int64_t num_tokens, int64_t top_k,
                           int64_t num_experts, int64_t hidden, int64_t width, int kind, int type, int threads);

// out [N, H, V] of q [N, H, K]. Sequence s owns rows starts[s] … starts[s+1]-1, at positions first[s], first[s]+1, …; a
// row at position p sees rows 0 … p of its sequence: row i is pages[tables[s, i / 64], i % 64], of page_width = groups
// · w values, group g's key from g · w on, its value from g · w + value_offset on. Head h uses group h · groups / H.
// pages [P, 64, page_width]; tables [S, max_pages]; starts [S + 1]; first [S]. If `selection` [N, selected] is not
// null, a row sees these positions instead: ascending, at least one, none beyond its own, padded with -1.
// page_type is `type`, or FP8_ROWS: rows of bytes as moestro_store_fp8_rows writes them, of value_width codes, widened
// to `type` first. There is then one group, value_offset is 0, and page_width counts bytes.
int moestro_paged_attention(void *out, const void *q, const void *pages, const int32_t *tables, const int64_t *starts,
                            const int64_t *first, int64_t num_rows, int64_t num_pages, int64_t num_sequences,
                            int64_t max_pages, int64_t num_heads, int64_t key_width, int64_t value_width,
                            int64_t page_width, int64_t groups, int64_t value_offset, const int32_t *selection,
                            int64_t selected, float scale, int page_type, int type, int threads);

// Rows x [num_rows, width] to slots, page · 64 + place, of pages [num_pages, 64, row_bytes]. The first `coded` values
// become E4M3 codes, one byte each; then come the fp32 scales of every 128 codes, amax / 448 with 1e-4 as the least
// amax; then the other values as bf16. A tile with an infinity or a NaN is read as NaN.
int moestro_store_fp8_rows(void *pages, const void *x, const int64_t *slots, int64_t num_rows, int64_t num_pages,
                           int64_t row_bytes, int64_t width, int64_t coded, int type, int threads);

// out = x / rms(x) · weight, rows of x [rows, width]; weight [width] of weight_type.
int moestro_rms_norm(void *out, const void *x, const void *weight, int64_t rows, int64_t width, float eps, int type,
                     int weight_type, int threads);
// out [rows, width] = silu(gate) · up of gate_up [rows, 2 · width], gates first.
int moestro_swiglu(void *out, const void *gate_up, int64_t rows, int64_t width, int type, int threads);

// out = x with its pairs (0, 1), (2, 3), … rotated by the angles of their row, backwards where `inverse`. Vector (row,
// g) of `width` values lies at x + row · x_row + g · x_group, and likewise in out, which may be x; cos and sin [rows,
// width / 2].
int moestro_rope(void *out, const void *x, const float *cos, const float *sin, int64_t rows, int64_t groups,
                 int64_t width, int64_t out_row, int64_t out_group, int64_t x_row, int64_t x_group, int inverse,
                 int type, int threads);

// A router: ids [rows, top_k] and weights of logits [rows, E]. Scores are compared with bias [E] added or, where
// `multiply`, times 1 + bias. Only experts of the top_k_groups best groups count; a group's score is the sum of its
// `group_best` (1 or 2) best. Ids come in descending order of score, ties by lowest id. Weights are scores without
// bias, normalised to sum to 1 if asked, times scale. `given`: ids are an input, and only their weights are computed;
// rows whose ids are -1 are chosen as without it. MOESTRO_CONSTANT does not read logits.
int moestro_route(int64_t *ids, float *weights, const float *logits, const float *bias, int64_t rows,
                  int64_t num_experts, int64_t num_groups, int64_t top_k_groups, int64_t top_k, float scale,
                  int function, int group_best, int multiply, int normalize, int given, int threads);

// out = a + b, [rows, width] each; out may be a or b.
int moestro_add(void *out, const void *a, const void *b, int64_t rows, int64_t width, int type, int threads);

// Runs a program (csrc/abi/run.cpp) on a step: `memory` of num_rows · row_bytes; ids [num_routers, num_rows, top_k];
// the caches, each with pages [num_pages, 64, width] of its type (bytes for FP8_ROWS), any number per layer; the rest
// as for attention and rotation. slots [num_rows]: where the tokens' rows go, page · 64 + place.
int moestro_run(const int64_t *program, int64_t length, const MoestroStep *step);

// Attention of whole documents, for training: out [N, H, W] of q [N, H, K], k [N, G, K], v [N, G, W]; query head h uses
// key head h · G / H; row i of document s, starts[s] … starts[s+1]-1, sees that document's rows up to i. `strides`, in
// elements: from row to row and from head to head of q, k and v. log_sums [H, N], kept for the gradients: log2 Σ
// exp(scale · q · k) of a row.
int moestro_flash_forward(void *out, float *log_sums, const void *q, const void *k, const void *v,
                          const int64_t *starts, const int64_t *strides, int64_t num_documents, int64_t num_rows,
                          int64_t num_heads, int64_t num_kv_heads, int64_t key_width, int64_t value_width, float scale,
                          int type, int threads);

// Gradients: dq [N, H, K], dk [N, G, K], dv [N, G, W] of d_out [N, H, W], whose strides follow those of q, k and v.
int moestro_flash_backward(void *dq, void *dk, void *dv, const void *d_out, const void *q, const void *k, const void *v,
                           const void *out, const float *log_sums, const int64_t *starts, const int64_t *strides,
                           int64_t num_documents, int64_t num_rows, int64_t num_heads, int64_t num_kv_heads,
                           int64_t key_width, int64_t value_width, float scale, int type, int threads);
// From here on for training again.

// Gradients of moestro_rms_norm: dx, dy, x [rows, width]; d_weight, weight [width] of weight_type. d_weight is summed
// over blocks of rows, then over the blocks, for any number of threads.
int moestro_rms_norm_backward(void *dx, void *d_weight, const void *dy, const void *x, const void *weight, int64_t rows,
                              int64_t width, float eps, int type, int weight_type, int threads);
// Gradient of moestro_swiglu: d_gate_up, gate_up [rows, 2 · width], dy [rows, width].
int moestro_swiglu_backward(void *d_gate_up, const void *dy, const void *gate_up, int64_t rows, int64_t width, int type,
                            int threads);

// out [rows, heads, P + R]: P values of plain, then R of rotary, whose pairs (0, 1), (2, 3), … are rotated by the row's
// angles; cos, sin [rows, R / 2]. Value j of row n and head h is plain[n · plain_row + h · plain_head + j], and so for
// rotary; rotary_head = 0 lets all heads share it.
int moestro_join_heads(void *out, const void *plain, const void *rotary, const float *cos, const float *sin,
                       int64_t rows, int64_t heads, int64_t plain_width, int64_t rotary_width, int64_t plain_row,
                       int64_t plain_head, int64_t rotary_row, int64_t rotary_head, int type, int threads);
// Its gradients: d_out [rows, heads, P + R]; d_plain [rows, heads, P], d_rotary [rows, heads, R] or, shared, [rows, R].
int moestro_split_heads(void *d_plain, void *d_rotary, const void *d_out, const float *cos, const float *sin,
                        int64_t rows, int64_t heads, int64_t plain_width, int64_t rotary_width, int shared, int type,
                        int threads);

// Layers in FP8. Slots 0 … num_slots-1 are rows of a matrix [num_rows, width], chosen by `rows` (null: in order, then
// num_rows = num_slots); group g owns slots bounds[g] … bounds[g+1]-1, which begin at 0. Tiles are 128 long and begin
// anew with every group.

// Codes of x [num_rows, width] by slot: `values` in bf16 and `codes` as E4M3 bytes, each may be null, [num_slots,
// width]. x is of `type`, or E4M3 bytes in tiles of 1 x 128 with x_scales [num_rows, width / 128]. A tile is 1 or, if
// `tall`, 128 slots by 1 or, if `wide`, 128 columns; not neither. scales: one row per slot or, tall, per tile of every
// group in turn; `given` [num_groups], unless null, are the scales to use. Scales are largest magnitude / largest code,
// powers of two if asked. e5m6: 5 exponent bits, 6 fraction bits, as values only.
int moestro_fp8_quantize(void *values, void *codes, float *scales, const void *x, const float *x_scales,
                         const int64_t *rows, const int64_t *bounds, const float *given, int64_t num_groups,
                         int64_t num_slots, int64_t num_rows, int64_t width, int tall, int wide, int e5m6,
                         int power_of_two, int type, int threads);
// values [count] in bf16 of E4M3 bytes.
int moestro_fp8_widen(void *values, const void *codes, int64_t count, int threads);
// Rows of each group times its matrix: out [num_slots, m] = a [num_rows, k] · b[g]ᵀ or, `back`, out [num_slots, k] = a
// [num_rows, m] · b[g]; all bf16. a_scales in tiles of 1 x 128; b[g] [m, k] with b_scales[g] in blocks of 128 x 128.
int moestro_fp8_rows(void *out, const void *a, const float *a_scales, const int64_t *rows, const void *const *b,
                     const void *const *b_scales, const int64_t *bounds, int64_t num_groups, int64_t num_slots,
                     int64_t num_rows, int64_t m, int64_t k, int back, int threads);
// out [num_groups, m, k] = aᵀ b over the slots of each group: a [num_slots, m], b [num_slots, k], values in bf16 with
// scales in tiles of 128 x 1, a row for each tile of every group in turn.
int moestro_fp8_columns(float *out, const void *a, const float *a_scales, const void *b, const float *b_scales,
                        const int64_t *bounds, int64_t num_groups, int64_t num_slots, int64_t m, int64_t k,
                        int threads);
// out [num_slots, width] = silu(gate) · up · weight of h [num_slots, 2 · width], bf16.
int moestro_fp8_swiglu(void *out, const void *h, const float *weights, int64_t num_slots, int64_t width, int threads);
// From h in E4M3 bytes with scales in tiles of 1 x 128: act [num_slots, width] again, and gradients: dh [num_slots, 2 ·
// width] and d_weights [num_slots] of d_act [num_slots, width]. bf16 but for the weights.
int moestro_fp8_swiglu_backward(void *act, void *dh, float *d_weights, const void *d_act, const void *h,
                                const float *h_scales, const float *weights, int64_t num_slots, int64_t width,
                                int threads);

#ifdef __cplusplus
}
#endif
