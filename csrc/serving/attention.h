// Attention over pages of cached rows. A unit is up to NR columns (a query row and a head each) of one sequence and
// group; its keys are taken in splits of SPLIT, aligned to absolute positions:
//
//   scores    rows of a page, read in place, times a panel of the columns' queries; a cached row is read once for all
//
//   weights   exp(score − largest of the split), one lane per column; keys that a column does not see weigh 0
//
//   values    weights, transposed into rows, times values, read in place or, with bf16 products, packed into panels
//
// Pages of an FP8 cache are widened first, a split at a time, to rows of the type of the queries; the rest is the same.
//
// Splits are merged in order by the usual rescaling, whether one thread or several computed them, so a column's result
// depends only on its query, its position and its cached rows. A row that sees only a selection is its own sequence,
// whose cached rows are the selected ones.
#pragma once
#include <omp.h>

#include "abi/table.h"
#include "math/tile.h"
#include "serving/fp8_rows.h"

namespace {

constexpr int64_t PAGE = 64, SPLIT = 256;
constexpr int64_t MOST_PARTIAL = int64_t(1) << 25;   // floats of splits that are kept to be merged
constexpr int64_t MOST_GATHERED = int64_t(1) << 25;  // values of selected rows that are gathered at once
constexpr int SCORE_ROWS = Isa::WIDTH;  // SCORE_ROWS / V rows times V vectors: as many sums as registers allow

thread_local Scratch query_panel, score_floats, weight_panel, weight_rows, value_panel, row_copies, own_state,
    own_partial, wide_rows;
Scratch call_units, call_partial, call_pages, call_places;

struct Unit {
    int64_t sequence, group, first_column, splits_before;
};

// The running softmax of a unit: largest score, sum of weights, weighted sum of values of every column.
struct Softmax {
    float *largest, *sum, *values;
    static int64_t size(int64_t stride) { return NR * (stride + 2); }
    static Softmax at(float *p) { return {p, p + NR, p + 2 * NR}; }
};

template <class T> struct Query {
    const T *columns[NR];
    T *out[NR];
    int64_t seen[NR];  // number of keys that a column sees
    const int32_t *table;
    const T *rows;  // of the group, at row 0 of page 0
    int64_t group, num_keys;
    int count, width;
};

template <class T> Query<T> make_query(const PagedAttention &a, const Unit &unit) {
    Query<T> q;
    const int64_t per_group = a.num_heads / a.groups, begin = a.starts[unit.sequence];
    const int64_t columns = (a.starts[unit.sequence + 1] - begin) * per_group;
    q.count = int(std::min<int64_t>(NR, columns - unit.first_column));
    q.width = Isa::WIDTH;
    while (q.width < q.count) q.width *= 2;
    q.group = unit.group;
    q.table = a.tables + unit.sequence * a.max_pages;
    q.rows = static_cast<const T *>(a.pages) + unit.group * (a.page_width / a.groups);
    for (int c = 0; c < NR; c++) {
        const int64_t column = unit.first_column + std::min(c, q.count - 1), row = column / per_group;
        const int64_t vector = (begin + row) * a.num_heads + unit.group * per_group + column % per_group;
        q.columns[c] = static_cast<const T *>(a.q) + vector * a.key_width;
        q.out[c] = static_cast<T *>(a.out) + vector * a.value_width;
        q.seen[c] = a.first[unit.sequence] + row + 1;
    }
    q.num_keys = q.seen[NR - 1];
    return q;
}

template <class T> constexpr Mode MODE_OF = Layout<T>::PAIRS ? Mode::PAIRS : Mode::FLOATS;
template <class T> constexpr bool WIDENED = sizeof(T) == 2 && !Isa::HAS_BF16;  // bf16 that is widened where it is used

// scores (+)= rows · panel over some steps.
template <Mode MODE, int V>
void score_rows(float *scores, Rows rows, int64_t count, const Step *panel, int64_t steps, bool accumulate) {
    constexpr int R = SCORE_ROWS / V, WIDTH = V * Isa::WIDTH;
    for (int64_t r = 0; r < count; r += R)
        with_rows<R>(std::min<int64_t>(R, count - r), [&](auto n) {
            const char *own = rows.data + r * rows.bytes;
            tile<MODE, decltype(n)::value, V>(scores + r * WIDTH, WIDTH, {own, rows.bytes},
                                              reinterpret_cast<const char *>(panel), WIDTH * 4, steps, accumulate,
                                              {own + R * rows.bytes, 64});
        });
}

// scores of a page, a piece of the panel for all its rows at a time.
template <Mode MODE, int V> void score_page(float *scores, Rows rows, int64_t count, const Step *panel, int64_t steps) {
    constexpr int64_t PER = MODE == Mode::WIDE_ROWS ? 2 : 1, PIECE = K_PIECE / PER;
    for (int64_t s = 0; s < steps; s += PIECE)
        score_rows<MODE, V>(scores, {rows.data + s * 4, rows.bytes}, count, panel + s * PER * V * Isa::WIDTH,
                            std::min(PIECE, steps - s), s > 0);
}

template <Mode MODE>
void score_page(float *scores, int width, Rows rows, int64_t count, const Step *panel, int64_t steps) {
    if (width == Isa::WIDTH)
        score_page<MODE, 1>(scores, rows, count, panel, steps);
    else if (width == 2 * Isa::WIDTH)
        score_page<MODE, 2>(scores, rows, count, panel, steps);
    else
        score_page<MODE, Isa::VECTORS>(scores, rows, count, panel, steps);
}

// Where the rows of a split lie, page by page.
template <class T> struct Pages {
    const T *at[SPLIT / PAGE];
};

template <class T>
bool find_pages(Pages<T> &pages, const Query<T> &q, const PagedAttention &a, int64_t first, int64_t keys) {
    T *wide = a.fp8 ? wide_rows.get<T>(SPLIT * a.page_width) : nullptr;
    if (a.fp8 && !wide) return false;
    for (int64_t j = 0; j < keys; j += PAGE) {
        const int64_t page = q.table[(first + j) / PAGE];
        pages.at[j / PAGE] = a.fp8 ? wide + j * a.page_width : q.rows + page * PAGE * a.page_width;
        for (int64_t i = 0; a.fp8 && i < std::min(PAGE, keys - j); i++)
            widen_row(wide + (j + i) * a.page_width, a, page * PAGE + i);
    }
    return true;
}

// scores [keys][width] of one split.
template <class T>
bool score_split(float *scores, const Query<T> &q, const PagedAttention &a, const Pages<T> &pages, int64_t keys) {
    const int64_t steps = steps_of<T>(a.key_width);
    const bool in_place = sizeof(T) == 4 || a.key_width % 2 == 0;
    Step *panel = query_panel.get<Step>(steps * NR), *copies = in_place ? nullptr : row_copies.get<Step>(PAGE * steps);
    if (!panel || (!in_place && !copies)) return false;
    pack_columns(panel, q.width, q.columns, q.count, a.key_width);
    for (int64_t j = 0; j < keys; j += PAGE) {
        const int64_t count = std::min(PAGE, keys - j);
        const T *page = pages.at[j / PAGE];
        const Rows rows = {reinterpret_cast<const char *>(page), a.page_width * int64_t(sizeof(T))};
        if (!in_place) {
            for (int64_t i = 0; i < count; i++) copy_steps(copies + i * steps, page + i * a.page_width, a.key_width);
            score_page<MODE_OF<T>>(scores + j * q.width, q.width, {reinterpret_cast<const char *>(copies), steps * 4},
                                   count, panel, steps);
        } else if (WIDENED<T>)
            score_page<Mode::WIDE_ROWS>(scores + j * q.width, q.width, rows, count, panel, steps / 2);
        else
            score_page<MODE_OF<T>>(scores + j * q.width, q.width, rows, count, panel, steps);
    }
    return true;
}

inline Step step_of_weights(float p, float, float *used, float *, const float *) {
    Step s;
    memcpy(&s, &p, 4);
    *used = p;
    return s;
}
inline Step step_of_weights(float p, float q, float *used, float *used_next, const uint16_t *) {
    const uint16_t low = to_bf16(p), high = to_bf16(q);
    *used = to_float(low);
    *used_next = to_float(high);
    return Isa::HAS_BF16 ? Step(low) | Step(high) << 16 : Step(low) << 16;
}

// Weights of one vector of columns: panel[steps][width] at these columns, their largest scores and sums.
template <class T> void weigh_columns(Step *panel, float *largest, float *sum, const float *scores, const int32_t *seen,
                                      int64_t keys, int width, float scale) {
    constexpr int W = Isa::WIDTH, PER = Layout<T>::PER_STEP;
    float most[W], total[W] = {};
    for (float &m : most) m = -INFINITY;
    for (int64_t j = 0; j < keys; j++)
#pragma omp simd
        for (int c = 0; c < W; c++) {
            const float s = scores[j * width + c] * scale;
            most[c] = j < seen[c] && !(s <= most[c]) ? s : most[c];
        }
    for (int c = 0; c < W; c++) most[c] = seen[c] > 0 ? most[c] : 0.0f;
    for (int64_t j = 0; j < keys; j += PER)
#pragma omp simd
        for (int c = 0; c < W; c++) {
            const float s0 = j < seen[c] ? std::fma(scores[j * width + c], scale, -most[c]) : 0.0f;
            const float s1 =
                PER == 2 && j + 1 < seen[c] ? std::fma(scores[(j + 1) * width + c], scale, -most[c]) : 0.0f;
            const float p0 = j < seen[c] ? fast_exp(s0) : 0.0f, p1 = PER == 2 && j + 1 < seen[c] ? fast_exp(s1) : 0.0f;
            float used0 = 0, used1 = 0;
            panel[j / PER * width + c] = step_of_weights(p0, p1, &used0, &used1, static_cast<const T *>(nullptr));
            total[c] = PER == 2 ? total[c] + used0 + used1 : total[c] + used0;
        }
    for (int c = 0; c < W; c++) {
        largest[c] = most[c];
        sum[c] = total[c];
    }
}

// Σ over some keys of weight · value, to [count][stride]; value vectors as `tile` reads them.
template <Mode MODE> void add_panel(float *to, int64_t stride, Rows weights, int64_t count, const char *panel,
                                    int64_t panel_bytes, int64_t steps, bool accumulate) {
    for (int64_t c = 0; c < count; c += MR)
        with_rows<MR>(std::min<int64_t>(MR, count - c), [&](auto r) {
            tile<MODE, decltype(r)::value, Isa::VECTORS>(to + c * stride, stride,
                                                         {weights.data + c * weights.bytes, weights.bytes}, panel,
                                                         panel_bytes, steps, accumulate, {panel, 0});
        });
}

// Σ over the keys of one split of weight · value: to [count][stride].
template <class T> bool add_values(float *to, int64_t stride, const Query<T> &q, const PagedAttention &a,
                                   const Pages<T> &pages, const Step *weights, int64_t row_steps, int64_t keys) {
    constexpr int PER = Layout<T>::PER_STEP;
    Step *panel = value_panel.get<Step>(steps_of<T>(PAGE) * NR);
    if (!panel) return false;
    for (int64_t j = 0; j < keys; j += PAGE) {
        const int64_t count = std::min(PAGE, keys - j);
        const T *page = pages.at[j / PAGE] + a.value_offset;
        const Rows rows = {reinterpret_cast<const char *>(weights + j / PER), row_steps * 4};
        for (int64_t v = 0; v < a.value_width; v += NR) {
            const int64_t columns = std::min<int64_t>(NR, a.value_width - v);
            if (WIDENED<T> && columns == NR) {
                add_panel<Mode::WIDE_VALUES>(to + v, stride, rows, q.count, reinterpret_cast<const char *>(page + v),
                                             a.page_width * 2, count, j > 0);
                continue;
            }
            pack_panel(panel, page + v, a.page_width, nullptr, false, count, int(columns));
            add_panel<MODE_OF<T>>(to + v, stride, rows, q.count, reinterpret_cast<const char *>(panel), NR * 4,
                                  steps_of<T>(count), j > 0);
        }
    }
    return true;
}

template <class T>
bool attend_split(Softmax to, int64_t stride, const Query<T> &q, const PagedAttention &a, int64_t split) {
    constexpr int PER = Layout<T>::PER_STEP, STEPS = SPLIT / PER;
    const int64_t first = split * SPLIT, keys = std::min(SPLIT, q.num_keys - first);
    float *scores = score_floats.get<float>(SPLIT * NR);
    Step *panel = weight_panel.get<Step>(STEPS * NR), *rows = weight_rows.get<Step>(STEPS * NR);
    Pages<T> pages;
    if (!scores || !panel || !rows || !find_pages(pages, q, a, first, keys)) return false;
    if (!score_split(scores, q, a, pages, keys)) return false;
    int32_t seen[NR];
    for (int c = 0; c < NR; c++) seen[c] = int32_t(std::min(SPLIT, std::max<int64_t>(0, q.seen[c] - first)));
    for (int c = 0; c < q.width; c += Isa::WIDTH)
        weigh_columns<T>(panel + c, to.largest + c, to.sum + c, scores + c, seen + c, keys, q.width, a.scale);
    for (int64_t s = 0; s < steps_of<T>(keys); s += 8)
        for (int c = 0; c < q.width; c += 8) {
            const void *from[8];
            for (int i = 0; i < 8; i++) from[i] = panel + (s + i) * q.width + c;
            Isa::transpose8(rows + c * STEPS + s, STEPS, from);
        }
    return add_values(to.values, stride, q, a, pages, rows, STEPS, keys);
}

template <class T> void merge(Softmax to, Softmax from, int64_t stride, const Query<T> &q, int64_t split) {
    for (int c = 0; c < q.count; c++) {
        if (q.seen[c] <= split * SPLIT) continue;
        const float largest = std::max(to.largest[c], from.largest[c]);
        const float before = fast_exp(to.largest[c] - largest), now = fast_exp(from.largest[c] - largest);
        float *out = to.values + c * stride;
        const float *in = from.values + c * stride;
        to.largest[c] = largest;
        to.sum[c] = std::fma(from.sum[c], now, to.sum[c] * before);
        for (int64_t j = 0; j < stride; j++) out[j] = std::fma(in[j], now, out[j] * before);
    }
}

template <class T> void finish(Softmax state, int64_t stride, const Query<T> &q, int64_t width) {
    for (int c = 0; c < q.count; c++) {
        const float inverse = 1.0f / state.sum[c];
        for (int64_t j = 0; j < width; j++) store_value(q.out[c] + j, state.values[c * stride + j] * inverse);
    }
}

template <class T> bool attend_unit(const PagedAttention &a, const Unit &unit, int64_t stride) {
    const Query<T> q = make_query<T>(a, unit);
    float *memory = own_state.get<float>(Softmax::size(stride)), *other = own_partial.get<float>(Softmax::size(stride));
    if (!memory || !other) return false;
    const Softmax state = Softmax::at(memory), partial = Softmax::at(other);
    if (!attend_split(state, stride, q, a, 0)) return false;
    for (int64_t split = 1; split * SPLIT < q.num_keys; split++) {
        if (!attend_split(partial, stride, q, a, split)) return false;
        merge(state, partial, stride, q, split);
    }
    finish(state, stride, q, a.value_width);
    return true;
}

inline int64_t splits_of(const PagedAttention &a, int64_t sequence, int64_t last_column) {
    const int64_t row = last_column / (a.num_heads / a.groups);
    return (a.first[sequence] + row) / SPLIT + 1;
}

// Lists the units; with `to` null only counts them. Returns their number; *splits is the number of their splits.
inline int64_t list_units(Unit *to, const PagedAttention &a, int64_t *splits) {
    int64_t count = *splits = 0;
    for (int64_t s = 0; s < a.num_sequences; s++) {
        const int64_t columns = (a.starts[s + 1] - a.starts[s]) * (a.num_heads / a.groups);
        for (int64_t g = 0; g < a.groups; g++)
            for (int64_t c = 0; c < columns; c += NR) {
                if (to) to[count] = {s, g, c, *splits};
                *splits += splits_of(a, s, std::min<int64_t>(c + NR, columns) - 1);
                count++;
            }
    }
    return count;
}

// For few units of many splits: computes all splits first, then merges each unit.
template <class T> int attend_splits(const PagedAttention &a, const Unit *units, int64_t count, int64_t splits,
                                     int64_t stride, int threads) {
    const int64_t size = Softmax::size(stride);
    float *partial = call_partial.get<float>(splits * size);
    if (!partial) return MOESTRO_NO_MEMORY;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < splits; task++) {
            int64_t u = 0;
            while (u + 1 < count && units[u + 1].splits_before <= task) u++;
            const Query<T> q = make_query<T>(a, units[u]);
            failed |= !attend_split(Softmax::at(partial + task * size), stride, q, a, task - units[u].splits_before);
        }
#pragma omp for schedule(dynamic)
        for (int64_t u = 0; u < count; u++) {
            const Query<T> q = make_query<T>(a, units[u]);
            float *own = partial + units[u].splits_before * size;
            for (int64_t split = 1; split * SPLIT < q.num_keys; split++)
                merge(Softmax::at(own), Softmax::at(own + split * size), stride, q, split);
            finish(Softmax::at(own), stride, q, a.value_width);
        }
    }
    return failed ? MOESTRO_NO_MEMORY : MOESTRO_OK;
}

