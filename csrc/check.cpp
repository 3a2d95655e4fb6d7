// Runs every kernel on every instruction set of this machine with buffers that end exactly where the sizes say, for
// AddressSanitizer and UBSan; compares fp32 products with plain loops. Built and run by tests/ops/test_native_memory.py.
#include <cmath>
#include <cstdio>
#include <vector>

#include "moestro.h"

namespace {

uint64_t state = 1;

float random_value() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return float(int32_t(state >> 33) % 1000) / 500.0f - 1.0f;
}

template <class T> std::vector<T> random_vector(int64_t count);
template <> std::vector<float> random_vector(int64_t count) {
    std::vector<float> v(count);
    for (float &x : v) x = random_value();
    return v;
}
template <> std::vector<uint16_t> random_vector(int64_t count) {
    std::vector<uint16_t> v(count);
    for (uint16_t &x : v) x = uint16_t(0x3f00 + (int(random_value() * 100) & 0x80ff));
    return v;
}

template <class T> constexpr int TYPE = sizeof(T) == 4 ? MOESTRO_FLOAT32 : MOESTRO_BFLOAT16;

template <class T> int check_matmul(int64_t m, int64_t n, int64_t k, bool a_turned, bool b_turned) {
    const int64_t pad = 1;  // an odd stride: rows of bf16 at addresses that are no multiple of four
    const int64_t a_stride = (a_turned ? m : k) + pad, b_stride = (b_turned ? k : n) + pad;
    const auto extent = [](int64_t rows, int64_t columns, int64_t stride) { return rows && columns ? (rows - 1) * stride + columns : 0; };
    const auto a = random_vector<T>(extent(a_turned ? k : m, a_turned ? m : k, a_stride));
    const auto b = random_vector<T>(extent(b_turned ? n : k, b_turned ? k : n, b_stride));
    std::vector<float> out(m * n);
    if (moestro_matmul(out.data(), a.data(), b.data(), m, n, k, n, a_stride, b_stride, a_turned, b_turned, TYPE<T>, MOESTRO_FLOAT32, 2)) return 1;
    if (sizeof(T) != 4) return 0;
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            double sum = 0;
            for (int64_t l = 0; l < k; l++) sum += double(a[a_turned ? l * a_stride + i : i * a_stride + l]) * b[b_turned ? j * b_stride + l : l * b_stride + j];
            if (std::fabs(sum - out[i * n + j]) > 1e-4) return 1;
        }
    return 0;
}

template <class T> int check_experts(int64_t num_tokens, int64_t hidden, int64_t width, std::vector<int64_t> loads) {
    const int64_t num_experts = int64_t(loads.size());
    std::vector<int64_t> offsets{0}, token, slot;
    for (int64_t load : loads) offsets.push_back(offsets.back() + load);
    const int64_t slots = offsets.back();
    for (int64_t s = 0; s < slots; s++) token.push_back(s % num_tokens);
    for (int64_t n = 0; n < num_tokens; n++) slot.push_back(n % 3 ? n : slots);  // some choices are not carried out
    const auto x = random_vector<T>(num_tokens * hidden), dy = random_vector<T>(num_tokens * hidden);
    const auto gate_up = random_vector<T>(num_experts * 2 * width * hidden), down = random_vector<T>(num_experts * hidden * width);
    const auto weights = random_vector<float>(slots);
    std::vector<T> y(slots * hidden), h(slots * 2 * width), dx(slots * hidden), d_gate_up(gate_up.size()), d_down(down.size()), out(num_tokens * hidden);
    std::vector<float> d_weights(slots);
    int bad = moestro_experts_forward(y.data(), h.data(), x.data(), gate_up.data(), down.data(), token.data(), weights.data(), offsets.data(), num_experts, num_tokens, hidden, width, TYPE<T>, 2);
    bad |= moestro_experts_backward(dx.data(), d_weights.data(), d_gate_up.data(), d_down.data(), dy.data(), x.data(), h.data(), gate_up.data(), down.data(), token.data(), weights.data(), offsets.data(), num_experts, num_tokens, hidden, width, TYPE<T>, 2);
    return bad | moestro_combine(out.data(), y.data(), slot.data(), num_tokens, 1, slots, hidden, TYPE<T>, 2);
}

template <class T> int check_type() {
    int bad = 0;
    for (int turned = 0; turned < 4; turned++) {
        bad |= check_matmul<T>(1, 1, 1, turned & 1, turned & 2);
        bad |= check_matmul<T>(7, 65, 3, turned & 1, turned & 2);
        bad |= check_matmul<T>(101, 17, 40, turned & 1, turned & 2);
        bad |= check_matmul<T>(5, 9, 1031, turned & 1, turned & 2);
        bad |= check_matmul<T>(0, 5, 4, turned & 1, turned & 2);
        bad |= check_matmul<T>(5, 0, 4, turned & 1, turned & 2);
        bad |= check_matmul<T>(5, 4, 0, turned & 1, turned & 2);
    }
    bad |= check_experts<T>(11, 8, 4, {3, 0, 8});
    bad |= check_experts<T>(11, 33, 17, {0, 200, 1});
    bad |= check_experts<T>(1, 70, 65, {0, 0, 1});
    bad |= check_experts<T>(3, 1, 1, {0, 0});
    return bad;
}

}  // namespace

int main() {
    int paths = 0;
    for (const char *isa : {"avx2", "avx512", "avx512bf16"}) {
        if (moestro_set_isa(isa)) continue;
        paths++;
        if (check_type<float>() | check_type<uint16_t>()) return std::printf("%s: wrong\n", isa), 1;
    }
    std::printf("%d paths\n", paths);
    return 0;
}
