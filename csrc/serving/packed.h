// Products with packed weights (docs/kernels.md has the layout): linear layers and SwiGLU experts for serving.
//
// A weight is cut into consecutive panels of 64 outputs, each read from front to end once for a block of rows. With few
// rows that reading is the limit, so there is no other traffic. Rows are prepared once per call (widened, quantised, or
// used in place). A task is a block of rows times some panels; any thread may take any task.
#pragma once
#include <omp.h>

#include "abi/table.h"
#include "math/tile.h"
#include "serving/coded.h"

namespace {

constexpr int64_t MOST_ROWS = 96;  // in a block: they stay in the second-level cache beside a piece of a panel
constexpr int64_t FEW_ROWS = 24;   // in a block beside which a piece of a panel fits the first-level cache
constexpr int64_t FEW_BYTES = 3 * Block<8>::BYTES,
                  MANY_BYTES = 65536;  // of a piece of a panel, used for all rows before the next one
constexpr int64_t CLOSE_BYTES =
    1024;  // ahead of what a lone tile reads, where that is better than the processor's own fetching
constexpr int64_t SMALL_BYTES =
    1 << 20;  // of a matrix of which a thread takes one run of panels, fetched without a break
constexpr int64_t TOKENS_AT_ONCE = 1024;

thread_local Scratch thread_sums;
Scratch call_rows, call_gathered, call_middle, call_quantised, call_slots, call_results;  // of the running call

// What a step of a panel is and how rows meet it. UNIT is the least number of k, BYTES its size in a panel, ROWS the
// number of rows a tile takes without running out of registers.
template <Mode MODE> struct FloatProduct {
    static constexpr bool IN_BLOCKS = false, QUANTISED = false;
    static constexpr int64_t UNIT = MODE == Mode::FLOATS ? 1 : 2, BYTES = 4 * PANEL,
                             ROWS = MODE == Mode::WIDE_PANEL ? 5 : MR;
    static constexpr int64_t ROW_BYTES = MODE == Mode::WIDE_PANEL ? 8 : 4, STEP_BYTES = BYTES;
    using Element = std::conditional_t<MODE == Mode::PAIRS, uint16_t, float>;  // of prepared rows
    static int64_t row_bytes(int64_t k) { return spread(round_up(k, UNIT) * int64_t(sizeof(Element))); }
    template <class T> static bool in_place(int64_t rows, int64_t stride, int64_t k) {
        const int64_t bytes = stride * int64_t(sizeof(T));
        return std::is_same<T, Element>::value && k % UNIT == 0 && (rows == 1 || bytes == spread(bytes));
    }
    static int64_t scales(int64_t) { return 0; }
    template <class T> static void prepare(char *to, const T *x, int64_t k) {
        Element *out = reinterpret_cast<Element *>(to);
        for (int64_t i = 0; i < k; i++) store_value(out + i, load_value(x + i));
        if (k % UNIT) out[k] = 0;
    }
    template <int R, int V> static void multiply(float *c, Rows rows, const char *panel, int64_t column, int64_t unit,
                                                 int64_t count, Ahead ahead) {
        rows.data += unit * ROW_BYTES;
        tile<MODE, R, V>(c + column, PANEL, rows, panel + unit * BYTES + column * 4, BYTES, count, unit > 0, ahead);
    }
};

template <int BITS> struct BlockProduct {
    static constexpr bool IN_BLOCKS = false, QUANTISED = true;
    static constexpr int64_t UNIT = Block<BITS>::LENGTH, BYTES = Block<BITS>::BYTES, ROWS = 4,
                             STEP_BYTES = BYTES / Block<BITS>::LOADS;
    using Element = float;  // of rows before they are quantised
    static int64_t row_bytes(int64_t k) { return spread((k + UNIT - 1) / UNIT * (UNIT + int64_t(sizeof(BlockScale)))); }
    template <class T> static bool in_place(int64_t, int64_t, int64_t) { return false; }
    static int64_t scales(int64_t k) { return round_up(k, UNIT); }
    // A block's scale is its largest magnitude / 127; if that is not finite, the scale is NaN, and so are the results.
    template <class T> static void prepare(char *to, const T *x, int64_t k) {
        BlockScale *scale = reinterpret_cast<BlockScale *>(to + round_up(k, UNIT));
        for (int64_t first = 0; first < k; first += UNIT, scale++) {
            float values[UNIT] = {};
            const int64_t count = std::min(UNIT, k - first);
            for (int64_t i = 0; i < count; i++) values[i] = load_value(x + first + i);
            int32_t bits[UNIT], most = 0, sum = 0;
            memcpy(bits, values, sizeof bits);
            for (int i = 0; i < UNIT; i++) most = std::max(most, bits[i] & 0x7fffffff);
            float largest;
            memcpy(&largest, &most, 4);
            const float inverse = largest > 1e-30f && most < 0x7f800000 ? 127.0f / largest : 0.0f;
            for (int i = 0; i < UNIT; i++) {
                const int32_t code = inverse > 0 ? int32_t(std::nearbyint(values[i] * inverse)) : 0;
                to[first + i] = char(code);
                sum += code;
            }
            *scale = {most < 0x7f800000 ? (inverse > 0 ? largest / 127.0f : 0.0f) : std::nanf(""),
                      -Block<BITS>::ZERO * sum};
        }
    }
    template <int R, int V> static void multiply(float *c, Rows rows, const char *panel, int64_t column, int64_t unit,
                                                 int64_t count, Ahead ahead) {
        rows.data += unit * UNIT;
        rows.scales += unit * (int64_t(sizeof(BlockScale)) - UNIT);
        block_tile<BITS, R, V>(c + column, PANEL, rows, panel + unit * BYTES, column, count, unit > 0, ahead);
    }
};

template <class P> int64_t units_of(int64_t k) { return (k + P::UNIT - 1) / P::UNIT; }
inline int64_t panels_of(int64_t m) { return (m + PANEL - 1) / PANEL; }

// c [count][PANEL] = rows · panel, a piece of the panel at a time for all rows. While a piece is used, the tiles fetch
// the next one from front to end, an equal share each. A lone tile, which takes all rows and columns, reads a panel
// once from front to end: it fetches close ahead (FETCH_CLOSE) or leaves that to the processor.
template <class P> void multiply_pieces(float *c, Rows rows, int64_t count, const char *panel, int64_t units) {
    const int64_t piece = (count <= FEW_ROWS ? FEW_BYTES : MANY_BYTES) / P::BYTES;
    const int64_t groups = (count + P::ROWS - 1) / P::ROWS, rows_each = (count + groups - 1) / groups;
    for (int64_t unit = 0; unit < units; unit += piece) {
        const char *at = panel + unit * P::BYTES, *next = at + piece * P::BYTES;
        for (int64_t row = 0; row < count; row += rows_each)
            with_rows<P::ROWS>(std::min(rows_each, count - row), [&](auto r) {
                constexpr int R = decltype(r)::value, V = vectors_of(R), COLUMNS = V * Isa::WIDTH;
                const Rows from = {rows.data + row * rows.bytes, rows.bytes, rows.scales};
                for (int64_t column = 0; column < PANEL; column += COLUMNS) {
                    const Ahead lone = Isa::FETCH_CLOSE ? Ahead{at + CLOSE_BYTES, P::STEP_BYTES} : Ahead{at, 0};
                    const Ahead ahead =
                        COLUMNS == PANEL && groups == 1 ? lone : Ahead{next, P::STEP_BYTES * COLUMNS / PANEL / groups};
                    P::template multiply<R, V>(c + row * PANEL, from, panel, column, unit,
                                               std::min(piece, units - unit), ahead);
                    next += piece * P::BYTES * COLUMNS / PANEL / groups;
                }
            });
    }
}

// The same for any product; false if there is no memory.
template <class P> bool multiply(float *c, Rows rows, int64_t count, const char *panel, int64_t units) {
    if (units == 0) std::fill(c, c + count * PANEL, 0.0f);
    if constexpr (P::IN_BLOCKS)
        return P::multiply_blocks(c, rows, count, panel, units);
    else
        multiply_pieces<P>(c, rows, count, panel, units);
    return true;
}

// The number of rows per block for n rows, and the number of panels per task for so many block-panels.
inline int64_t rows_of_block(int64_t n) {
    const int64_t blocks = (n + MOST_ROWS - 1) / MOST_ROWS;
    return blocks <= 1 ? std::max<int64_t>(n, 1) : round_up((n + blocks - 1) / blocks, MR);
}
inline int64_t panels_of_task(int64_t total, int threads) {
    return std::min<int64_t>(4, std::max<int64_t>(1, total / (16 * threads)));
}
// Waking threads and waiting for the last takes microseconds, much longer if other processes share the cores.
inline int worth_threads(double bytes, double products, int threads) {
    return bytes < 131072 && products < 2e6 ? 1 : threads;
}

template <class P, class T> int packed_linear(const PackedLinear &a, int threads) {
    T *out = static_cast<T *>(a.out);
    const T *x = static_cast<const T *>(a.x);
    const int64_t units = units_of<P>(a.k), row_bytes = P::row_bytes(a.k), panels = panels_of(a.m);
    const int64_t block = rows_of_block(a.n), blocks = (a.n + block - 1) / block;
    const int64_t stride = a.groups * a.k;
    const bool in_place = P::template in_place<T>(a.n, stride, a.k);
    char *prepared = in_place ? nullptr : call_rows.get<char>(a.groups * a.n * row_bytes);
    if (!in_place && !prepared) return MOESTRO_NO_MEMORY;
    const double bytes = double(a.groups) * panels * units * P::BYTES;
    const int64_t per_task = blocks == 1 && bytes < SMALL_BYTES ? (panels + threads - 1) / threads
                                                                : panels_of_task(blocks * a.groups * panels, threads);
    const int64_t per_group = (panels + per_task - 1) / per_task;
    int failed = 0;
#pragma omp parallel num_threads(worth_threads(bytes, bytes *a.n, threads)) reduction(| : failed)
    {
        if (!in_place) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < a.n * a.groups; i++)
                P::prepare(prepared + (i % a.groups * a.n + i / a.groups) * row_bytes, x + i * a.k, a.k);
        }
        float *c = thread_sums.get<float>(MOST_ROWS * PANEL);
        failed = !c;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < blocks * a.groups * per_group; task++) {
            if (!c) continue;
            const int64_t row = task / (a.groups * per_group) * block, g = task / per_group % a.groups;
            const int64_t first = task % per_group * per_task, count = std::min(block, a.n - row);
            const Rows rows =
                in_place ? Rows{reinterpret_cast<const char *>(x + row * stride + g * a.k), stride * int64_t(sizeof(T))}
                         : Rows{prepared + (g * a.n + row) * row_bytes, row_bytes, P::scales(a.k)};
            for (int64_t p = first; p < std::min(first + per_task, panels); p++) {
                failed |= !multiply<P>(c, rows, count, a.panels + (g * panels + p) * units * P::BYTES, units);
                const int64_t columns = std::min<int64_t>(PANEL, a.m - p * PANEL);
                for (int64_t i = 0; i < count; i++) {
                    T *to = out + ((row + i) * a.groups + g) * a.m + p * PANEL;
                    for (int64_t j = 0; j < columns; j++) store_value(to + j, c[i * PANEL + j]);
                }
            }
        }
    }
    return failed ? MOESTRO_NO_MEMORY : MOESTRO_OK;
}

