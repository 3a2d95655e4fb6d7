// Functions of single rows that a serving step needs besides products: rotation, routing, addition.
#pragma once
#include "math/rows.h"
#include "abi/table.h"

namespace {

thread_local Scratch route_row;

template <class T> void rope(const Rope &a, int threads) {
    T *out = static_cast<T *>(a.out);
    const T *x = static_cast<const T *>(a.x);
    const int64_t half = a.width / 2;
    for_rows(a.rows, a.groups * a.width, threads, [&](int64_t i) {
        for (int64_t g = 0; g < a.groups; g++)
            rotate_vector(out + i * a.out_row + g * a.out_group, x + i * a.x_row + g * a.x_group, a.cos + i * half,
                          a.sin + i * half, a.width, a.inverse ? -1.0f : 1.0f);
    });
}

template <class T> void add(T *out, const T *a, const T *b, int64_t rows, int64_t width, int threads) {
    for_rows(rows, width, threads, [&](int64_t i) {
        for (int64_t j = i * width; j < (i + 1) * width; j++)
            store_value(out + j, load_value(a + j) + load_value(b + j));
    });
}

// NaN counts as the largest, as in torch, so the chosen experts exist whatever the scores are.
inline float comparable(float v) { return v == v ? v : INFINITY; }

// ids: the `count` largest of values in descending order, ties by lowest index. Each is the successor of the one before
// in that order, so all differ. 0 <= count <= num_values.
inline void select_largest(int64_t *ids, int64_t count, const float *values, int64_t num_values) {
    for (int64_t a = 0; a < count; a++) {
        int64_t best = -1;
        for (int64_t i = 0; i < num_values; i++) {
            const bool is_left =
                a == 0 || values[i] < values[ids[a - 1]] || (values[i] == values[ids[a - 1]] && i > ids[a - 1]);
            if (is_left && (best < 0 || values[i] > values[best])) best = i;
        }
        ids[a] = best;
    }
}

// Experts outside the best groups become -inf. `best` and `kept` hold one value per group.
inline void mask_groups(float *choice, float *best, int64_t *kept, const Route &a) {
    const int64_t size = a.num_experts / a.num_groups;
    for (int64_t g = 0; g < a.num_groups; g++) {
        float first = -INFINITY, second = -INFINITY;
        for (int64_t i = g * size; i < (g + 1) * size; i++) {
            second = std::max(second, std::min(first, choice[i]));
            first = std::max(first, choice[i]);
        }
        best[g] = comparable(a.group_best == 2 ? first + second : first);
    }
    select_largest(kept, a.top_k_groups, best, a.num_groups);
    for (int64_t k = 0; k < a.top_k_groups; k++) best[kept[k]] = NAN;  // marks kept groups: no other is NaN
    for (int64_t i = 0; i < a.num_experts; i++)
        if (best[i / size] == best[i / size]) choice[i] = -INFINITY;
}

inline bool route_one(const Route &a, int64_t row) {
    int64_t *kept = route_row.get<int64_t>(2 * a.num_groups + a.num_experts);
    if (!kept) return false;
    float *best = reinterpret_cast<float *>(kept + a.num_groups), *scores = best + 2 * a.num_groups,
          *choice = scores + a.num_experts;
    int64_t *ids = a.ids + row * a.top_k;
    float *weights = a.weights + row * a.top_k, sum = 0;
    score_row(scores, a.logits + row * a.num_experts, a.num_experts, a.function);
    if (!a.given || (a.top_k && ids[0] < 0)) {
        for (int64_t e = 0; e < a.num_experts; e++)
            choice[e] = comparable(a.multiply ? scores[e] * (1.0f + a.bias[e]) : scores[e] + a.bias[e]);
        if (a.num_groups > a.top_k_groups) mask_groups(choice, best, kept, a);
        select_largest(ids, a.top_k, choice, a.num_experts);
    }
    for (int64_t k = 0; k < a.top_k; k++) sum += weights[k] = scores[ids[k]];
    for (int64_t k = 0; k < a.top_k; k++)
        weights[k] = (a.normalize ? weights[k] / (sum + 1e-20f) : weights[k]) * a.scale;
    return true;
}

inline int route(const Route &a, int threads) {
    const int share = a.rows * a.num_experts < SHARED_VALUES / 8 ? 1 : threads;
    int failed = 0;
#pragma omp parallel for num_threads(share) schedule(static) reduction(| : failed)
    for (int64_t i = 0; i < a.rows; i++) failed |= !route_one(a, i);
    return failed ? MOESTRO_NO_MEMORY : MOESTRO_OK;
}

}  // namespace
