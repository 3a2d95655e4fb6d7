// Runs a program: a model's forward pass as a list of calls of the functions in moestro.h, made once by
// moestro/ops/serving/program.py and run for every step. The overhead between kernels is then nanoseconds.
//
// A program is a list of int64: an operation's number, then its operands. Values live in one block of memory. `at` is
// the place of a value, in bytes per row, so one program serves any number of rows: value v of row r lies at
// at · rows + r · (bytes of a row of v). Operands are checked against the block here; the function called checks sizes
// again.
#include <cstring>
#include <initializer_list>

#include "abi/moestro.h"

namespace {

constexpr int OPERANDS[] = MOESTRO_OPERANDS;  // how many an operation has, by opcode
constexpr int64_t NUM_OPCODES = sizeof(OPERANDS) / sizeof(int);
constexpr int64_t MOST = int64_t(1) << 40;

int64_t size_of(int64_t type) { return type == MOESTRO_FLOAT32 ? 4 : 2; }

struct Program {
    const int64_t *next, *end;
    const MoestroStep &step;
    int error = MOESTRO_OK;

    int64_t number() {
        if (next == end) error = MOESTRO_BAD_SIZE;
        return error ? 0 : *next++;
    }
    int small() { return int(number()); }
    double real() {
        const int64_t bits = number();
        double value;
        memcpy(&value, &bits, 8);
        return value;
    }
    template <class T> const T *pointer() { return reinterpret_cast<const T *>(number()); }