// The choices of some tokens, sorted by expert: slots; and blocks of slots of one expert.
struct Slots {
    struct Part {
        int64_t expert, first, rows;
    };
    int64_t *token, *slot;  // token of a slot; slot of a choice, or -1
    Part *parts;
    int64_t num_slots, num_parts;
};

inline bool sort_slots(Slots &s, const int64_t *ids, int64_t num_tokens, int64_t top_k, int64_t num_experts) {
    const int64_t choices = num_tokens * top_k, most_parts = choices / MOST_ROWS + std::min(num_experts, choices) + 1;
    int64_t *words = call_slots.get<int64_t>(num_experts + 1 + 2 * choices + 3 * most_parts);
    if (!words) return false;
    int64_t *ends = words;
    s.token = words + num_experts + 1;
    s.slot = s.token + choices;
    s.parts = reinterpret_cast<Slots::Part *>(s.slot + choices);
    std::fill(ends, ends + num_experts + 1, 0);
    for (int64_t i = 0; i < choices; i++) ends[ids[i]]++;
    int64_t first = s.num_parts = 0;
    for (int64_t e = 0; e < num_experts; e++) {
        const int64_t load = ends[e], rows = rows_of_block(load);
        for (int64_t at = 0; at < load; at += rows) s.parts[s.num_parts++] = {e, first + at, std::min(rows, load - at)};
        ends[e] = first;
        first += load;
    }
    s.num_slots = first;
    for (int64_t i = 0; i < choices; i++) {
        s.slot[i] = ids[i] < num_experts ? ends[ids[i]]++ : -1;
        if (s.slot[i] >= 0) s.token[s.slot[i]] = i / top_k;
    }
    return true;
}

