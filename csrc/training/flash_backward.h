// The backward pass of flash.h. With P the weights of a row that sum to 1, D = Σ d_out · out of a row:
//
//   P = exp(score) / Σ exp    dP = d_out · vᵀ   dS = P · (dP − D)
//   dv = Pᵀ · d_out            dk = scale · dSᵀ · q            dq = scale · dS · k
//
// A task owns a chunk of a document's keys and one of their heads. It walks over blocks of keys, and for each over all
// queries that see it, so dk and dv are finished with their block. Its share of dq is summed in fp32. A short document
// is one chunk. A long one has several, few enough that their shares take memory linear in its length; the shares are
// added in order.
#pragma once
#include "training/flash.h"

namespace {

constexpr int64_t CHUNK_KEYS = 512;     // a document with more keys may be cut
constexpr int64_t DOCUMENT_TASKS = 32;  // chunks of a document make no more tasks than this

Scratch flash_shares, flash_dots;
thread_local Scratch flash_own;

struct KeyTask {
    int64_t end, first, last;  // of its document; its own keys
    int64_t head, chunk, num_chunks;
    int64_t share;  // where its share of dq begins, for documents of several chunks
};

inline int64_t share_size(const Documents &d, const KeyTask &t) {
    return d.num_heads / d.num_kv_heads * (t.end - t.first) * padded(d.key_width);
}

// Lists the tasks; with `to` null only counts them. *shares is the number of floats for the shares of several chunks.
inline int64_t list_key_tasks(KeyTask *to, const Documents &d, int64_t *shares) {
    const int64_t most = std::max<int64_t>(1, DOCUMENT_TASKS / d.num_kv_heads);
    int64_t count = *shares = 0;
    for (int64_t s = 0; s < d.num_documents; s++) {
        const int64_t begin = d.starts[s], end = d.starts[s + 1], length = end - begin;
        const int64_t wish = std::min(most, (length + CHUNK_KEYS - 1) / CHUNK_KEYS);
        const int64_t chunk = length ? round_up((length + wish - 1) / wish, KEYS) : 1,
                      chunks = (length + chunk - 1) / chunk;
        for (int64_t h = 0; h < d.num_kv_heads; h++)
            for (int64_t c = 0; c < chunks; c++) {
                const KeyTask task = {end,    begin + c * chunk, std::min(begin + (c + 1) * chunk, end), h, c, chunks,
                                      *shares};
                if (to) to[count] = task;
                if (chunks > 1) *shares += share_size(d, task);
                count++;
            }
    }
    return count;
}

// The work space of a backward task: all its queries of one head and one block of keys, as rows and as panels;
// gradients of one block of keys or, if several heads share the keys, of all.
struct BackwardSpace {
    int64_t key_steps, value_steps, key_pitch,
        value_pitch;  // pitches hold rows of steps, of panels and of floats alike
    Step *q_rows, *q_panel, *d_rows, *d_panel, *k_rows, *k_panel, *k_turned, *v_rows, *v_turned, *pairs;
    float *weights, *gradients, *dk, *dv;
};

template <class T> bool make_space(BackwardSpace &b, const Documents &d, int64_t queries, int64_t keys) {
    constexpr bool TWICE = Layout<T>::PAIRS;  // else rows already are a panel
    b.key_steps = steps_of<T>(d.key_width);
    b.value_steps = steps_of<T>(d.value_width);
    b.key_pitch = padded(d.key_width);
    b.value_pitch = padded(d.value_width);
    const int64_t of_queries = (TWICE ? 2 : 1) * queries, block = QUERIES * SCORE_PITCH;
    const int64_t by_key = of_queries + keys + (TWICE ? 3 : 2) * KEYS, by_value = of_queries + keys + 2 * KEYS;
    Pieces pieces = {reinterpret_cast<char *>(
        flash_space.get<Step>(by_key * b.key_pitch + by_value * b.value_pitch + (TWICE ? 3 : 2) * block))};
    if (!pieces.at) return false;
    b.q_panel = pieces.take<Step>(queries * b.key_pitch);
    b.q_rows = TWICE ? pieces.take<Step>(queries * b.key_pitch) : b.q_panel;
    b.d_panel = pieces.take<Step>(queries * b.value_pitch);
    b.d_rows = TWICE ? pieces.take<Step>(queries * b.value_pitch) : b.d_panel;
    b.k_panel = pieces.take<Step>(KEYS * b.key_pitch);
    b.k_rows = TWICE ? pieces.take<Step>(KEYS * b.key_pitch) : b.k_panel;
    b.k_turned = pieces.take<Step>(KEYS * b.key_pitch);
    b.v_rows = pieces.take<Step>(KEYS * b.value_pitch);
    b.v_turned = pieces.take<Step>(KEYS * b.value_pitch);
    b.pairs = TWICE ? pieces.take<Step>(block) : nullptr;
    b.weights = pieces.take<float>(block);
    b.gradients = pieces.take<float>(block);
    b.dk = pieces.take<float>(keys * b.key_pitch);
    b.dv = pieces.take<float>(keys * b.value_pitch);
    return true;
}

template <class T>
void copy_both(Step *rows, Step *panel, int64_t pitch, const T *from, int64_t stride, int64_t count, int64_t width) {
    copy_panel(panel, pitch, from, stride, count, width);
    if (Layout<T>::PAIRS) copy_rows(rows, pitch, from, stride, count, width);
}

// Columns of weights as rows of a left operand with steps along the queries. Floats are one already.
template <class T> Strided as_columns(Step *space, const float *weights, int64_t rows) {
    if (!Layout<T>::PAIRS) return {reinterpret_cast<const Step *>(weights), 1, SCORE_PITCH};
    for (int64_t i = 0; i < rows; i += 2)
        for (int64_t j = 0; j < KEYS; j++) {
            const float *p = weights + i * SCORE_PITCH + j;
            space[i / 2 * SCORE_PITCH + j] =
                Step(to_bf16(p[0])) | (i + 1 < rows ? Step(to_bf16(p[SCORE_PITCH])) << 16 : 0);
        }
    return {space, 1, SCORE_PITCH};
}

// Turns scores of a row into weights, and gradients of weights into those of scores; zeros after the first `seen`.
inline void weigh_backward(float *weights, float *gradients, int64_t seen, float scale, float log_sum, float dot) {
    const int64_t filled = round_up(seen, LANES);
#pragma omp simd
    for (int64_t j = 0; j < filled; j++) {
        weights[j] = fast_exp2(std::fma(weights[j], scale, -log_sum));
        gradients[j] = weights[j] * (gradients[j] - dot);
    }
    for (int64_t j = seen; j < KEYS; j++) weights[j] = gradients[j] = 0.0f;
}

// A block of queries and a block of keys.
struct Meeting {
    int64_t row, rows, count,
        ahead;  // first query among those of the task; queries; keys; from the first key to the first query
    const float *log_sums, *dots;  // of the queries
    float *dq, *dk, *dv;
    bool dq_begun, dk_begun;  // whether there is something to add to
};

template <class T> void attend_backward(const BackwardSpace &b, const Documents &d, const Meeting &m) {
    constexpr int PER = Layout<T>::PER_STEP;
    const Strided queries = {b.q_rows + m.row * b.key_pitch, b.key_pitch, 1},
                  d_out = {b.d_rows + m.row * b.value_pitch, b.value_pitch, 1};
    const Panels q_panel = {b.q_panel + m.row / PER * b.key_pitch, b.key_pitch, NR},
                 d_panel = {b.d_panel + m.row / PER * b.value_pitch, b.value_pitch, NR};
    multiply_tiles<T>(
        b.weights, SCORE_PITCH, queries, m.rows, {b.k_turned, NR, b.key_steps * NR}, m.count, false,
        [&](int64_t, int64_t end, int64_t column) { return Part{0, column < m.ahead + end ? b.key_steps : 0}; });
    multiply_tiles<T>(
        b.gradients, SCORE_PITCH, d_out, m.rows, {b.v_turned, NR, b.value_steps * NR}, m.count, false,
        [&](int64_t, int64_t end, int64_t column) { return Part{0, column < m.ahead + end ? b.value_steps : 0}; });
    for (int64_t i = 0; i < m.rows; i++)
        weigh_backward(b.weights + i * SCORE_PITCH, b.gradients + i * SCORE_PITCH, std::min(m.count, m.ahead + i + 1),
                       d.scale * LOG2_E, m.log_sums[i], m.dots[i]);
    const auto below = [&](int64_t row, int64_t, int64_t) {
        return Part{std::max<int64_t>(0, row - m.ahead) / PER, steps_of<T>(m.rows)};
    };
    multiply_tiles<T>(m.dv, b.value_pitch, as_columns<T>(b.pairs, b.weights, m.rows), m.count, d_panel, d.value_width,
                      m.dk_begun, below);
    multiply_tiles<T>(m.dk, b.key_pitch, as_columns<T>(b.pairs, b.gradients, m.rows), m.count, q_panel, d.key_width,
                      m.dk_begun, below);
    multiply_tiles<T>(m.dq, b.key_pitch, as_rows<T>(b.pairs, b.gradients, m.rows), m.rows, {b.k_panel, b.key_pitch, NR},
                      d.key_width, m.dq_begun, [&](int64_t, int64_t end, int64_t) {
                          return Part{0, steps_of<T>(std::min(m.count, m.ahead + end))};
                      });
}

template <class T> void store_rows(void *to, const float *from, int64_t pitch, int64_t first, int64_t count,
                                   int64_t head, int64_t num_heads, int64_t width, float scale) {
    for (int64_t i = 0; i < count; i++) {
        T *out = static_cast<T *>(to) + ((first + i) * num_heads + head) * width;
        for (int64_t j = 0; j < width; j++) store_value(out + j, from[i * pitch + j] * scale);
    }
}

// dk and dv of a task's keys, and its share of dq: [heads of the group][queries from t.first on][pitch].
template <class T> bool attend_keys(const FlashBackward &a, const KeyTask &t, float *share) {
    const Documents &d = a.documents;
    const int64_t group = d.num_heads / d.num_kv_heads, queries = t.end - t.first;
    BackwardSpace b;
    if (!make_space<T>(b, d, queries, group > 1 ? t.last - t.first : KEYS)) return false;
    for (int64_t h = 0; h < group; h++) {
        const int64_t head = t.head * group + h;
        float *dq = share + h * queries * b.key_pitch;
        copy_both(b.q_rows, b.q_panel, b.key_pitch, element<T>(a.q, t.first, head), a.q.row, queries, d.key_width);
        copy_both(b.d_rows, b.d_panel, b.value_pitch, element<T>(a.d_out, t.first, head), a.d_out.row, queries,
                  d.value_width);
        for (int64_t key = t.first; key < t.last; key += KEYS) {
            const int64_t count = std::min(KEYS, t.last - key), kept = group > 1 ? key - t.first : 0;
            float *dk = b.dk + kept * b.key_pitch, *dv = b.dv + kept * b.value_pitch;
            copy_both(b.k_rows, b.k_panel, b.key_pitch, element<T>(a.k, key, t.head), a.k.row, count, d.key_width);
            turn(b.k_turned, {b.k_rows, b.key_pitch, 1}, count, b.key_steps);
            turn(b.v_turned,
                 take_rows(b.v_rows, b.value_pitch, element<T>(a.v, key, t.head), a.v.row, count, d.value_width), count,
                 b.value_steps);
            for (int64_t query = key; query < t.end; query += QUERIES) {
                const int64_t row = query - t.first, at = head * d.num_rows + query;
                attend_backward<T>(b, d,
                                   {row, std::min(QUERIES, t.end - query), count, query - key, a.log_sums + at,
                                    a.dots + at, dq + row * b.key_pitch, dk, dv, key > t.first, h > 0 || query > key});
            }
            if (h < group - 1) continue;
            store_rows<T>(a.dk, dk, b.key_pitch, key, count, t.head, d.num_kv_heads, d.key_width, d.scale);
            store_rows<T>(a.dv, dv, b.value_pitch, key, count, t.head, d.num_kv_heads, d.value_width, 1.0f);
        }
    }
    return true;
}

// dq of the queries in a task's chunk: the sum of the shares of all chunks up to its own, added to that of the first.
template <class T> void finish_queries(const FlashBackward &a, const KeyTask *t, float *const *shares) {
    const Documents &d = a.documents;
    const int64_t group = d.num_heads / d.num_kv_heads, pitch = padded(d.key_width);
    for (int64_t h = 0; h < group; h++) {
        const auto rows_of = [&](int64_t chunk) {
            const int64_t first = t[chunk - t->chunk].first;
            return shares[chunk] + (h * (t->end - first) + t->first - first) * pitch;
        };
        float *sum = rows_of(0);
        for (int64_t chunk = 1; chunk <= t->chunk; chunk++) {
            const float *from = rows_of(chunk);
            for (int64_t i = 0; i < (t->last - t->first) * pitch; i++) sum[i] += from[i];
        }
        store_rows<T>(a.dq, sum, pitch, t->first, t->last - t->first, t->head * group + h, d.num_heads, d.key_width,
                      d.scale);
    }
}

// dots [H, N] = Σ d_out · out of a row, in LANES lanes on every instruction set.
template <class T> void sum_dots(float *dots, const FlashBackward &a) {
    const Documents &d = a.documents;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < d.num_rows; row++)
        for (int64_t h = 0; h < d.num_heads; h++) {
            const T *out = static_cast<const T *>(a.out) + (row * d.num_heads + h) * d.value_width,
                    *d_out = element<T>(a.d_out, row, h);
            float lanes[LANES] = {};
            int64_t j = 0;
            for (; j + LANES <= d.value_width; j += LANES)
#pragma omp simd
                for (int l = 0; l < LANES; l++)
                    lanes[l] = std::fma(load_value(out + j + l), load_value(d_out + j + l), lanes[l]);
            for (int l = 0; j < d.value_width; j++, l++)
                lanes[l] = std::fma(load_value(out + j), load_value(d_out + j), lanes[l]);
            dots[h * d.num_rows + row] = sum_lanes(lanes);
        }
}