    // A value of so many bytes a row.
    char *value(int64_t at, int64_t groups, int64_t width, int64_t size) {
        const bool fits = at >= 0 && groups >= 0 && width >= 0 && groups <= MOST && width <= MOST &&
                          (groups == 0 || width <= MOST / groups);
        if (!fits || at > step.row_bytes || groups * width * size > step.row_bytes - at) error = MOESTRO_BAD_SIZE;
        return error ? nullptr : step.memory + at * step.num_rows;
    }
    int64_t *ids(int64_t index) {
        if (index < 0 || index >= step.num_routers) error = MOESTRO_BAD_SIZE;
        return error ? nullptr : step.ids + index * step.num_rows * step.top_k;
    }
    MoestroCache cache(int64_t index) {
        if (index < 0 || index >= step.num_caches) error = MOESTRO_BAD_SIZE;
        return error ? MoestroCache{} : step.caches[index];
    }
    int run(int64_t opcode);
    int linear();
    int experts();
    int attention();
    int norm();
    int swiglu();
    int add();
    int rope();
    int copy();
    int store();
    int widen();
    int route();
};

int Program::linear() {
    const int64_t out = number(), x = number(), panels = number(), groups = number(), m = number(), k = number();
    const int kind = small(), type = small();
    void *to = value(out, groups, m, size_of(type)), *from = value(x, groups, k, size_of(type));
    return error ? error
                 : moestro_packed_linear(to, from, reinterpret_cast<const void *>(panels), groups, step.num_rows, m, k,
                                         kind, type, step.threads);
}

int Program::experts() {
    const int64_t out = number(), x = number(), weights = number(), *chosen = ids(number());
    const auto gate_up = pointer<const void *>(), down = pointer<const void *>();
    const int64_t num_experts = number(), hidden = number(), width = number();
    const int kind = small(), type = small();
    void *to = value(out, 1, hidden, size_of(type)), *from = value(x, 1, hidden, size_of(type));
    const float *by = reinterpret_cast<const float *>(value(weights, 1, step.top_k, 4));
    return error ? error
                 : moestro_packed_experts(to, from, chosen, by, gate_up, down, step.num_rows, step.top_k, num_experts,
                                          hidden, width, kind, type, step.threads);
}

int Program::attention() {
    const int64_t out = number(), q = number();
    const MoestroCache rows = cache(number());
    const int64_t heads = number(), key_width = number(), value_width = number(), groups = number(),
                  value_offset = number();
    const float scale = float(real());
    const int type = small();
    const int64_t selection = number(), selected = number();  // selection = -1: none
    void *to = value(out, heads, value_width, size_of(type)), *from = value(q, heads, key_width, size_of(type));
    const void *positions = selection == -1 ? nullptr : value(selection, 1, selected, 4);
    return error ? error
                 : moestro_paged_attention(to, from, rows.pages, step.tables, step.starts, step.first, step.num_rows,
                                           step.num_pages, step.num_sequences, step.max_pages, heads, key_width,
                                           value_width, rows.width, groups, value_offset,
                                           static_cast<const int32_t *>(positions), selected, scale, rows.type, type,
                                           step.threads);
}

int Program::norm() {
    const int64_t out = number(), x = number();
    const void *weight = pointer<void>();
    const int64_t width = number();
    const float eps = float(real());
    const int weight_type = small(), type = small();
    void *to = value(out, 1, width, size_of(type)), *from = value(x, 1, width, size_of(type));
    return error ? error
                 : moestro_rms_norm(to, from, weight, step.num_rows, width, eps, type, weight_type, step.threads);
}

int Program::swiglu() {
    const int64_t out = number(), x = number(), width = number();
    const int type = small();
    void *to = value(out, 1, width, size_of(type)), *from = value(x, 2, width, size_of(type));
    return error ? error : moestro_swiglu(to, from, step.num_rows, width, type, step.threads);
}

int Program::add() {
    const int64_t out = number(), a = number(), b = number(), width = number();
    const int type = small();
    void *to = value(out, 1, width, size_of(type)), *left = value(a, 1, width, size_of(type)),
         *right = value(b, 1, width, size_of(type));
    return error ? error : moestro_add(to, left, right, step.num_rows, width, type, step.threads);
}

// Rotates `groups` vectors of `width` from `offset` on, x_group apart, of each row (x_row elements) of x.
int Program::rope() {
    const int64_t out = number(), x = number(), x_row = number(), offset = number(), groups = number(),
                  x_group = number(), width = number();
    const int type = small();
    char *to = value(out, groups, width, size_of(type)), *from = value(x, 1, x_row, size_of(type));
    if (offset < 0 || offset > x_row || groups < 0 || groups > MOST || width != 2 * step.half_angles)
        error = MOESTRO_BAD_SIZE;
    if (!error && groups > 0 &&
        (x_group < 0 || x_group > MOST / groups || (groups - 1) * x_group + width > x_row - offset))
        error = MOESTRO_BAD_SIZE;
    return error ? error
                 : moestro_rope(to, from + offset * size_of(type), step.cos, step.sin, step.num_rows, groups, width,
                                groups * width, width, x_row, x_group, 0, type, step.threads);
}

// Vectors of `width` bytes: `groups` a row, out_group and x_group bytes apart, from out_offset and x_offset on.
int Program::copy() {
    const int64_t out = number(), out_row = number(), out_offset = number(), out_group = number();
    const int64_t x = number(), x_row = number(), x_offset = number(), x_group = number(), groups = number(),
                  width = number();
    char *to = value(out, 1, out_row, 1);
    const char *from = value(x, 1, x_row, 1);
    const auto inside = [&](int64_t row, int64_t offset, int64_t group) {
        return offset >= 0 && group >= 0 && offset <= row && group <= row && width <= row &&
               groups <= MOST / (row + 1) && (groups - 1) * group + width <= row - offset;
    };
    if (error || groups < 1 || width < 0 || !inside(out_row, out_offset, out_group) ||
        !inside(x_row, x_offset, x_group))
        return MOESTRO_BAD_SIZE;
    for (int64_t i = 0; i < step.num_rows; i++)
        for (int64_t g = 0; g < groups; g++)
            memcpy(to + i * out_row + out_offset + g * out_group, from + i * x_row + x_offset + g * x_group, width);
    return MOESTRO_OK;
}

// Writes the tokens' rows to their slots in a cache.
int Program::store() {
    const MoestroCache to = cache(number());
    const int64_t x = number(), width = number(), coded = number();
    const int type = small();
    const char *from = value(x, 1, width, size_of(type));
    const int64_t bytes = error ? 0 : width * size_of(type);
    if (!error && to.type == MOESTRO_FP8_ROWS)
        return moestro_store_fp8_rows(to.pages, from, step.slots, step.num_rows, step.num_pages, to.width, width, coded,
                                      type, step.threads);
    if (!error && type != to.type) error = MOESTRO_BAD_TYPE;
    if (!error && width != to.width) error = MOESTRO_BAD_SIZE;
    char *rows = static_cast<char *>(to.pages);
    for (int64_t i = 0; !error && i < step.num_rows; i++)
        if (step.slots[i] < 0 || step.slots[i] / 64 >= step.num_pages) error = MOESTRO_BAD_SIZE;
    for (int64_t i = 0; !error && i < step.num_rows; i++) memcpy(rows + step.slots[i] * bytes, from + i * bytes, bytes);
    return error;
}

int Program::widen() {
    const int64_t out = number(), x = number(), width = number();
    uint32_t *to = reinterpret_cast<uint32_t *>(value(out, 1, width, 4));
    const uint16_t *from = reinterpret_cast<const uint16_t *>(value(x, 1, width, 2));
    for (int64_t i = 0; !error && i < step.num_rows * width; i++) to[i] = uint32_t(from[i]) << 16;
    return error;
}

int Program::route() {
    int64_t *chosen = ids(number());
    const int64_t weights = number(), logits = number();
    const float *bias = pointer<float>();
    const int64_t num_experts = number(), num_groups = number(), top_k_groups = number();
    const float scale = float(real());
    const int function = small(), group_best = small(), multiply = small(), normalize = small(), given = small();
    float *by = reinterpret_cast<float *>(value(weights, 1, step.top_k, 4));
    const float *from =
        function == MOESTRO_CONSTANT ? nullptr : reinterpret_cast<const float *>(value(logits, 1, num_experts, 4));
    return error ? error
                 : moestro_route(chosen, by, from, bias, step.num_rows, num_experts, num_groups, top_k_groups,
                                 step.top_k, scale, function, group_best, multiply, normalize, given, step.threads);
}

int Program::run(int64_t opcode) {
    switch (opcode) {
        case MOESTRO_OP_LINEAR: return linear();
        case MOESTRO_OP_EXPERTS: return experts();
        case MOESTRO_OP_ATTENTION: return attention();
        case MOESTRO_OP_NORM: return norm();
        case MOESTRO_OP_SWIGLU: return swiglu();
        case MOESTRO_OP_ADD: return add();
        case MOESTRO_OP_ROPE: return rope();
        case MOESTRO_OP_COPY: return copy();
        case MOESTRO_OP_STORE: return store();
        case MOESTRO_OP_WIDEN: return widen();
        case MOESTRO_OP_ROUTE: return route();
    }
    return MOESTRO_BAD_SIZE;
}

}  // namespace

