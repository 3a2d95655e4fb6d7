// Runs every kernel on every instruction set of this machine with buffers that end exactly where the sizes say, for
// AddressSanitizer and UBSan; compares fp32 products with plain loops. Built and run by
// tests/ops/test_native_memory.py.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "abi/moestro.h"

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
    const auto extent = [](int64_t rows, int64_t columns, int64_t stride) {
        return rows && columns ? (rows - 1) * stride + columns : 0;
    };
    const auto a = random_vector<T>(extent(a_turned ? k : m, a_turned ? m : k, a_stride));
    const auto b = random_vector<T>(extent(b_turned ? n : k, b_turned ? k : n, b_stride));
    std::vector<float> out(m * n);
    if (moestro_matmul(out.data(), a.data(), b.data(), m, n, k, n, a_stride, b_stride, a_turned, b_turned, TYPE<T>,
                       MOESTRO_FLOAT32, 2))
        return 1;
    if (sizeof(T) != 4) return 0;
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            double sum = 0;
            for (int64_t l = 0; l < k; l++)
                sum += double(a[a_turned ? l * a_stride + i : i * a_stride + l]) *
                       b[b_turned ? j * b_stride + l : l * b_stride + j];
            if (std::fabs(sum - out[i * n + j]) > 1e-4) return 1;
        }
    return 0;
}

// Each matrix has its own allocation that ends with it; kernels get the addresses.
template <class T> struct Matrices {
    std::vector<std::vector<T>> values;
    std::vector<void *> to;
    std::vector<const void *> addresses;
    Matrices(int64_t count, int64_t size) {
        for (int64_t e = 0; e < count; e++) values.push_back(random_vector<T>(size));
        for (auto &matrix : values) to.push_back(matrix.data());
        addresses.assign(to.begin(), to.end());
    }
};

template <class T> int check_experts(int64_t num_tokens, int64_t hidden, int64_t width, std::vector<int64_t> loads) {
    const int64_t num_experts = int64_t(loads.size());
    std::vector<int64_t> offsets{0}, token, slot;
    for (int64_t load : loads) offsets.push_back(offsets.back() + load);
    const int64_t slots = offsets.back();
    for (int64_t s = 0; s < slots; s++) token.push_back(s % num_tokens);
    for (int64_t n = 0; n < num_tokens; n++) slot.push_back(n % 3 ? n : slots);  // some choices are skipped
    const auto x = random_vector<T>(num_tokens * hidden), dy = random_vector<T>(num_tokens * hidden);
    Matrices<T> gate_up(num_experts, 2 * width * hidden), down(num_experts, hidden * width),
        d_gate_up(num_experts, 2 * width * hidden), d_down(num_experts, hidden * width);
    for (int64_t e = 0; e < num_experts; e++)  // nobody reads an expert without slots
        if (!loads[e]) gate_up.addresses[e] = down.addresses[e] = nullptr;
    const auto weights = random_vector<float>(slots);
    std::vector<T> y(slots * hidden), h(slots * 2 * width), dx(slots * hidden), out(num_tokens * hidden);
    std::vector<float> d_weights(slots);
    int bad = moestro_experts_forward(y.data(), h.data(), x.data(), gate_up.addresses.data(), down.addresses.data(),
                                      token.data(), weights.data(), offsets.data(), num_experts, num_tokens, hidden,
                                      width, TYPE<T>, 2);
    bad |= moestro_experts_backward(dx.data(), d_weights.data(), d_gate_up.to.data(), d_down.to.data(), dy.data(),
                                    x.data(), h.data(), gate_up.addresses.data(), down.addresses.data(), token.data(),
                                    weights.data(), offsets.data(), num_experts, num_tokens, hidden, width, TYPE<T>, 2);
    return bad | moestro_combine(out.data(), y.data(), slot.data(), num_tokens, 1, slots, hidden, TYPE<T>, 2);
}