// out[n] = Σ_a weights[n, a] · y[slot[n, a]], in the order of a, for columns first … first + 255.
template <class T> void add_choices(T *out, const float *y, const int64_t *slot, const float *weights, int64_t top_k,
                                    int64_t width, int64_t first) {
    const int64_t count = std::min<int64_t>(256, width - first);
    float sum[256] = {};
    for (int64_t a = 0; a < top_k; a++) {
        if (slot[a] < 0) continue;
        const float *row = y + slot[a] * width + first, weight = weights[a];
        for (int64_t j = 0; j < count; j++) sum[j] = std::fma(weight, row[j], sum[j]);
    }
    for (int64_t j = 0; j < count; j++) store_value(out + first + j, sum[j]);
}

// silu(gate) · up for each row of a panel with 32 gates and 32 ups.
template <class E> void activate_panel(E *to, const float *c, int64_t count) {
    constexpr int HALF = PANEL / 2;
    float values[HALF];
#pragma omp simd
    for (int j = 0; j < HALF; j++) values[j] = c[j] * sigmoid(c[j]) * c[HALF + j];
    for (int64_t j = 0; j < count; j++) store_value(to + j, values[j]);
}

// Parts times panels, the panels of a part together; `weights` are the addresses of the experts' panels.
template <class P, class Use> void multiply_parts(const Slots &s, Rows rows, const void *const *weights, int64_t panels,
                                                  int64_t units, float *c, int &failed, int threads, Use use) {
    const int64_t per_task = panels_of_task(s.num_parts * panels, threads),
                  per_part = (panels + per_task - 1) / per_task;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < s.num_parts * per_part; task++) {
        if (!c) continue;
        const Slots::Part part = s.parts[task / per_part];
        const int64_t first = task % per_part * per_task;
        const Rows own = {rows.data + part.first * rows.bytes, rows.bytes, rows.scales};
        const char *own_weights = static_cast<const char *>(weights[part.expert]);
        for (int64_t p = first; p < std::min(first + per_task, panels); p++) {
            failed |= !multiply<P>(c, own, part.rows, own_weights + p * units * P::BYTES, units);
            for (int64_t i = 0; i < part.rows; i++) use(part.first + i, p, c + i * PANEL);
        }
    }
}

