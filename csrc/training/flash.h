// Attention of whole documents, for training: the parts of both passes, and the forward pass.
//
// A task is a head's queries, up to TASK_QUERIES of one document. It walks over the keys that they see, KEYS at a time:
//
//   scores    rows of queries · keys transposed into panels
//   weights   2^(score · log2 e − largest so far); earlier sums are rescaled to the new largest
//   values    weights · values
//
// Every product is tiles of up to MR rows and NR columns, and every tile takes only what lies on or below the diagonal.
// The order of all sums depends only on the document. The backward pass (flash_backward.h) gets log2 Σ exp(score) of
// every row.
#pragma once
#include <omp.h>

#include "math/rows.h"
#include "abi/table.h"
#include "math/tile.h"

namespace {

constexpr int64_t KEYS = 64, QUERIES = 96, TASK_QUERIES = 4 * QUERIES;
static_assert(KEYS <= QUERIES, "the first queries that see a block of keys must be as many: they begin its gradients");
static_assert(KEYS % NR == 0 && KEYS % LANES == 0 && QUERIES % 2 == 0, "blocks are whole panels, lanes and pairs");
constexpr float LOG2_E = 1.44269504088896341f;  // weights are computed as powers of two
constexpr int64_t SCORE_PITCH = KEYS + 16;  // an odd number of cache lines: rows at one column lie in different sets

thread_local Scratch flash_space;
Scratch flash_tasks;

// Distance between rows of so many steps: whole panels, an odd number of cache lines.
inline int64_t padded(int64_t steps) { return round_up(steps, NR) + 16; }

// Cuts one allocation into pieces that begin at cache lines.
struct Pieces {
    char *at;
    template <class T> T *take(int64_t count) {
        T *piece = reinterpret_cast<T *>(at);
        at += round_up(count * int64_t(sizeof(T)), 64);
        return piece;
    }
};

// A left operand: step s of row i is data[i · row + s · step].
struct Strided {
    const Step *data;
    int64_t row, step;
};

// A right operand: columns j · NR … of step s begin at data[j · next + s · step].
struct Panels {
    const Step *data;
    int64_t step, next;
};

// The steps that a tile takes.
struct Part {
    int64_t first, last;
};

template <bool PAIRS, int R> void flash_tile(float *c, int64_t c_pitch, Strided left, const Step *panel,
                                             int64_t panel_step, int64_t steps, bool accumulate) {
    using Vector = typename Isa::Vector;
    constexpr int V = Isa::VECTORS;
    Vector acc[R][V];
    Pointers<R> row(reinterpret_cast<const char *>(left.data), left.row * 4);
    unroll<R>([&](auto i) MOESTRO_INLINE {
        unroll<V>([&](auto v) MOESTRO_INLINE {
            acc[i][v] = accumulate ? Isa::load_any(c + i * c_pitch + v * Isa::WIDTH) : Isa::zero();
        });
    });
    for (int64_t s = 0; s < steps; s++) {
        Vector b[V];
        unroll<V>([&](auto v) MOESTRO_INLINE { b[v] = Isa::load_any(panel + v * Isa::WIDTH); });
        unroll<R>([&](auto i) MOESTRO_INLINE {
            const Vector a = Isa::broadcast(row[i]);
            unroll<V>([&](auto v)
                          MOESTRO_INLINE { acc[i][v] = Isa::template multiply_add<PAIRS>(acc[i][v], a, b[v]); });
        });
        row.advance(left.step * 4);
        panel += panel_step;
    }
    unroll<R>([&](auto i) MOESTRO_INLINE {
        unroll<V>([&](auto v) MOESTRO_INLINE { Isa::store_any(c + i * c_pitch + v * Isa::WIDTH, acc[i][v]); });
    });
}

// c [rows][columns, padded to whole panels] (+)= left · right. part_of(first row, end of rows, first column) gives the
// steps of a tile; a tile without steps is not touched.
template <class T, class PartOf> void multiply_tiles(float *c, int64_t c_pitch, Strided left, int64_t rows,
                                                     Panels right, int64_t columns, bool accumulate, PartOf part_of) {
    for (int64_t column = 0; column < columns; column += NR)
        for (int64_t row = 0; row < rows; row += MR) {
            const Part part = part_of(row, std::min(row + MR, rows), column);
            if (part.first >= part.last) continue;
            const Strided own = {left.data + row * left.row + part.first * left.step, left.row, left.step};
            const Step *panel = right.data + column / NR * right.next + part.first * right.step;
            with_rows<MR>(std::min<int64_t>(MR, rows - row), [&](auto r) {
                flash_tile<Layout<T>::PAIRS, decltype(r)::value>(c + row * c_pitch + column, c_pitch, own, panel,
                                                                 right.step, part.last - part.first, accumulate);
            });
        }
}

// Rows as steps along their width, for a left operand. Zero up to whole panels.
template <class T> void copy_rows(Step *to, int64_t pitch, const T *from, int64_t stride, int64_t rows, int64_t width) {
    const int64_t steps = steps_of<T>(width);
    for (int64_t i = 0; i < rows; i++) {
        copy_steps(to + i * pitch, from + i * stride, width);
        std::fill(to + i * pitch + steps, to + i * pitch + round_up(steps, NR), 0);
    }
}

// Rows as a left operand: in place if they are steps there, else copied to `to`.
template <class T>
Strided take_rows(Step *to, int64_t pitch, const T *from, int64_t stride, int64_t rows, int64_t width) {
    constexpr int PER = Layout<T>::PER_STEP;
    if (sizeof(T) * PER == 4 && width % PER == 0 && stride % PER == 0)
        return {reinterpret_cast<const Step *>(from), stride / PER, 1};
    copy_rows(to, pitch, from, stride, rows, width);
    return {to, pitch, 1};
}

// Rows as steps along their number, for a right operand. The same as copy_rows where a step is one element.
template <class T>
void copy_panel(Step *to, int64_t pitch, const T *from, int64_t stride, int64_t rows, int64_t width) {
    for (int64_t s = 0; s < steps_of<T>(rows); s++)
        copy_step(to + s * pitch, StepRows<T>(from, stride, nullptr, s, rows), width, round_up(width, NR));
}

// Rows of `steps` steps transposed into panels [count / NR][steps][NR].
inline void turn(Step *panels, Strided rows, int64_t count, int64_t steps) {
    const float *columns[KEYS];
    for (int64_t n = 0; n < count; n++) columns[n] = reinterpret_cast<const float *>(rows.data + n * rows.row);
    for (int64_t n = 0; n < count; n += NR)
        pack_columns(panels + n * steps, NR, columns + n, int(std::min<int64_t>(NR, count - n)), steps);
}

// Rows of weights as a left operand with steps along the keys. Floats are one already.
template <class T> Strided as_rows(Step *space, const float *weights, int64_t rows) {
    if (!Layout<T>::PAIRS) return {reinterpret_cast<const Step *>(weights), SCORE_PITCH, 1};
    for (int64_t i = 0; i < rows; i++)
        for (int64_t s = 0; s < KEYS / 2; s++) {
            const float *p = weights + i * SCORE_PITCH + 2 * s;
            space[i * SCORE_PITCH + s] = Step(to_bf16(p[0])) | Step(to_bf16(p[1])) << 16;
        }
    return {space, SCORE_PITCH, 1};
}

template <class T> const T *element(const HeadRows &x, int64_t row, int64_t head) {
    return static_cast<const T *>(x.data) + row * x.row + head * x.head;
}

// Fetches rows ahead of their use, one at a time.
template <class T> void fetch_row(const HeadRows &x, int64_t row, int64_t head, int64_t width) {
    const char *data = reinterpret_cast<const char *>(element<T>(x, row, head));
    for (int64_t b = 0; b < width * int64_t(sizeof(T)); b += 64) __builtin_prefetch(data + b);
}

struct QueryTask {
    int64_t begin, first, last, head, kv_head;  // `begin` of its document, its own queries
};

// Lists the tasks, those with the most keys of a document first; with `to` null only counts them.
inline int64_t list_query_tasks(QueryTask *to, const Documents &d) {
    int64_t count = 0;
    for (int64_t s = 0; s < d.num_documents; s++) {
        const int64_t begin = d.starts[s], end = d.starts[s + 1],
                      blocks = (end - begin + TASK_QUERIES - 1) / TASK_QUERIES;
        for (int64_t b = blocks - 1; b >= 0; b--)
            for (int64_t h = 0; h < d.num_heads; h++) {
                const int64_t first = begin + b * TASK_QUERIES;
                if (to)
                    to[count] = {begin, first, std::min(first + TASK_QUERIES, end), h,
                                 h / (d.num_heads / d.num_kv_heads)};
                count++;
            }
    }
    return count;
}

// The work space of a forward task.
struct ForwardSpace {
    int64_t key_steps, key_pitch, value_pitch;
    Step *queries, *keys, *turned, *values, *weights;
    float *scores, *sums, *largest, *total;  // `sums` of weighted values, `total` of weights, a row each
};

template <class T> bool make_space(ForwardSpace &f, const Documents &d) {
    f.key_steps = steps_of<T>(d.key_width);
    f.key_pitch = padded(f.key_steps);
    f.value_pitch = padded(d.value_width);
    const int64_t pairs = Layout<T>::PAIRS ? QUERIES * SCORE_PITCH : 0;
    const int64_t count = (TASK_QUERIES + KEYS) * f.key_pitch + KEYS * f.key_steps +
                          (TASK_QUERIES + KEYS) * f.value_pitch + QUERIES * SCORE_PITCH + pairs + 2 * TASK_QUERIES;
    Pieces pieces = {reinterpret_cast<char *>(flash_space.get<Step>(count + 16 * 9))};
    if (!pieces.at) return false;
    f.queries = pieces.take<Step>(TASK_QUERIES * f.key_pitch);
    f.keys = pieces.take<Step>(KEYS * f.key_pitch);
    f.turned = pieces.take<Step>(KEYS * f.key_steps);
    f.values = pieces.take<Step>(KEYS * f.value_pitch);
    f.weights = pieces.take<Step>(pairs);
    f.scores = pieces.take<float>(QUERIES * SCORE_PITCH);
    f.sums = pieces.take<float>(TASK_QUERIES * f.value_pitch);
    f.largest = pieces.take<float>(TASK_QUERIES);
    f.total = pieces.take<float>(TASK_QUERIES);
    return true;
}

// 2ʸ within 2 units in the last place for y in [-126, 127]; below, 2⁻¹²⁶. Half the instructions of fast_exp.
inline float fast_exp2(float y) {
    y = y < -126.0f ? -126.0f : y;
    const float shifted =
        y + 12583039.0f;  // 1.5 · 2²³ + 127: the low bits are the biased exponent of the nearest integer
    const float r = y - (shifted - 12583039.0f);
    float p = 1.535336188319500e-4f;
    p = p * r + 1.339887440266574e-3f;
    p = p * r + 9.618437357674640e-3f;
    p = p * r + 5.550332471162809e-2f;
    p = p * r + 2.402264791363012e-1f;
    p = p * r + 6.931472028550421e-1f;
    p = p * r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    bits <<= 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

// Joins all lanes in an order that does not depend on the instruction set; unrolled, it stays in registers.
template <class Combine> inline float fold_lanes(float *v, Combine combine) {
#pragma GCC unroll 4
    for (int half = LANES / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int l = 0; l < half; l++) v[l] = combine(v[l], v[l + half]);
    return v[0];
}

inline float larger(float a, float b) { return a < b ? b : a; }

// Turns scores of one row into weights, zeros after the first `seen`; returns the factor that rescales earlier sums.
// `scale` takes scores to powers of two.
inline float weigh(float *row, int64_t seen, float scale, bool first, float *largest, float *total) {
    const int64_t filled = round_up(seen, LANES);
    for (int64_t j = seen; j < filled; j++) row[j] = row[0];
    float lanes[LANES], sums[LANES] = {};
    for (float &lane : lanes) lane = first ? -INFINITY : *largest;
    for (int64_t j = 0; j < filled; j += LANES)
#pragma omp simd
        for (int l = 0; l < LANES; l++) lanes[l] = larger(lanes[l], row[j + l] * scale);
    const float most = fold_lanes(lanes, larger);
#pragma omp simd
    for (int64_t j = 0; j < filled; j++) row[j] = fast_exp2(std::fma(row[j], scale, -most));
    for (int64_t j = seen; j < KEYS; j++) row[j] = 0.0f;
    for (int64_t j = 0; j < filled; j += LANES)
#pragma omp simd
        for (int l = 0; l < LANES; l++) sums[l] += row[j + l];
    const float before = first ? 0.0f : fast_exp2(*largest - most),
                sum = fold_lanes(sums, [](float a, float b) { return a + b; });
    *total = first ? sum : std::fma(*total, before, sum);
    *largest = most;
    return before;
}

// Up to QUERIES queries from `query` on with up to KEYS keys from `key` on; meanwhile the next keys and values are
// fetched.
template <class T> void attend_block(const FlashForward &a, const ForwardSpace &f, const QueryTask &t, Strided queries,
                                     int64_t query, int64_t key) {
    const Documents &d = a.documents;
    const int64_t count = std::min(KEYS, t.last - key), rows = std::min(QUERIES, t.last - query), row = query - t.first,
                  ahead = query - key;
    const bool begins = key == t.begin;
    float *sums = f.sums + row * f.value_pitch;
    multiply_tiles<T>(f.scores, SCORE_PITCH, {queries.data + row * queries.row, queries.row, 1}, rows,
                      {f.turned, NR, f.key_steps * NR}, count, false, [&](int64_t, int64_t end, int64_t column) {
                          return Part{0, column < ahead + end ? f.key_steps : 0};
                      });
    for (int64_t i = 0; i < rows; i++) {
        const float before = weigh(f.scores + i * SCORE_PITCH, std::min(count, ahead + i + 1), d.scale * LOG2_E, begins,
                                   f.largest + row + i, f.total + row + i);
        const int64_t next = key + KEYS + i;
        if (i < KEYS && next < t.last) {
            fetch_row<T>(a.k, next, t.kv_head, d.key_width);
            fetch_row<T>(a.v, next, t.kv_head, d.value_width);
        }
        if (begins || before == 1.0f) continue;
        float *sum = sums + i * f.value_pitch;
#pragma omp simd
        for (int64_t j = 0; j < d.value_width; j++) sum[j] *= before;
    }
    multiply_tiles<T>(
        sums, f.value_pitch, as_rows<T>(f.weights, f.scores, rows), rows, {f.values, f.value_pitch, NR}, d.value_width,
        !begins, [&](int64_t, int64_t end, int64_t) { return Part{0, steps_of<T>(std::min(count, ahead + end))}; });
}

template <class T> bool attend_queries(const FlashForward &a, const QueryTask &t) {
    const Documents &d = a.documents;
    ForwardSpace f;
    if (!make_space<T>(f, d)) return false;
    const Strided queries =
        take_rows(f.queries, f.key_pitch, element<T>(a.q, t.first, t.head), a.q.row, t.last - t.first, d.key_width);
    for (int64_t key = t.begin; key < t.last; key += KEYS) {
        const int64_t count = std::min(KEYS, t.last - key);
        turn(f.turned, take_rows(f.keys, f.key_pitch, element<T>(a.k, key, t.kv_head), a.k.row, count, d.key_width),
             count, f.key_steps);
        copy_panel(f.values, f.value_pitch, element<T>(a.v, key, t.kv_head), a.v.row, count, d.value_width);
        for (int64_t query = std::max(t.first, key); query < t.last; query += QUERIES)
            attend_block<T>(a, f, t, queries, query, key);
    }
    for (int64_t i = 0; i < t.last - t.first; i++) {
        const int64_t row = t.first + i;
        const float inverse = 1.0f / f.total[i], *sum = f.sums + i * f.value_pitch;
        T *out = static_cast<T *>(a.out) + (row * d.num_heads + t.head) * d.value_width;
        for (int64_t j = 0; j < d.value_width; j++) store_value(out + j, sum[j] * inverse);
        a.log_sums[t.head * d.num_rows + row] = f.largest[i] + std::log2(f.total[i]);
    }
    return true;
}

template <class T> int flash_forward(const FlashForward &a, int threads) {
    const int64_t count = list_query_tasks(nullptr, a.documents);
    QueryTask *tasks = flash_tasks.get<QueryTask>(count);
    if (!tasks) return MOESTRO_NO_MEMORY;
    list_query_tasks(tasks, a.documents);
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(| : failed)
    for (int64_t t = 0; t < count; t++) failed |= !attend_queries<T>(a, tasks[t]);
    return failed ? MOESTRO_NO_MEMORY : MOESTRO_OK;
}

}  // namespace