template <class T> int attend_all(const PagedAttention &a, int threads) {
    const int64_t stride = round_up(a.value_width, NR);
    int64_t splits;
    Unit *units = call_units.get<Unit>(list_units(nullptr, a, &splits));
    if (!units) return MOESTRO_NO_MEMORY;
    const int64_t count = list_units(units, a, &splits);
    if (count < 4 * threads && splits > count && splits * Softmax::size(stride) <= MOST_PARTIAL)
        return attend_splits<T>(a, units, count, splits, stride, threads);
    int failed = 0;
#pragma omp parallel for num_threads(splits > 1 ? threads : 1) schedule(dynamic) reduction(| : failed)
    for (int64_t u = count - 1; u >= 0; u--) failed |= !attend_unit<T>(a, units[u], stride);
    return failed ? MOESTRO_NO_MEMORY : MOESTRO_OK;
}

// Copies the selected rows of query row `row` to `pages`; returns their number.
template <class T> int64_t gather_rows(T *pages, const PagedAttention &a, int64_t row) {
    const int64_t sequence = std::upper_bound(a.starts, a.starts + a.num_sequences, row) - a.starts - 1;
    const int32_t *positions = a.selection + row * a.selected, *table = a.tables + sequence * a.max_pages;
    int64_t count = 0;
    for (; count < a.selected && positions[count] >= 0; count++) {
        const int64_t slot = table[positions[count] / PAGE] * PAGE + positions[count] % PAGE;
        T *to = pages + count * a.page_width;
        if (a.fp8)
            widen_row(to, a, slot);
        else
            memcpy(to, static_cast<const T *>(a.pages) + slot * a.page_width, sizeof(T) * a.page_width);
    }
    return count;
}