template <class T> int check_head(int64_t rows, int64_t vocabulary, int64_t width) {
    const auto hidden = random_vector<T>(rows * width), weight = random_vector<T>(vocabulary * width);
    std::vector<int64_t> targets, argmax(rows);
    for (int64_t i = 0; i < rows; i++) targets.push_back(i % 3 ? i % vocabulary : -100);
    std::vector<float> nll(rows), d_weight(weight.size()), row_weights(rows, 0.5f);
    std::vector<T> d_hidden(hidden.size());
    int bad =
        moestro_cross_entropy(nll.data(), argmax.data(), d_hidden.data(), d_weight.data(), hidden.data(), weight.data(),
                              targets.data(), row_weights.data(), rows, vocabulary, width, TYPE<T>, 2);
    return bad | moestro_cross_entropy(nll.data(), argmax.data(), nullptr, nullptr, hidden.data(), weight.data(),
                                       targets.data(), nullptr, rows, vocabulary, width, TYPE<T>, 2);
}

// Bytes of a packed matrix, from the table in moestro/ops/serving/formats.py.
int64_t packed_bytes(int64_t m, int64_t k, int kind) {
    const int64_t length[] = {1, 2, 64, 32, 128, 128}, bytes[] = {256, 256, 4224, 1152, 8448, 8448};
    return (m + 63) / 64 * ((k + length[kind] - 1) / length[kind]) * bytes[kind];
}

template <class T> int check_pack(int64_t m, int64_t k, int kind) {
    const auto x = random_vector<T>(m * k);
    std::vector<char> panels(packed_bytes(m, k, kind));
    return moestro_pack(panels.data(), x.data(), m, k, kind, TYPE<T>, 2);
}

int check_pack_codes(int64_t m, int64_t k) {
    const std::vector<uint8_t> codes(m * k, 0x38);
    const auto scales = random_vector<float>(m * ((k + 127) / 128));
    std::vector<char> panels(packed_bytes(m, k, MOESTRO_KIND_FP8));
    return moestro_pack_codes(panels.data(), codes.data(), scales.data(), m, k, 2);
}

// Any bytes are a valid packed matrix; those of floats and scales are made small here.
std::vector<uint16_t> random_panels(int64_t bytes) { return random_vector<uint16_t>(bytes / 2); }

template <class T> int check_linear(int64_t groups, int64_t n, int64_t m, int64_t k, int kind) {
    const auto x = random_vector<T>(n * groups * k);
    const auto panels = random_panels(groups * packed_bytes(m, k, kind));
    std::vector<T> out(n * groups * m), one(groups * m);
    int bad = moestro_packed_linear(out.data(), x.data(), panels.data(), groups, n, m, k, kind, TYPE<T>, 2);
    if (n == 0) return bad;
    const T *last = x.data() + (n - 1) * groups * k;  // a lone row, its memory ending with it
    bad |= moestro_packed_linear(one.data(), std::vector<T>(last, last + groups * k).data(), panels.data(), groups, 1,
                                 m, k, kind, TYPE<T>, 1);
    return bad | (groups * m && memcmp(one.data(), out.data() + (n - 1) * groups * m, sizeof(T) * groups * m));
}

template <class T> int check_packed_experts(int64_t num_tokens, int64_t top_k, int64_t num_experts, int64_t hidden,
                                            int64_t width, int kind) {
    const auto x = random_vector<T>(num_tokens * hidden);
    Matrices<uint16_t> up(num_experts, packed_bytes((width + 31) / 32 * 64, hidden, kind) / 2),
        down(num_experts, packed_bytes(hidden, width, kind) / 2);
    const auto weights = random_vector<float>(num_tokens * top_k);
    std::vector<int64_t> ids(num_tokens * top_k);
    for (size_t i = 0; i < ids.size(); i++) ids[i] = int64_t(i * i) % (num_experts + 1);
    std::vector<T> out(x.size());
    const auto run = [&] {
        return moestro_packed_experts(out.data(), x.data(), ids.data(), weights.data(), up.addresses.data(),
                                      down.addresses.data(), num_tokens, top_k, num_experts, hidden, width, kind,
                                      TYPE<T>, 2);
    };
    const int bad = run();
    if (ids.empty()) return bad;
    up.addresses[ids[0]] = nullptr;  // of an expert that is chosen
    return bad | (run() != MOESTRO_NO_ADDRESS);
}

