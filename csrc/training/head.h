// Output head and cross-entropy in one, forward and backward, for one instruction set. Rows are taken a chunk at a
// time, and only the logits of one chunk exist. For each chunk: logits; per row the loss and the gradient of its
// logits, in place; the gradient of its hidden states; its share of the weight's gradient, chunks added in order.
#pragma once
#include "training/experts.h"

namespace {

constexpr int64_t CHUNK_VALUES = int64_t(1) << 23;  // about so many logits at a time
constexpr int64_t CHUNK_ROWS = 1024;

Scratch call_logits, call_gradients;

struct HeadTask {
    const int64_t *targets;
    const float *weights;  // of the rows in the sum that the gradients belong to; null: all 1
    int64_t vocabulary;
    float *nll;
    int64_t *argmax;
};

// Logits of one row -> its loss and likeliest token; with `gradient`, softmax − one-hot. Without a target: 0, and
// zeros.
template <class T> void cross_entropy_row(const HeadTask &a, int64_t row, float *logits, T *gradient) {
    const int64_t size = a.vocabulary, target = a.targets[row];
    float most[16], sums[16] = {}, largest = -INFINITY;
    for (float &m : most) m = -INFINITY;
    int64_t j = 0;
    for (; j + 16 <= size; j += 16)
#pragma omp simd
        for (int l = 0; l < 16; l++) most[l] = std::max(most[l], logits[j + l]);
    for (; j < size; j++) largest = std::max(largest, logits[j]);
    for (float m : most) largest = std::max(largest, m);
    int64_t best = 0;
    while (best < size - 1 && !(logits[best] == largest)) best++;
    a.argmax[row] = best;
    const float wanted = target >= 0 ? logits[target] : 0.0f;
    for (j = 0; j + 16 <= size; j += 16)
#pragma omp simd
        for (int l = 0; l < 16; l++) {
            logits[j + l] = fast_exp(logits[j + l] - largest);
            sums[l] += logits[j + l];
        }
    for (int l = 0; j < size; j++, l++) sums[l] += logits[j] = fast_exp(logits[j] - largest);
    float sum = 0;
    for (float s : sums) sum += s;
    a.nll[row] = target >= 0 ? std::log(sum) + largest - wanted : 0.0f;
    if (!gradient) return;
    const float share = target < 0 ? 0.0f : a.weights ? a.weights[row] : 1.0f, scale = share / sum;
    const float at_target = target >= 0 ? logits[target] * scale - share : 0.0f;
    for (j = 0; j < size; j++) store_value(gradient + j, logits[j] * scale);
    if (target >= 0) store_value(gradient + target, at_target);
}

// Repeats products of one tile that stays in the first cache, to see what the machine can do. Returns their operations.
template <class T> int64_t multiply_in_registers(int64_t rounds, int threads) {
    constexpr int64_t STEPS = 64;
#pragma omp parallel num_threads(threads)
    {
        alignas(64) float sums[MR * NR];
        alignas(64) Step panel[STEPS * NR] = {}, rows[MR * STEPS] = {};
        const Step *from[MR];
        for (int i = 0; i < MR; i++) from[i] = rows + i * STEPS;
        for (int64_t i = 0; i < rounds; i++) microkernel<Layout<T>::PAIRS>(sums, NR, from, 1, panel, STEPS, i > 0);
    }
    return 2 * threads * rounds * MR * NR * STEPS * Layout<T>::PER_STEP;
}

template <class T> int cross_entropy(const CrossEntropy &a, int threads) {
    const T *hidden = static_cast<const T *>(a.hidden), *weight = static_cast<const T *>(a.weight);
    T *d_hidden = static_cast<T *>(a.d_hidden);
    const int64_t size = a.vocabulary, width = a.width,
                  fitting = CHUNK_VALUES / std::max<int64_t>(size, 1) / ROW_BLOCK * ROW_BLOCK;
    const int64_t chunk = std::min(std::min(CHUNK_ROWS, std::max(ROW_BLOCK, fitting)), a.rows);
    Step *by_token = shared_panels.get<Step>(panel_steps<T>(size, width));
    Step *by_width =
        d_hidden ? shared_more.get<Step>(panel_steps<T>(width, size) + panel_steps<T>(width, chunk)) : nullptr;
    float *logits = call_logits.get<float>(chunk * size);
    T *gradients = d_hidden ? call_gradients.get<T>(chunk * size) : nullptr;
    if (!by_token || !logits || (d_hidden && (!by_width || !gradients))) return MOESTRO_NO_MEMORY;
    Step *rows_panels = d_hidden ? by_width + panel_steps<T>(width, size) : nullptr;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        pack_all(by_token, weight, width, true, size, width);
        if (d_hidden) pack_all(by_width, weight, width, false, width, size);
        for (int64_t first = 0; first < a.rows; first += chunk) {
            const int64_t count = std::min(chunk, a.rows - first);
            const T *rows = hidden + first * width;
            const HeadTask task = {a.targets + first, a.row_weights ? a.row_weights + first : nullptr, size,
                                   a.nll + first, a.argmax + first};
            failed |= !multiply_all<T>({rows, width, nullptr, true}, count, width, by_token, size,
                                       [&](int64_t row, int64_t column, const float *values, int64_t n) {
                                           memcpy(logits + row * size + column, values, sizeof(float) * n);
                                       });
#pragma omp for schedule(static)
            for (int64_t i = 0; i < count; i++)
                cross_entropy_row(task, i, logits + i * size, gradients ? gradients + i * size : nullptr);
            if (!d_hidden) continue;
            pack_all(rows_panels, rows, width, false, width, count);
            failed |= !multiply_all<T>({gradients, size, nullptr, true}, count, size, by_width, width,
                                       [&](int64_t row, int64_t column, const float *values, int64_t n) {
                                           store_row(d_hidden + (first + row) * width + column, values, n);
                                       });
            failed |= !multiply_all<T>({gradients, size, nullptr, false}, size, count, rows_panels, width,
                                       [&](int64_t row, int64_t column, const float *values, int64_t n) {
                                           float *to = a.d_weight + row * width + column;
                                           for (int64_t j = 0; j < n; j++) to[j] += values[j];
                                       });
        }
    }
    return failed ? MOESTRO_NO_MEMORY : MOESTRO_OK;
}

}  // namespace
