// The C ABI: picks the instruction set by cpuid and XGETBV, checks every size that reaches address arithmetic.
#include "moestro.h"

#include <cpuid.h>
#include <cstring>
#include <mutex>

#include "table.h"

extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512bf16;

namespace {

struct Choice {
    const char *name;
    const Kernels *kernels;
    bool (*runs)();
};

struct Registers {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned sub) {
    Registers r;
    if (__get_cpuid_max(0, nullptr) >= leaf) __cpuid_count(leaf, sub, r.eax, r.ebx, r.ecx, r.edx);
    return r;
}

bool bit(unsigned word, int index) { return word >> index & 1; }

// Registers that the operating system saves: bits of XCR0.
uint64_t saved_state() {
    if (!bit(cpuid(1, 0).ecx, 27)) return 0;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t(high) << 32 | low;
}

bool runs_avx2() {
    const Registers one = cpuid(1, 0), seven = cpuid(7, 0);
    return (saved_state() & 0x6) == 0x6 && bit(one.ecx, 12) && bit(one.ecx, 28) && bit(seven.ebx, 5);
}

bool runs_avx512() {
    const unsigned ebx = cpuid(7, 0).ebx;
    return runs_avx2() && (saved_state() & 0xe6) == 0xe6 && bit(ebx, 16) && bit(ebx, 17) && bit(ebx, 30) && bit(ebx, 31);
}

bool runs_avx512bf16() { return runs_avx512() && bit(cpuid(7, 1).eax, 5); }

const Choice CHOICES[] = {
    {"avx512bf16", &kernels_avx512bf16, runs_avx512bf16},
    {"avx512", &kernels_avx512, runs_avx512},
    {"avx2", &kernels_avx2, runs_avx2},
};

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

int check_experts(const int64_t *token, const int64_t *offsets, int64_t num_experts, int64_t num_tokens, int64_t hidden,
                  int64_t width) {
    if (!fits(hidden, width) || !fits(hidden * width, 2) || !fits(num_experts, 2 * hidden * width) || !fits(num_tokens, hidden) || offsets[0] != 0) return MOESTRO_BAD_SIZE;
    for (int64_t e = 0; e < num_experts; e++)
        if (offsets[e + 1] < offsets[e]) return MOESTRO_BAD_SIZE;
    const int64_t slots = offsets[num_experts];
    if (!fits(slots, 2 * width) || !fits(slots, hidden)) return MOESTRO_BAD_SIZE;
    for (int64_t s = 0; s < slots; s++)
        if (token[s] < 0 || token[s] >= num_tokens) return MOESTRO_BAD_SIZE;
    return MOESTRO_OK;
}

}  // namespace

extern "C" {

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
    if (!fits(m, n) || !fits(m, k) || !fits(k, n) || !fits(m, out_stride) || !fits(a_rows, a_stride) || !fits(b_rows, b_stride) || out_stride < n || a_stride < a_columns || b_stride < b_columns || threads < 1) return MOESTRO_BAD_SIZE;
    if (m == 0 || n == 0) return MOESTRO_OK;
    const std::lock_guard<std::mutex> lock(running);
    return chosen->kernels->matmul(out, a, b, {m, n, k, out_stride, a_stride, b_stride, a_transposed != 0, b_transposed != 0}, type, out_type, threads);
}

int moestro_experts_forward(void *y, void *h, const void *x, const void *gate_up, const void *down,
                            const int64_t *token, const float *weights, const int64_t *offsets, int64_t num_experts,
                            int64_t num_tokens, int64_t hidden, int64_t width, int type, int threads) {
    if (!chosen) return MOESTRO_NO_ISA;
    if (!known(type)) return MOESTRO_BAD_TYPE;
    if (threads < 1) return MOESTRO_BAD_SIZE;
    if (const int error = check_experts(token, offsets, num_experts, num_tokens, hidden, width)) return error;
    const std::lock_guard<std::mutex> lock(running);
    return chosen->kernels->experts_forward({y, h, x, gate_up, down, token, weights, offsets, num_experts, hidden, width}, type, threads);
}

int moestro_experts_backward(void *dx, float *d_weights, void *d_gate_up, void *d_down, const void *dy, const void *x,
                             const void *h, const void *gate_up, const void *down, const int64_t *token,
                             const float *weights, const int64_t *offsets, int64_t num_experts, int64_t num_tokens,
                             int64_t hidden, int64_t width, int type, int threads) {
    if (!chosen) return MOESTRO_NO_ISA;
    if (!known(type)) return MOESTRO_BAD_TYPE;
    if (threads < 1) return MOESTRO_BAD_SIZE;
    if (const int error = check_experts(token, offsets, num_experts, num_tokens, hidden, width)) return error;
    const std::lock_guard<std::mutex> lock(running);
    return chosen->kernels->experts_backward({dx, d_weights, d_gate_up, d_down, dy, x, h, gate_up, down, token, weights, offsets, num_experts, hidden, width}, type, threads);
}

int moestro_combine(void *out, const void *y, const int64_t *slot, int64_t num_tokens, int64_t top_k, int64_t num_slots,
                    int64_t hidden, int type, int threads) {
    if (!chosen) return MOESTRO_NO_ISA;
    if (!known(type)) return MOESTRO_BAD_TYPE;
    if (!fits(num_tokens, top_k) || !fits(num_tokens, hidden) || !fits(num_slots, hidden) || threads < 1) return MOESTRO_BAD_SIZE;
    chosen->kernels->combine(out, y, slot, num_tokens, top_k, num_slots, hidden, type, threads);
    return MOESTRO_OK;
}

}  // extern "C"