// Sequences of these lengths, whose last rows query; every page is used to its end.
template <class T> int check_attention(std::vector<int64_t> lengths, int64_t rows, int64_t heads, int64_t groups,
                                       int64_t key, int64_t value) {
    std::vector<int64_t> starts{0}, first;
    int64_t num_pages = 0, max_pages = 1;
    for (int64_t length : lengths) {
        starts.push_back(starts.back() + std::min(rows, length));
        first.push_back(length - std::min(rows, length));
        max_pages = std::max(max_pages, (length + 63) / 64);
        num_pages += (length + 63) / 64;
    }
    std::vector<int32_t> tables(lengths.size() * max_pages, -1);
    int64_t next = num_pages;
    for (size_t s = 0; s < lengths.size(); s++)
        for (int64_t p = 0; p < (lengths[s] + 63) / 64; p++) tables[s * max_pages + p] = int32_t(--next);
    const int64_t page_width = groups * (key + value), num_rows = starts.back();
    const auto q = random_vector<T>(num_rows * heads * key), pages = random_vector<T>(num_pages * 64 * page_width);
    std::vector<T> out(num_rows * heads * value), selected(out.size());
    const auto run = [&](std::vector<T> &to, const int32_t *selection, int64_t count) {
        return moestro_paged_attention(to.data(), q.data(), pages.data(), tables.data(), starts.data(), first.data(),
                                       num_rows, num_pages, int64_t(lengths.size()), max_pages, heads, key, value,
                                       page_width, groups, key, selection, count, 0.1f, TYPE<T>, TYPE<T>, 2);
    };
    int bad = run(out, nullptr, 0);
    if (num_rows == 0) return bad;
    // all positions, which must give the same bits; then the last one alone; then one beyond it
    const int64_t longest = *std::max_element(lengths.begin(), lengths.end());
    std::vector<int32_t> all(num_rows * longest, -1), last;
    for (size_t s = 0; s < lengths.size(); s++)
        for (int64_t row = starts[s]; row < starts[s + 1]; row++) {
            last.push_back(int32_t(first[s] + row - starts[s]));
            for (int32_t p = 0; p <= last.back(); p++) all[row * longest + p] = p;
        }
    bad |= run(selected, all.data(), longest) | memcmp(out.data(), selected.data(), sizeof(T) * out.size());
    bad |= run(selected, last.data(), 1);
    last.back()++;
    return bad | (run(selected, last.data(), 1) != MOESTRO_BAD_SIZE);
}

// Rows go to the last slots of an FP8 cache; what queries see there is the same with a selection of all positions.
template <class T> int check_fp8_rows(int64_t rows, int64_t coded, int64_t rest) {
    const int64_t width = coded + rest, row_bytes = coded + (coded + 127) / 128 * 4 + 2 * rest, heads = 3,
                  num_pages = (rows + 63) / 64;
    auto x = random_vector<T>(rows * width);
    const auto q = random_vector<T>(heads * width);
    std::vector<char> pages(num_pages * 64 * row_bytes);
    std::vector<int64_t> slots(rows);
    std::vector<int32_t> tables(num_pages), all(rows);
    for (int64_t i = 0; i < rows; i++) all[i] = int32_t(i), slots[i] = (num_pages - 1 - i / 64) * 64 + i % 64;
    for (int64_t p = 0; p < num_pages; p++) tables[p] = int32_t(num_pages - 1 - p);
    const auto store = [&] {
        return moestro_store_fp8_rows(pages.data(), x.data(), slots.data(), rows, num_pages, row_bytes, width, coded,
                                      TYPE<T>, 2);
    };
    int bad = store();
    if (rows == 0) return bad;
    const int64_t starts[] = {0, 1}, first[] = {rows - 1};
    std::vector<T> out(heads * coded), selected(out.size());
    const auto run = [&](std::vector<T> &to, const int32_t *selection, int64_t count, int64_t bytes) {
        return moestro_paged_attention(to.data(), q.data(), pages.data(), tables.data(), starts, first, 1, num_pages, 1,
                                       num_pages, heads, width, coded, bytes, 1, 0, selection, count, 0.1f,
                                       MOESTRO_FP8_ROWS, TYPE<T>, 2);
    };
    bad |= run(out, nullptr, 0, row_bytes) | run(selected, all.data(), rows, row_bytes);
    bad |= run(selected, nullptr, 0, row_bytes + 1) != MOESTRO_BAD_SIZE;
    for (int64_t i = 0; i < heads * coded; i++) bad |= out[i] != selected[i];
    slots[rows - 1] = num_pages * 64;
    return bad | (store() != MOESTRO_BAD_SIZE);
}