template <class T> int flash_backward(FlashBackward a, int threads) {
    const Documents &d = a.documents;
    int64_t size;
    const int64_t count = list_key_tasks(nullptr, d, &size);
    KeyTask *tasks = flash_tasks.get<KeyTask>(count);
    float *dots = flash_dots.get<float>(d.num_heads * d.num_rows), *shares = flash_shares.get<float>(size);
    if (!tasks || !dots || !shares) return MOESTRO_NO_MEMORY;
    list_key_tasks(tasks, d, &size);
    a.dots = dots;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        sum_dots<T>(dots, a);
#pragma omp for schedule(dynamic) reduction(| : failed)
        for (int64_t t = 0; t < count; t++) {
            const bool whole = tasks[t].num_chunks == 1;
            float *share = whole ? flash_own.get<float>(share_size(d, tasks[t])) : shares + tasks[t].share;
            if (!share || !attend_keys<T>(a, tasks[t], share))
                failed = 1;
            else if (whole)
                finish_queries<T>(a, tasks + t, &share);
        }
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < count; t++) {
            if (tasks[t].num_chunks == 1) continue;
            float *of_chunks[DOCUMENT_TASKS];
            for (int64_t c = 0; c <= tasks[t].chunk; c++) of_chunks[c] = shares + tasks[t - tasks[t].chunk + c].share;
            finish_queries<T>(a, tasks + t, of_chunks);
        }
    }
    return failed ? MOESTRO_NO_MEMORY : MOESTRO_OK;
}

}  // namespace