// Every query row as its own sequence, in batches that keep the gathered pages bounded.
template <class T> int attend_selected(PagedAttention a, int threads) {
    const int64_t num_rows = a.starts[a.num_sequences], pages = (a.selected + PAGE - 1) / PAGE,
                  values = pages * PAGE * a.page_width;
    const int64_t most = std::min(num_rows, std::max<int64_t>(1, MOST_GATHERED / std::max<int64_t>(values, 1)));
    T *gathered = call_pages.get<T>(most * values);
    int64_t *starts = call_places.get<int64_t>(2 * most + 1 + (most * pages + 1) / 2), *first = starts + most + 1;
    if (!gathered || !starts) return MOESTRO_NO_MEMORY;
    int32_t *tables = reinterpret_cast<int32_t *>(first + most);
    for (int64_t i = 0; i <= most; i++) starts[i] = i;
    for (int64_t i = 0; i < most * pages; i++) tables[i] = int32_t(i);
    PagedAttention own = a;
    own.pages = gathered, own.fp8 = false, own.tables = tables, own.starts = starts, own.first = first,
    own.max_pages = pages;
    for (int64_t row = 0; row < num_rows; row += most) {
        own.num_sequences = std::min(most, num_rows - row);
        own.q = static_cast<const T *>(a.q) + row * a.num_heads * a.key_width;
        own.out = static_cast<T *>(a.out) + row * a.num_heads * a.value_width;
#pragma omp parallel for num_threads(own.num_sequences > 1 ? threads : 1) schedule(static)
        for (int64_t i = 0; i < own.num_sequences; i++) first[i] = gather_rows(gathered + i * values, a, row + i) - 1;
        if (const int error = attend_all<T>(own, threads)) return error;
    }
    return MOESTRO_OK;
}

template <class T> int paged_attention(const PagedAttention &a, int threads) {
    return a.selection ? attend_selected<T>(a, threads) : attend_all<T>(a, threads);
}

}  // namespace