template <class T> int check_rows(int64_t rows, int64_t width) {
    const auto x = random_vector<T>(rows * width), both = random_vector<T>(rows * 2 * width),
               weight = random_vector<T>(width);
    std::vector<T> out(x.size());
    int bad = moestro_rms_norm(out.data(), x.data(), weight.data(), rows, width, 1e-6f, TYPE<T>, TYPE<T>, 2);
    bad |= moestro_swiglu(out.data(), both.data(), rows, width, TYPE<T>, 2);
    return bad;
}

// Vectors a little apart, the last one ending with its memory; rotated there and back.
template <class T> int check_rope(int64_t rows, int64_t groups, int64_t width) {
    const int64_t apart = width + 1, row = groups * apart + 3,
                  extent = rows && groups ? (rows - 1) * row + (groups - 1) * apart + width : 0;
    const auto x = random_vector<T>(extent);
    const std::vector<float> cos(rows * width / 2, 0.6f), sin(rows * width / 2, 0.8f);
    std::vector<T> out(rows * groups * width);
    int bad = moestro_rope(out.data(), x.data(), cos.data(), sin.data(), rows, groups, width, groups * width, width,
                           row, apart, 0, TYPE<T>, 2);
    bad |= moestro_rope(out.data(), out.data(), cos.data(), sin.data(), rows, groups, width, groups * width, width,
                        groups * width, width, 1, TYPE<T>, 2);
    for (int64_t i = 0; sizeof(T) == 4 && i < rows * groups * width; i++) {
        const int64_t vector = i / width;
        bad |= std::fabs(float(out[i]) - float(x[vector / groups * row + vector % groups * apart + i % width])) > 1e-5f;
    }
    return bad;
}

template <class T> int check_training_rows(int64_t rows, int64_t width) {
    const auto x = random_vector<T>(rows * width), dy = random_vector<T>(rows * width),
               both = random_vector<T>(rows * 2 * width);
    const auto weight = random_vector<float>(width);
    std::vector<T> dx(x.size()), d_both(both.size());
    std::vector<float> d_weight(width);
    int bad = moestro_rms_norm_backward(dx.data(), d_weight.data(), dy.data(), x.data(), weight.data(), rows, width,
                                        1e-6f, TYPE<T>, MOESTRO_FLOAT32, 2);
    return bad | moestro_swiglu_backward(d_both.data(), dy.data(), both.data(), rows, width, TYPE<T>, 2);
}

template <class T> int check_heads(int64_t rows, int64_t heads, int64_t plain, int64_t rotary, bool shared) {
    const int64_t head = plain + 3, row = heads * head, turned = shared ? rotary : heads * rotary;
    const auto from = random_vector<T>(rows ? rows * row - 3 : 0), other = random_vector<T>(rows * turned),
               d_out = random_vector<T>(rows * heads * (plain + rotary));
    const auto cos = random_vector<float>(rows * (rotary / 2)), sin = random_vector<float>(rows * (rotary / 2));
    std::vector<T> out(d_out.size()), d_plain(rows * heads * plain), d_rotary(other.size());
    int bad = moestro_join_heads(out.data(), from.data(), other.data(), cos.data(), sin.data(), rows, heads, plain,
                                 rotary, row, head, turned, shared ? 0 : rotary, TYPE<T>, 2);
    return bad | moestro_split_heads(d_plain.data(), d_rotary.data(), d_out.data(), cos.data(), sin.data(), rows, heads,
                                     plain, rotary, shared, TYPE<T>, 2);
}

