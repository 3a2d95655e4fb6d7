// The C ABI: picks the instruction set, checks every size that reaches address arithmetic.
#include "abi/moestro.h"

#include <cstring>
#include <mutex>

#include "isa/choices.h"

namespace {

const Choice *best() {
    for (const Choice &choice : CHOICES)
        if (choice.runs()) return &choice;
    return nullptr;
}

const Choice *chosen = best();
std::mutex running;  // kernels share scratch memory and all cores: one at a time

constexpr int64_t LARGEST = int64_t(1) << 40;  // elements of one operand: far beyond memory, far below overflow

bool fits(int64_t a, int64_t b) { return a >= 0 && b >= 0 && (b == 0 || a <= LARGEST / b); }
bool known(int type) { return type == MOESTRO_FLOAT32 || type == MOESTRO_BFLOAT16; }

// Every expert with slots must have addresses; matrices without values need none.
int check_experts(const void *const *gate_up, const void *const *down, const int64_t *token, const int64_t *offsets,
                  int64_t num_experts, int64_t num_tokens, int64_t hidden, int64_t width, int type, int threads) {
    if (!chosen) return MOESTRO_NO_ISA;
    if (!known(type)) return MOESTRO_BAD_TYPE;
    if (threads < 1) return MOESTRO_BAD_SIZE;
    if (!fits(hidden, width) || !fits(hidden * width, 2) || !fits(num_experts, 2 * hidden * width) ||
        !fits(num_tokens, hidden) || offsets[0] != 0)
        return MOESTRO_BAD_SIZE;
    for (int64_t e = 0; e < num_experts; e++)
        if (offsets[e + 1] < offsets[e]) return MOESTRO_BAD_SIZE;
    const int64_t slots = offsets[num_experts];
    if (!fits(slots, 2 * width) || !fits(slots, hidden)) return MOESTRO_BAD_SIZE;
    for (int64_t s = 0; s < slots; s++)
        if (token[s] < 0 || token[s] >= num_tokens) return MOESTRO_BAD_SIZE;
    for (int64_t e = 0; hidden * width && e < num_experts; e++)
        if (offsets[e] < offsets[e + 1] && (!gate_up[e] || !down[e])) return MOESTRO_NO_ADDRESS;
    return MOESTRO_OK;
}

bool known_kind(int kind) { return kind >= MOESTRO_KIND_FP32 && kind <= MOESTRO_KIND_FP8_BOTH; }
bool sane(int threads) { return threads >= 1 && threads <= 1024; }
bool fits(int64_t a, int64_t b, int64_t c) { return fits(a, b) && fits(a * b, c); }
// A packed matrix is padded to whole panels of 64 and blocks of at most 128.
bool fits_packed(int64_t groups, int64_t m, int64_t k) {
    return m >= 0 && k >= 0 && m <= LARGEST && k <= LARGEST && fits(groups, m + 63, k + 127);
}

// A rotated part consists of pairs.
bool fits_heads(int64_t rows, int64_t heads, int64_t plain, int64_t rotary) {
    return plain >= 0 && rotary >= 0 && rotary % 2 == 0 && plain <= LARGEST && rotary <= LARGEST &&
           fits(rows, heads, plain + rotary);
}

// Whether every row has ascending positions up to its own, at least one, then -1 to the end.
int check_selection(const PagedAttention &a) {
    if (a.selected < 1 || !fits(a.starts[a.num_sequences], a.selected) || !fits(a.selected + 63, a.page_width))
        return MOESTRO_BAD_SIZE;
    for (int64_t s = 0; s < a.num_sequences; s++)
        for (int64_t row = a.starts[s]; row < a.starts[s + 1]; row++) {
            const int32_t *positions = a.selection + row * a.selected;
            const int64_t own = a.first[s] + row - a.starts[s];
            for (int64_t i = 0; i < a.selected; i++) {
                const int64_t position = positions[i], before = i ? positions[i - 1] : 0;
                const bool ascends = position <= own && (i ? before >= 0 && position > before : position >= 0);
                if (!ascends && (i == 0 || position != -1)) return MOESTRO_BAD_SIZE;
            }
        }
    return MOESTRO_OK;
}

int check_attention(const PagedAttention &a, int64_t num_rows, int64_t num_pages) {
    if (!fits(num_rows, a.num_heads, a.key_width) || !fits(num_rows, a.num_heads, a.value_width + 63) ||
        !fits(num_pages, 64, a.page_width) || !fits(a.num_sequences, a.max_pages) || !fits(a.max_pages, 64))
        return MOESTRO_BAD_SIZE;
    if (a.groups < 1 || a.num_heads < 1 || a.num_heads % a.groups || a.page_width % a.groups) return MOESTRO_BAD_SIZE;
    const int64_t width = a.page_width / a.groups;
    if (a.value_width < 0 || a.value_offset < 0 || a.key_width > width || a.value_offset > width ||
        a.value_width > width - a.value_offset)
        return MOESTRO_BAD_SIZE;
    if (a.starts[0] != 0 || a.starts[a.num_sequences] != num_rows) return MOESTRO_BAD_SIZE;
    for (int64_t s = 0; s < a.num_sequences; s++) {
        const int64_t rows = a.starts[s + 1] - a.starts[s];
        if (rows < 0 || rows > num_rows || a.first[s] < 0 || a.first[s] > LARGEST) return MOESTRO_BAD_SIZE;
        if (rows == 0) continue;
        const int64_t last_page = (a.first[s] + rows - 1) / 64;
        if (last_page >= a.max_pages) return MOESTRO_BAD_SIZE;
        for (int64_t p = 0; p <= last_page; p++) {
            const int32_t page = a.tables[s * a.max_pages + p];
            if (page < 0 || page >= num_pages) return MOESTRO_BAD_SIZE;
        }
    }
    if (!a.selection) return a.selected && num_rows ? MOESTRO_BAD_SIZE : MOESTRO_OK;
    return check_selection(a);
}

// Vectors of `width` at these distances, `groups` to a row, do not overlap and fit the address space.
bool fits_vectors(int64_t rows, int64_t groups, int64_t width, int64_t row, int64_t group) {
    if (!fits(rows, row) || !fits(groups, group) || !fits(rows, groups, width)) return false;
    return groups == 0 || (group >= width && row >= (groups - 1) * group + width);
}

// Rows that lie within LARGEST elements of their first one.
bool fits_rows(int64_t rows, int64_t heads, int64_t width, const int64_t *strides) {
    return fits(rows, strides[0]) && fits(heads, strides[1]) && fits(rows, heads, width + 127);
}

int check_documents(const Documents &d, const int64_t *strides) {
    if (d.num_documents < 0 || d.num_documents > LARGEST || d.num_rows < 0 || d.num_heads < 1 || d.num_kv_heads < 1 ||
        d.num_heads % d.num_kv_heads)
        return MOESTRO_BAD_SIZE;
    if (d.key_width < 1 || d.value_width < 1 || d.key_width > LARGEST || d.value_width > LARGEST)
        return MOESTRO_BAD_SIZE;
    if (!fits_rows(d.num_rows, d.num_heads, d.key_width, strides) ||
        !fits_rows(d.num_rows, d.num_kv_heads, d.key_width, strides + 2) ||
        !fits_rows(d.num_rows, d.num_kv_heads, d.value_width, strides + 4))
        return MOESTRO_BAD_SIZE;
    if (!fits(d.num_rows, d.num_heads, d.value_width + 127) || d.starts[0] != 0 ||
        d.starts[d.num_documents] != d.num_rows)
        return MOESTRO_BAD_SIZE;
    for (int64_t s = 0; s < d.num_documents; s++)
        if (d.starts[s + 1] < d.starts[s]) return MOESTRO_BAD_SIZE;
    return MOESTRO_OK;
}

}  // namespace