template <class P, class T> int some_experts(const PackedExperts &a, int threads) {
    using E = typename P::Element;
    constexpr bool QUANTISED = P::QUANTISED;
    constexpr int HALF = PANEL / 2;
    Slots s;
    if (!sort_slots(s, a.ids, a.num_tokens, a.top_k, a.num_experts)) return MOESTRO_NO_MEMORY;
    T *out = static_cast<T *>(a.out);
    const T *x = static_cast<const T *>(a.x);
    const int64_t row_bytes = P::row_bytes(a.hidden), act_bytes = P::row_bytes(a.width);
    const int64_t middle = QUANTISED ? a.width : act_bytes / int64_t(sizeof(E));
    const bool in_place = P::template in_place<T>(1, a.hidden, a.hidden);
    const int64_t source_bytes = in_place ? a.hidden * int64_t(sizeof(T)) : row_bytes;
    char *tokens = in_place ? nullptr : call_rows.get<char>(a.num_tokens * row_bytes);
    char *gathered = call_gathered.get<char>(s.num_slots * row_bytes);
    E *act = call_middle.get<E>(s.num_slots * middle);
    char *quantised = QUANTISED ? call_quantised.get<char>(s.num_slots * act_bytes) : nullptr;
    float *y = call_results.get<float>(s.num_slots * a.hidden);
    if ((!in_place && !tokens) || !gathered || !act || (QUANTISED && !quantised) || !y) return MOESTRO_NO_MEMORY;
    const char *source = in_place ? reinterpret_cast<const char *>(x) : tokens;
    const int64_t gate_panels = (a.width + HALF - 1) / HALF, out_panels = panels_of(a.hidden),
                  pieces = (a.hidden + 255) / 256;
    const double products = 3.0 * double(s.num_slots) * a.hidden * a.width;
    int failed = 0;
#pragma omp parallel num_threads(worth_threads(products, products, threads)) reduction(| : failed)
    {
        float *c = thread_sums.get<float>(MOST_ROWS * PANEL);
        failed = !c;
        if (!in_place) {
#pragma omp for schedule(static)
            for (int64_t n = 0; n < a.num_tokens; n++) P::prepare(tokens + n * row_bytes, x + n * a.hidden, a.hidden);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < s.num_slots; i++)
            memcpy(gathered + i * row_bytes, source + s.token[i] * source_bytes, source_bytes);
        multiply_parts<P>(s, {gathered, row_bytes, P::scales(a.hidden)}, a.gate_up, gate_panels, units_of<P>(a.hidden),
                          c, failed, threads, [&](int64_t i, int64_t p, const float *values) {
                              E *to = act + i * middle + p * HALF;
                              activate_panel(to, values, std::min<int64_t>(HALF, a.width - p * HALF));
                              if (!QUANTISED && p == gate_panels - 1)
                                  std::fill(act + i * middle + a.width, act + i * middle + round_up(a.width, P::UNIT),
                                            E(0));
                          });
        if (QUANTISED) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < s.num_slots; i++) P::prepare(quantised + i * act_bytes, act + i * middle, a.width);
        }
        const char *rows = QUANTISED ? quantised : reinterpret_cast<const char *>(act);
        multiply_parts<P>(s, {rows, act_bytes, P::scales(a.width)}, a.down, out_panels, units_of<P>(a.width), c, failed,
                          threads, [&](int64_t i, int64_t p, const float *values) {
                              memcpy(y + i * a.hidden + p * PANEL, values,
                                     sizeof(float) * std::min<int64_t>(PANEL, a.hidden - p * PANEL));
                          });