template <class T> int check_training() {
    int bad = check_training_rows<T>(4, 0) | check_training_rows<T>(2000, 64) | check_training_rows<T>(17, 4099);
    for (int64_t width : {1, 16, 37}) bad |= check_training_rows<T>(0, width) | check_training_rows<T>(3, width);
    for (const bool shared : {false, true}) {
        bad |= check_heads<T>(0, 2, 3, 4, shared) | check_heads<T>(1, 1, 1, 2, shared) |
               check_heads<T>(5, 3, 7, 0, shared) | check_heads<T>(5, 3, 0, 6, shared);
        bad |= check_heads<T>(900, 4, 33, 130, shared);
    }
    return bad;
}

inline int check_route(int64_t rows, int64_t num_experts, int64_t groups, int64_t kept, int64_t top_k, int function) {
    const auto logits = random_vector<float>(rows * num_experts), bias = random_vector<float>(num_experts);
    std::vector<int64_t> ids(rows * top_k);
    std::vector<float> weights(rows * top_k);
    int bad = 0;
    for (int given : {0, 1}) {
        for (int64_t row = 0; given && top_k && row < rows; row += 2) ids[row * top_k] = -1;  // to be chosen
        bad |= moestro_route(ids.data(), weights.data(), function == MOESTRO_CONSTANT ? nullptr : logits.data(),
                             bias.data(), rows, num_experts, groups, kept, top_k, 2.0f, function, 1 + num_experts % 2,
                             given, 1, given, 2);
    }
    for (int64_t id : ids) bad |= id < 0 || id >= num_experts;
    return bad;
}

// Places of 64 bytes a row: 0 the input, then its norm, the logits of 4 experts, their weights, a copy of the first
// half.
inline int check_run(int64_t rows) {
    const auto panels = random_panels(packed_bytes(4, 16, 0));
    const auto weight = random_vector<float>(16), bias = random_vector<float>(4),
               values = random_vector<float>(rows * 16);
    std::vector<float> pages(2 * 64 * 8, 7.0f), narrow(2 * 64 * 3), turn(rows * 2, 0.5f), memory(rows * 5 * 16);
    std::vector<int64_t> ids(rows * 2), slots(rows), starts{0, rows}, first{0};
    std::vector<int32_t> tables{0, 1};
    for (int64_t i = 0; i < rows; i++) slots[i] = 127 - i;
    if (rows) memcpy(memory.data(), values.data(), rows * 64);
    const double one = 1;
    int64_t bits;
    memcpy(&bits, &one, 8);
    const auto address = [](const void *p) { return int64_t(p); };
    const std::vector<int64_t> program = {
        3,
        64,
        0,
        address(weight.data()),
        16,
        bits,
        0,
        0,  // norm
        0,
        128,
        64,
        address(panels.data()),
        1,
        4,
        16,
        0,
        0,  // linear
        10,
        0,
        192,
        128,
        address(bias.data()),
        4,
        2,
        1,
        bits,
        0,
        2,
        0,
        1,
        0,  // route
        7,
        256,
        64,
        0,
        32,
        0,
        64,
        0,
        32,
        2,
        32,  // copy both halves of a row
        6,
        64,
        256,
        16,
        12,
        1,
        4,
        4,
        0,  // rotate its last four values
        8,
        1,
        256,
        8,
        0,
        0,  // store eight
        5,
        0,
        0,
        256,
        16,
        0,  // add
    };
    const MoestroCache caches[] = {{narrow.data(), 3, MOESTRO_FLOAT32}, {pages.data(), 8, MOESTRO_FLOAT32}};
    const MoestroStep step = {reinterpret_cast<char *>(memory.data()),
                              ids.data(),
                              caches,
                              turn.data(),
                              turn.data(),
                              slots.data(),
                              starts.data(),
                              first.data(),
                              tables.data(),
                              rows,
                              320,
                              1,
                              2,
                              2,
                              2,
                              2,
                              1,
                              2,
                              2};
    int bad = moestro_run(program.data(), int64_t(program.size()), &step);
    for (int64_t i = 0; i < rows; i++) bad |= memcmp(&pages[slots[i] * 8], &memory[rows * 64 + i * 8], 32);
    return bad | !moestro_run(program.data(), int64_t(program.size()) - 1, &step);
}