const Kernels *kernels_in_use() { return chosen ? chosen->kernels : nullptr; }
std::mutex &kernel_lock() { return running; }

extern "C" {

uint32_t moestro_abi(void) { return MOESTRO_ABI; }

const char *moestro_isa(void) { return chosen ? chosen->name : ""; }

int moestro_set_isa(const char *name) {
    for (const Choice &choice : CHOICES)
        if (!strcmp(choice.name, name) && choice.runs()) {
            chosen = &choice;
            return MOESTRO_OK;
        }
    return MOESTRO_NO_ISA;
}

int moestro_matmul(void *out, const void *a, const void *b, int64_t m, int64_t n, int64_t k, int64_t out_stride,
                   int64_t a_stride, int64_t b_stride, int a_transposed, int b_transposed, int type, int out_type,
                   int threads) {
    if (!chosen) return MOESTRO_NO_ISA;
    if (!known(type) || !known(out_type)) return MOESTRO_BAD_TYPE;
    const int64_t a_rows = a_transposed ? k : m, a_columns = a_transposed ? m : k;
    const int64_t b_rows = b_transposed ? n : k, b_columns = b_transposed ? k : n;
    if (!fits(m, n) || !fits(m, k) || !fits(k, n) || !fits(m, out_stride) || !fits(a_rows, a_stride) ||
        !fits(b_rows, b_stride) || out_stride < n || a_stride < a_columns || b_stride < b_columns || threads < 1)
        return MOESTRO_BAD_SIZE;
    if (m == 0 || n == 0) return MOESTRO_OK;
    const std::lock_guard<std::mutex> lock(running);
    return chosen->kernels->matmul(out, a, b,
                                   {m, n, k, out_stride, a_stride, b_stride, a_transposed != 0, b_transposed != 0},
                                   type, out_type, threads);
}

int moestro_experts_forward(void *y, void *h, const void *x, const void *const *gate_up, const void *const *down,
                            const int64_t *token, const float *weights, const int64_t *offsets, int64_t num_experts,
                            int64_t num_tokens, int64_t hidden, int64_t width, int type, int threads) {
    if (const int error =
            check_experts(gate_up, down, token, offsets, num_experts, num_tokens, hidden, width, type, threads))
        return error;
    const std::lock_guard<std::mutex> lock(running);
    return chosen->kernels->experts_forward(
        {y, h, x, gate_up, down, token, weights, offsets, num_experts, hidden, width}, type, threads);
}

int moestro_experts_backward(void *dx, float *d_weights, void *const *d_gate_up, void *const *d_down, const void *dy,
                             const void *x, const void *h, const void *const *gate_up, const void *const *down,
                             const int64_t *token, const float *weights, const int64_t *offsets, int64_t num_experts,
                             int64_t num_tokens, int64_t hidden, int64_t width, int type, int threads) {
    if (const int error =
            check_experts(gate_up, down, token, offsets, num_experts, num_tokens, hidden, width, type, threads))
        return error;
    for (int64_t e = 0; hidden * width && e < num_experts; e++)
        if (!d_gate_up[e] || !d_down[e]) return MOESTRO_NO_ADDRESS;
    const std::lock_guard<std::mutex> lock(running);
    return chosen->kernels->experts_backward({dx, d_weights, d_gate_up, d_down, dy, x, h, gate_up, down, token, weights,
                                              offsets, num_experts, hidden, width},
                                             type, threads);
}

int moestro_combine(void *out, const void *y, const int64_t *slot, int64_t num_tokens, int64_t top_k, int64_t num_slots,
                    int64_t hidden, int type, int threads) {
    if (!chosen) return MOESTRO_NO_ISA;
    if (!known(type)) return MOESTRO_BAD_TYPE;
    if (!fits(num_tokens, top_k) || !fits(num_tokens, hidden) || !fits(num_slots, hidden) || threads < 1)
        return MOESTRO_BAD_SIZE;
    chosen->kernels->combine(out, y, slot, num_tokens, top_k, num_slots, hidden, type, threads);
    return MOESTRO_OK;
}

int moestro_multiply_in_registers(int64_t *operations, int64_t rounds, int type, int threads) {
    if (!chosen) return MOESTRO_NO_ISA;
    if (!known(type)) return MOESTRO_BAD_TYPE;
    if (rounds < 0 || rounds > LARGEST / 1024 || !sane(threads)) return MOESTRO_BAD_SIZE;
    *operations = chosen->kernels->multiply_in_registers(rounds, type, threads);
    return MOESTRO_OK;
}

int moestro_cross_entropy(float *nll, int64_t *argmax, void *d_hidden, float *d_weight, const void *hidden,
                          const void *weight, const int64_t *targets, const float *row_weights, int64_t num_rows,
                          int64_t vocabulary, int64_t width, int type, int threads) {
    if (!chosen) return MOESTRO_NO_ISA;
    if (!known(type)) return MOESTRO_BAD_TYPE;
    if (!fits(num_rows, width) || !fits(num_rows, vocabulary) || !fits_packed(1, vocabulary, width) || !sane(threads) ||
        (num_rows && vocabulary < 1))
        return MOESTRO_BAD_SIZE;
    for (int64_t i = 0; i < num_rows; i++)
        if (targets[i] >= vocabulary) return MOESTRO_BAD_SIZE;
    const std::lock_guard<std::mutex> lock(running);
    return chosen->kernels->cross_entropy(
        {nll, argmax, d_hidden, d_weight, hidden, weight, targets, row_weights, num_rows, vocabulary, width}, type,
        threads);
}

int moestro_pack(void *panels, const void *x, int64_t m, int64_t k, int kind, int type, int threads) {
    if (!chosen) return MOESTRO_NO_ISA;
    if (!known(type) || !known_kind(kind)) return MOESTRO_BAD_TYPE;
    if (!fits_packed(1, m, k) || !sane(threads)) return MOESTRO_BAD_SIZE;
    return chosen->kernels->pack(static_cast<char *>(panels), x, m, k, kind, type, threads);
}

int moestro_pack_codes(void *panels, const void *codes, const float *scales, int64_t m, int64_t k, int threads) {
    if (!chosen) return MOESTRO_NO_ISA;
    if (!fits_packed(1, m, k) || !sane(threads)) return MOESTRO_BAD_SIZE;
    return chosen->kernels->pack_codes(static_cast<char *>(panels), static_cast<const uint8_t *>(codes), scales, m, k,
                                       threads);
}

int moestro_packed_linear(void *out, const void *x, const void *panels, int64_t groups, int64_t n, int64_t m, int64_t k,
                          int kind, int type, int threads) {
    if (!chosen) return MOESTRO_NO_ISA;
    if (!known(type) || !known_kind(kind)) return MOESTRO_BAD_TYPE;
    if (!fits_packed(groups, m, k) || !fits(n, groups, m) || !fits(n, groups, k + 127) || !sane(threads))
        return MOESTRO_BAD_SIZE;
    if (n == 0 || m == 0 || groups == 0) return MOESTRO_OK;
    const std::lock_guard<std::mutex> lock(running);
    return chosen->kernels->packed_linear({out, x, static_cast<const char *>(panels), groups, n, m, k}, kind, type,
                                          threads);
}

int moestro_packed_experts(void *out, const void *x, const int64_t *ids, const float *weights,
                           const void *const *gate_up, const void *const *down, int64_t num_tokens, int64_t top_k,
                           int64_t num_experts, int64_t hidden, int64_t width, int kind, int type, int threads) {
    if (!chosen) return MOESTRO_NO_ISA;
    if (!known(type) || !known_kind(kind)) return MOESTRO_BAD_TYPE;
    if (!fits(num_tokens, top_k) || !fits(num_tokens * top_k, hidden + 127) || !fits(num_tokens, hidden) ||
        !fits(num_tokens * top_k, width + 127) || !sane(threads))
        return MOESTRO_BAD_SIZE;
    if (num_experts < 0 || num_experts > LARGEST || width > LARGEST / 4 ||
        !fits_packed(num_experts, 2 * width + 64, hidden) || !fits_packed(num_experts, hidden, width))
        return MOESTRO_BAD_SIZE;
    for (int64_t i = 0; i < num_tokens * top_k; i++)
        if (ids[i] < 0 || ids[i] > num_experts) return MOESTRO_BAD_SIZE;
    for (int64_t i = 0; hidden && width && i < num_tokens * top_k; i++)
        if (ids[i] < num_experts && (!gate_up[ids[i]] || !down[ids[i]])) return MOESTRO_NO_ADDRESS;
    const std::lock_guard<std::mutex> lock(running);
    return chosen->kernels->packed_experts(
        {out, x, ids, weights, gate_up, down, num_tokens, top_k, num_experts, hidden, width}, kind, type, threads);
}

int moestro_paged_attention(void *out, const void *q, const void *pages, const int32_t *tables, const int64_t *starts,
                            const int64_t *first, int64_t num_rows, int64_t num_pages, int64_t num_sequences,
                            int64_t max_pages, int64_t num_heads, int64_t key_width, int64_t value_width,
                            int64_t page_width, int64_t groups, int64_t value_offset, const int32_t *selection,
                            int64_t selected, float scale, int page_type, int type, int threads) {
    if (!chosen) return MOESTRO_NO_ISA;
    const bool fp8 = page_type == MOESTRO_FP8_ROWS;
    if (!known(type) || (!fp8 && page_type != type)) return MOESTRO_BAD_TYPE;
    const int64_t values = fp8 ? key_width : page_width;
    const PagedAttention arguments = {out,       q,         pages,     tables,      starts, first,  num_sequences,
                                      max_pages, num_heads, key_width, value_width, values, groups, value_offset,
                                      selection, selected,  scale,     fp8};
    if (num_sequences < 0 || !sane(threads)) return MOESTRO_BAD_SIZE;
    if (const int error = check_attention(arguments, num_rows, num_pages)) return error;
    if (fp8 && (groups != 1 || value_offset != 0 || key_width > LARGEST ||
                page_width != fp8_row_bytes(value_width, key_width)))
        return MOESTRO_BAD_SIZE;
    const std::lock_guard<std::mutex> lock(running);
    return chosen->kernels->paged_attention(arguments, type, threads);
}

int moestro_store_fp8_rows(void *pages, const void *x, const int64_t *slots, int64_t num_rows, int64_t num_pages,
                           int64_t row_bytes, int64_t width, int64_t coded, int type, int threads) {
    if (!chosen) return MOESTRO_NO_ISA;
    if (!known(type)) return MOESTRO_BAD_TYPE;
    if (!fits(num_rows, width) || !fits(num_pages, 64, row_bytes) || coded < 0 || coded > width || width > LARGEST ||
        row_bytes != fp8_row_bytes(coded, width) || !sane(threads))
        return MOESTRO_BAD_SIZE;
    for (int64_t i = 0; i < num_rows; i++)
        if (slots[i] < 0 || slots[i] / 64 >= num_pages) return MOESTRO_BAD_SIZE;
    chosen->kernels->store_fp8_rows({static_cast<char *>(pages), x, slots, num_rows, width, coded}, type, threads);
    return MOESTRO_OK;
}

int moestro_rms_norm(void *out, const void *x, const void *weight, int64_t rows, int64_t width, float eps, int type,
                     int weight_type, int threads) {
    if (!chosen) return MOESTRO_NO_ISA;
    if (!known(type) || !known(weight_type)) return MOESTRO_BAD_TYPE;
    if (!fits(rows, width) || !sane(threads)) return MOESTRO_BAD_SIZE;
    chosen->kernels->rms_norm(out, x, weight, rows, width, eps, type, weight_type, threads);
    return MOESTRO_OK;
}

int moestro_swiglu(void *out, const void *gate_up, int64_t rows, int64_t width, int type, int threads) {
    if (!chosen) return MOESTRO_NO_ISA;
    if (!known(type)) return MOESTRO_BAD_TYPE;
    if (!fits(rows, width, 2) || !sane(threads)) return MOESTRO_BAD_SIZE;
    chosen->kernels->swiglu(out, gate_up, rows, width, type, threads);
    return MOESTRO_OK;
}

int moestro_rope(void *out, const void *x, const float *cos, const float *sin, int64_t rows, int64_t groups,
                 int64_t width, int64_t out_row, int64_t out_group, int64_t x_row, int64_t x_group, int inverse,
                 int type, int threads) {
    if (!chosen) return MOESTRO_NO_ISA;
    if (!known(type)) return MOESTRO_BAD_TYPE;
    if (width % 2 || !fits_vectors(rows, groups, width, out_row, out_group) ||
        !fits_vectors(rows, groups, width, x_row, x_group) || !sane(threads))
        return MOESTRO_BAD_SIZE;
    chosen->kernels->rope({out, x, cos, sin, rows, groups, width, out_row, out_group, x_row, x_group, inverse != 0},
                          type, threads);
    return MOESTRO_OK;
}

int moestro_route(int64_t *ids, float *weights, const float *logits, const float *bias, int64_t rows,
                  int64_t num_experts, int64_t num_groups, int64_t top_k_groups, int64_t top_k, float scale,
                  int function, int group_best, int multiply, int normalize, int given, int threads) {
    if (!chosen) return MOESTRO_NO_ISA;
    if (function < MOESTRO_SIGMOID || function > MOESTRO_CONSTANT) return MOESTRO_BAD_TYPE;
    if (!fits(rows, num_experts) || num_experts < 1 || num_groups < 1 || num_experts % num_groups || !sane(threads))
        return MOESTRO_BAD_SIZE;
    if (top_k_groups < 1 || top_k_groups > num_groups || top_k < 0 || group_best < 1 || group_best > 2)
        return MOESTRO_BAD_SIZE;
    if (top_k > num_experts / num_groups * top_k_groups) return MOESTRO_BAD_SIZE;
    for (int64_t i = 0; given && i < rows * top_k; i++)
        if ((ids[i] < 0 && ids[i / top_k * top_k] != -1) || ids[i] >= num_experts) return MOESTRO_BAD_SIZE;
    return chosen->kernels->route({ids, weights, logits, bias, rows, num_experts, num_groups, top_k_groups, top_k,
                                   scale, function, group_best, multiply != 0, normalize != 0, given != 0},
                                  threads);
}

int moestro_add(void *out, const void *a, const void *b, int64_t rows, int64_t width, int type, int threads) {
    if (!chosen) return MOESTRO_NO_ISA;
    if (!known(type)) return MOESTRO_BAD_TYPE;
    if (!fits(rows, width) || !sane(threads)) return MOESTRO_BAD_SIZE;
    chosen->kernels->add(out, a, b, rows, width, type, threads);
    return MOESTRO_OK;
}

int moestro_flash_forward(void *out, float *log_sums, const void *q, const void *k, const void *v,
                          const int64_t *starts, const int64_t *strides, int64_t num_documents, int64_t num_rows,
                          int64_t num_heads, int64_t num_kv_heads, int64_t key_width, int64_t value_width, float scale,
                          int type, int threads) {
    if (!chosen) return MOESTRO_NO_ISA;
    if (!known(type)) return MOESTRO_BAD_TYPE;
    const Documents documents = {starts,       num_documents, num_rows,    num_heads,
                                 num_kv_heads, key_width,     value_width, scale};
    if (!sane(threads)) return MOESTRO_BAD_SIZE;
    if (const int error = check_documents(documents, strides)) return error;
    if (num_rows == 0) return MOESTRO_OK;
    const std::lock_guard<std::mutex> lock(running);
    return chosen->kernels->flash_forward({out,
                                           log_sums,
                                           {q, strides[0], strides[1]},
                                           {k, strides[2], strides[3]},
                                           {v, strides[4], strides[5]},
                                           documents},
                                          type, threads);
}

int moestro_flash_backward(void *dq, void *dk, void *dv, const void *d_out, const void *q, const void *k, const void *v,
                           const void *out, const float *log_sums, const int64_t *starts, const int64_t *strides,
                           int64_t num_documents, int64_t num_rows, int64_t num_heads, int64_t num_kv_heads,
                           int64_t key_width, int64_t value_width, float scale, int type, int threads) {
    if (!chosen) return MOESTRO_NO_ISA;
    if (!known(type)) return MOESTRO_BAD_TYPE;
    const Documents documents = {starts,       num_documents, num_rows,    num_heads,
                                 num_kv_heads, key_width,     value_width, scale};
    if (!sane(threads)) return MOESTRO_BAD_SIZE;
    if (const int error = check_documents(documents, strides)) return error;
    if (!fits_rows(num_rows, num_heads, value_width, strides + 6)) return MOESTRO_BAD_SIZE;
    if (num_rows == 0) return MOESTRO_OK;
    const std::lock_guard<std::mutex> lock(running);
    return chosen->kernels->flash_backward({dq,
                                            dk,
                                            dv,
                                            {d_out, strides[6], strides[7]},
                                            {q, strides[0], strides[1]},
                                            {k, strides[2], strides[3]},
                                            {v, strides[4], strides[5]},
                                            out,
                                            log_sums,
                                            nullptr,
                                            documents},
                                           type, threads);
}

int moestro_rms_norm_backward(void *dx, void *d_weight, const void *dy, const void *x, const void *weight, int64_t rows,
                              int64_t width, float eps, int type, int weight_type, int threads) {
    if (!chosen) return MOESTRO_NO_ISA;
    if (!known(type) || !known(weight_type)) return MOESTRO_BAD_TYPE;
    if (!fits(rows, width) || !fits(width, 64) || !sane(threads)) return MOESTRO_BAD_SIZE;
    const std::lock_guard<std::mutex> lock(running);
    return chosen->kernels->rms_norm_backward({dx, d_weight, dy, x, weight, rows, width, eps}, type, weight_type,
                                              threads);
}

int moestro_swiglu_backward(void *d_gate_up, const void *dy, const void *gate_up, int64_t rows, int64_t width, int type,
                            int threads) {
    if (!chosen) return MOESTRO_NO_ISA;
    if (!known(type)) return MOESTRO_BAD_TYPE;
    if (!fits(rows, width, 2) || !sane(threads)) return MOESTRO_BAD_SIZE;
    chosen->kernels->swiglu_backward(d_gate_up, dy, gate_up, rows, width, type, threads);
    return MOESTRO_OK;
}

int moestro_join_heads(void *out, const void *plain, const void *rotary, const float *cos, const float *sin,
                       int64_t rows, int64_t heads, int64_t plain_width, int64_t rotary_width, int64_t plain_row,
                       int64_t plain_head, int64_t rotary_row, int64_t rotary_head, int type, int threads) {
    if (!chosen) return MOESTRO_NO_ISA;
    if (!known(type)) return MOESTRO_BAD_TYPE;
    if (!fits_heads(rows, heads, plain_width, rotary_width) || !sane(threads)) return MOESTRO_BAD_SIZE;
    if (plain_row < 0 || plain_head < 0 || rotary_row < 0 || rotary_head < 0) return MOESTRO_BAD_SIZE;
    if (!fits(rows, plain_row) || !fits(heads, plain_head) || !fits(rows, rotary_row) || !fits(heads, rotary_head))
        return MOESTRO_BAD_SIZE;
    chosen->kernels->join_heads({out, plain, rotary, cos, sin, rows, heads, plain_width, rotary_width, plain_row,
                                 plain_head, rotary_row, rotary_head},
                                type, threads);
    return MOESTRO_OK;
}

int moestro_split_heads(void *d_plain, void *d_rotary, const void *d_out, const float *cos, const float *sin,
                        int64_t rows, int64_t heads, int64_t plain_width, int64_t rotary_width, int shared, int type,
                        int threads) {
    if (!chosen) return MOESTRO_NO_ISA;
    if (!known(type)) return MOESTRO_BAD_TYPE;
    if (!fits_heads(rows, heads, plain_width, rotary_width) || !sane(threads)) return MOESTRO_BAD_SIZE;
    chosen->kernels->split_heads(
        {d_plain, d_rotary, d_out, cos, sin, rows, heads, plain_width, rotary_width, shared != 0}, type, threads);
    return MOESTRO_OK;
}

}  // extern "C"