#pragma omp for schedule(static)
        for (int64_t i = 0; i < a.num_tokens * pieces; i++) {
            const int64_t n = i / pieces;
            add_choices(out + n * a.hidden, y, s.slot + n * a.top_k, a.weights + n * a.top_k, a.top_k, a.hidden,
                        i % pieces * 256);
        }
    }
    return failed ? MOESTRO_NO_MEMORY : MOESTRO_OK;
}

// Takes tokens in batches, so that scratch memory stays bounded.
template <class P, class T> int packed_experts(PackedExperts a, int threads) {
    for (int64_t left = a.num_tokens; left > 0; left -= TOKENS_AT_ONCE) {
        a.num_tokens = std::min(left, TOKENS_AT_ONCE);
        if (const int error = some_experts<P, T>(a, threads)) return error;
        a.out = static_cast<T *>(a.out) + a.num_tokens * a.hidden;
        a.x = static_cast<const T *>(a.x) + a.num_tokens * a.hidden;
        a.ids += a.num_tokens * a.top_k;
        a.weights += a.num_tokens * a.top_k;
    }
    return MOESTRO_OK;
}

// Calls f with the product and the element type that kind and type stand for.
template <class F> int with_product(int kind, int type, F f) {
    const auto pick = [&](auto element) {
        using T = decltype(element);
        constexpr bool PAIRS = sizeof(T) == 2 && Isa::HAS_BF16;
        constexpr Mode WIDE = Isa::HAS_BF16 ? Mode::PAIRS : Mode::WIDE_PANEL;  // codes of rows are bf16, too
        switch (kind) {
            case MOESTRO_KIND_FP32: return f(FloatProduct<Mode::FLOATS>(), element);
            case MOESTRO_KIND_BF16: return f(FloatProduct<PAIRS ? Mode::PAIRS : Mode::WIDE_PANEL>(), element);
            case MOESTRO_KIND_INT8: return f(BlockProduct<8>(), element);
            case MOESTRO_KIND_INT4: return f(BlockProduct<4>(), element);
            case MOESTRO_KIND_FP8: return f(CodedProduct<PAIRS ? Mode::PAIRS : Mode::WIDE_PANEL, false>(), element);
            case MOESTRO_KIND_FP8_BOTH: return f(CodedProduct<WIDE, true>(), element);
            default: return int(MOESTRO_BAD_TYPE);
        }
    };
    return type == MOESTRO_FLOAT32 ? pick(float()) : pick(uint16_t());
}

}  // namespace