template <class T> int check_serving() {
    int bad = 0;
    for (int64_t rows : {0, 1, 5})
        bad |= check_rope<T>(rows, 1, 2) | check_rope<T>(rows, 3, 34) | check_rope<T>(rows, 0, 4) |
               check_rope<T>(rows, 2, 0);
    for (int function = 0; function < 4; function++)
        bad |= check_route(3, 37, 1, 1, 5, function) | check_route(300, 64, 8, 3, 8, function) |
               check_route(2, 1, 1, 1, 1, function) | check_route(0, 4, 2, 1, 2, function);
    for (int64_t rows : {0, 1, 9}) bad |= check_run(rows);
    for (int64_t k : {0, 1, 3, 128, 300})
        bad |= check_pack_codes(0, k) | check_pack_codes(1, k) | check_pack_codes(64, k) | check_pack_codes(130, k);
    for (int kind = 0; kind < 6; kind++) {
        for (int64_t k : {0, 1, 15, 16, 33, 64, 131}) {
            if (kind >= MOESTRO_KIND_FP8) break;  // packed from codes
            bad |= check_pack<T>(0, k, kind) | check_pack<T>(1, k, kind) | check_pack<T>(64, k, kind) |
                   check_pack<T>(130, k, kind);
        }
        for (int64_t n : {0, 1, 5, 7, 25, 101})
            bad |= check_linear<T>(1, n, 70, 67, kind) | check_linear<T>(3, n, 33, 64, kind);
        bad |= check_linear<T>(1, 2, 1, 1, kind) | check_linear<T>(1, 2, 3, 0, kind) |
               check_linear<T>(1, 2, 0, 3, kind) | check_linear<T>(0, 2, 3, 3, kind);
        bad |= check_linear<T>(1, 3, 130, 700, kind) | check_linear<T>(1, 30, 64, 2600, kind);
        bad |= check_packed_experts<T>(1, 2, 4, 33, 17, kind) | check_packed_experts<T>(130, 3, 2, 64, 32, kind) |
               check_packed_experts<T>(0, 2, 4, 8, 8, kind);
        bad |= check_packed_experts<T>(3, 1, 1, 1, 1, kind) | check_packed_experts<T>(2, 0, 3, 8, 8, kind) |
               check_packed_experts<T>(1100, 1, 2, 3, 5, kind);
    }
    bad |= check_attention<T>({1}, 1, 1, 1, 1, 1) | check_attention<T>({64, 65, 1}, 3, 16, 1, 48, 32) |
           check_attention<T>({700}, 1, 20, 1, 33, 70);
    bad |= check_attention<T>({300, 20}, 90, 6, 2, 24, 17) |
           check_attention<T>({257, 1, 256, 3, 9, 513, 7, 8, 10}, 2, 4, 4, 7, 5) |
           check_attention<T>({}, 1, 2, 1, 4, 4);
    for (int64_t rows : {0, 1, 64, 300})
        bad |= check_fp8_rows<T>(rows, 1, 0) | check_fp8_rows<T>(rows, 13, 4) | check_fp8_rows<T>(rows, 130, 2) |
               check_fp8_rows<T>(rows, 512, 64);
    for (int64_t width : {1, 16, 37}) bad |= check_rows<T>(0, width) | check_rows<T>(3, width);
    return bad | check_rows<T>(2000, 64) | check_rows<T>(4, 0);
}