extern "C" int moestro_run(const int64_t *program, int64_t length, const MoestroStep *step) {
    const MoestroStep &s = *step;
    const auto sane = [](int64_t size) { return size >= 0 && size <= MOST / 1024; };
    for (const int64_t size : {s.num_rows, s.row_bytes, s.num_routers, s.top_k, s.num_caches, s.num_pages,
                               s.half_angles, s.num_sequences, s.max_pages})
        if (!sane(size)) return MOESTRO_BAD_SIZE;
    const auto fits = [](int64_t a, int64_t b) { return b == 0 || a <= MOST / b; };
    if (length < 0 || !fits(s.row_bytes, s.num_rows) || !fits(s.num_routers, s.top_k) ||
        !fits(s.num_routers * s.top_k, s.num_rows))
        return MOESTRO_BAD_SIZE;
    for (int64_t i = 0; i < s.num_caches; i++) {
        const MoestroCache &cache = s.caches[i];
        if (cache.type != MOESTRO_FLOAT32 && cache.type != MOESTRO_BFLOAT16 && cache.type != MOESTRO_FP8_ROWS)
            return MOESTRO_BAD_TYPE;
        if (!sane(cache.width) || !fits(64 * s.num_pages, cache.width)) return MOESTRO_BAD_SIZE;
    }
    Program p = {program, program + length, s};
    while (!p.error && p.next < p.end) {
        const int64_t opcode = p.number();
        if (opcode < 0 || opcode >= NUM_OPCODES || OPERANDS[opcode] > p.end - p.next) return MOESTRO_BAD_SIZE;
        const int64_t *after = p.next + OPERANDS[opcode];
        p.error = p.run(opcode);
        if (!p.error && p.next != after) return MOESTRO_BAD_SIZE;  // moestro/ops/abi.py says otherwise
    }
    return p.error;
}