// Documents of these lengths. Rows of all inputs lie `pad` elements further apart than needed; the last one ends with
// its memory.
template <class T> int check_flash(std::vector<int64_t> lengths, int64_t heads, int64_t kv_heads, int64_t key,
                                   int64_t value, int64_t pad) {
    std::vector<int64_t> starts{0};
    for (int64_t length : lengths) starts.push_back(starts.back() + length);
    const int64_t n = starts.back();
    const int64_t strides[] = {heads * key + pad,      key,   kv_heads * key + pad, key,
                               kv_heads * value + pad, value, heads * value + pad,  value};
    const auto rows = [&](int64_t width) { return random_vector<T>(n ? (n - 1) * (width + pad) + width : 0); };
    const auto q = rows(heads * key), k = rows(kv_heads * key), v = rows(kv_heads * value), d_out = rows(heads * value);
    std::vector<T> out(n * heads * value), dq(n * heads * key), dk(n * kv_heads * key), dv(n * kv_heads * value);
    std::vector<float> log_sums(heads * n);
    int bad = moestro_flash_forward(out.data(), log_sums.data(), q.data(), k.data(), v.data(), starts.data(), strides,
                                    int64_t(lengths.size()), n, heads, kv_heads, key, value, 0.3f, TYPE<T>, 2);
    bad |= moestro_flash_backward(dq.data(), dk.data(), dv.data(), d_out.data(), q.data(), k.data(), v.data(),
                                  out.data(), log_sums.data(), starts.data(), strides, int64_t(lengths.size()), n,
                                  heads, kv_heads, key, value, 0.3f, TYPE<T>, 2);
    for (float sum : log_sums) bad |= !std::isfinite(sum);
    return bad;
}

template <class T> int check_documents() {
    int bad = check_flash<T>({}, 2, 1, 4, 3, 0) | check_flash<T>({0}, 1, 1, 1, 1, 0) |
              check_flash<T>({1}, 1, 1, 1, 1, 0) | check_flash<T>({1, 0, 2}, 3, 3, 5, 3, 1);
    bad |= check_flash<T>({7, 64, 65}, 3, 1, 33, 17, 1) | check_flash<T>({95, 129}, 4, 2, 64, 16, 0) |
           check_flash<T>({385, 3}, 2, 1, 24, 40, 2);
    return bad | check_flash<T>({130}, 2, 2, 192, 128, 3) | check_flash<T>({1100}, 2, 1, 6, 9, 0);
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
    bad |= check_matmul<T>(103, 530, 600, true, false) | check_matmul<T>(10, 20, 1100, true, true);
    bad |= check_head<T>(1, 1, 1) | check_head<T>(7, 5, 3) | check_head<T>(0, 5, 3) | check_head<T>(1030, 70, 9) |
           check_head<T>(99, 2100, 17);
    bad |= check_experts<T>(11, 8, 4, {3, 0, 8});
    bad |= check_experts<T>(11, 33, 17, {0, 200, 1});
    bad |= check_experts<T>(1, 70, 65, {0, 0, 1});
    bad |= check_experts<T>(3, 1, 1, {0, 0});
    return bad;
}

}  // namespace

#include "abi/check_fp8.h"

int main() {
    int paths = 0;
    for (const char *isa : MOESTRO_ISAS) {
        if (moestro_set_isa(isa)) continue;
        paths++;
        if (check_type<float>() | check_type<uint16_t>() | check_serving<float>() | check_serving<uint16_t>())
            return std::printf("%s: wrong\n", isa), 1;
        if (check_documents<float>() | check_documents<uint16_t>() | check_training<float>() |
            check_training<uint16_t>())
            return std::printf("%s: wrong\n", isa), 1;
        if (check_fp8(40, 33, 70, {0, 130, 3}) | check_fp8(300, 140, 129, {257}) | check_fp8(5, 1, 1, {0, 2}) |
            check_fp8(1100, 65, 600, {1030, 1}))
            return std::printf("%s: wrong\n", isa), 1;
    }
    std::printf("%d paths\n", paths);
    return 0;
}
