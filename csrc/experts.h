// The kernels of training for one instruction set, on the products of gemm.h. Work is cut into tasks whose results do not
// overlap; tasks are handed out freely, sums inside a task have one order.
#pragma once
#include <omp.h>

#include "gemm.h"

namespace {

constexpr int64_t ROW_BLOCK = 96;   // rows of a task: its activations stay in the second-level cache
constexpr int64_t WIDE_BLOCK = 512; // columns of a task where rows alone are too few

thread_local Scratch thread_steps, thread_pointers, thread_floats, thread_extra;
Scratch shared_panels, shared_more;  // of the calling thread's call; calls are serialised by the caller

template <class T> int64_t panel_steps(int64_t n, int64_t k) { return round_up(n, NR) * steps_of<T>(k); }

template <class T, class Out>
int matmul(Out *out, const T *a, const T *b, int64_t m, int64_t n, int64_t k, int64_t out_stride, int64_t a_stride,
           int64_t b_stride, bool a_transposed, bool b_transposed, int threads) {
    const int64_t steps = steps_of<T>(k), num_panels = (n + NR - 1) / NR;
    Step *panels = shared_panels.get<Step>(panel_steps<T>(n, k));
    if (!panels) return MOESTRO_NO_MEMORY;
    const int64_t row_blocks = (m + ROW_BLOCK - 1) / ROW_BLOCK, wide = (n + WIDE_BLOCK - 1) / WIDE_BLOCK;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t p = 0; p < num_panels; p++) {
            const T *src = b_transposed ? b + p * NR * b_stride : b + p * NR;
            pack_panel(panels + p * steps * NR, src, b_stride, nullptr, b_transposed, k, int(std::min<int64_t>(NR, n - p * NR)));
        }
#pragma omp for schedule(dynamic) reduction(| : failed)
        for (int64_t task = 0; task < row_blocks * wide; task++) {
            const int64_t row = task / wide * ROW_BLOCK, rows = std::min(ROW_BLOCK, m - row);
            const int64_t first = task % wide * WIDE_BLOCK, last = std::min(first + WIDE_BLOCK, n);
            const Step **pointers = thread_pointers.get<const Step *>(rows);
            Step *copy = thread_steps.get<Step>(round_up(rows, MR) * steps);
            if (!pointers || !copy) {
                failed = 1;
                continue;
            }
            const T *src = a_transposed ? a + row : a + row * a_stride;
            const Left left = make_left(pointers, copy, src, a_stride, nullptr, !a_transposed, rows, k);
            multiply_block<Layout<T>::PAIRS>(left, rows, panels, steps, first, last,
                [&](int64_t i, int64_t column, const float *values, int count) {
                    Out *to = out + (row + i) * out_stride + column;
                    for (int j = 0; j < count; j++) store_value(to + j, values[j]);
                });
        }
    }
    return failed ? MOESTRO_NO_MEMORY : MOESTRO_OK;
}

struct Task {
    int64_t expert, first, rows;
};

// Blocks of at most ROW_BLOCK slots, expert by expert.
inline int64_t make_tasks(Task *tasks, const int64_t *offsets, int64_t num_experts) {
    int64_t count = 0;
    for (int64_t e = 0; e < num_experts; e++)
        for (int64_t s = offsets[e]; s < offsets[e + 1]; s += ROW_BLOCK) {
            if (tasks) tasks[count] = {e, s, std::min(ROW_BLOCK, offsets[e + 1] - s)};
            count++;
        }
    return count;
}

// Pack a weight matrix of every expert that has slots: b(k, n) as in matmul.
template <class T>
void pack_experts(Step *panels, const T *weight, const int64_t *offsets, int64_t num_experts, int64_t n, int64_t k,
                  int64_t stride, bool contiguous_k) {
    const int64_t num_panels = (n + NR - 1) / NR, steps = steps_of<T>(k);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < num_experts * num_panels; task++) {
        const int64_t e = task / num_panels, p = task % num_panels;
        if (offsets[e] == offsets[e + 1]) continue;
        const T *matrix = weight + e * n * k;
        const T *src = contiguous_k ? matrix + p * NR * stride : matrix + p * NR;
        pack_panel(panels + task * steps * NR, src, stride, nullptr, contiguous_k, k, int(std::min<int64_t>(NR, n - p * NR)));
    }
}

template <class T>
int experts_forward(T *y, T *h, const T *x, const T *gate_up, const T *down, const int64_t *token, const float *weights,
                    const int64_t *offsets, int64_t num_experts, int64_t hidden, int64_t width, int threads) {
    const int64_t num_tasks = make_tasks(nullptr, offsets, num_experts);
    Task *tasks = static_cast<Task *>(malloc(sizeof(Task) * std::max<int64_t>(num_tasks, 1)));
    const int64_t up_size = panel_steps<T>(2 * width, hidden), down_size = panel_steps<T>(hidden, width);
    Step *up_panels = shared_panels.get<Step>(num_experts * up_size), *down_panels = shared_more.get<Step>(num_experts * down_size);
    if (!tasks || !up_panels || !down_panels) {
        free(tasks);
        return MOESTRO_NO_MEMORY;
    }
    make_tasks(tasks, offsets, num_experts);
    const int64_t in_steps = steps_of<T>(hidden), mid_steps = steps_of<T>(width);
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        pack_experts(up_panels, gate_up, offsets, num_experts, 2 * width, hidden, hidden, true);
        pack_experts(down_panels, down, offsets, num_experts, hidden, width, width, true);
#pragma omp for schedule(dynamic) reduction(| : failed)
        for (int64_t t = 0; t < num_tasks; t++) {
            const Task task = tasks[t];
            const Step **pointers = thread_pointers.get<const Step *>(ROW_BLOCK);
            Step *copy = thread_steps.get<Step>(ROW_BLOCK * std::max(in_steps, mid_steps));
            float *mixed = thread_floats.get<float>(ROW_BLOCK * 2 * width);
            T *act = thread_extra.get<T>(ROW_BLOCK * width);
            if (!pointers || !copy || !mixed || !act) {
                failed = 1;
                continue;
            }
            Left left = make_left(pointers, copy, x, hidden, token + task.first, true, task.rows, hidden);
            multiply_block<Layout<T>::PAIRS>(left, task.rows, up_panels + task.expert * up_size, in_steps, 0, 2 * width,
                [&](int64_t i, int64_t column, const float *values, int count) {
                    memcpy(mixed + i * 2 * width + column, values, sizeof(float) * count);
                });
            for (int64_t i = 0; i < task.rows; i++) {
                const float *gate = mixed + i * 2 * width, *up = gate + width, weight = weights[task.first + i];
                T *saved = h + (task.first + i) * 2 * width, *to = act + i * width;
                for (int64_t j = 0; j < 2 * width; j++) store_value(saved + j, gate[j]);
#pragma omp simd
                for (int64_t j = 0; j < width; j++) store_value(to + j, gate[j] * sigmoid(gate[j]) * up[j] * weight);
            }
            left = make_left(pointers, copy, act, width, nullptr, true, task.rows, width);
            multiply_block<Layout<T>::PAIRS>(left, task.rows, down_panels + task.expert * down_size, mid_steps, 0, hidden,
                [&](int64_t i, int64_t column, const float *values, int count) {
                    T *to = y + (task.first + i) * hidden + column;
                    for (int j = 0; j < count; j++) store_value(to + j, values[j]);
                });
        }
    }
    free(tasks);
    return failed ? MOESTRO_NO_MEMORY : MOESTRO_OK;
}

// One row of the backward pass between the two products: d is the gradient of the activation before its weight. Returns the
// gradient of the weight, summed in 16 lanes whatever the instruction set.
template <class T>
float swiglu_backward(T *d_gate, T *d_up, T *act, const float *d, const T *gate, const T *up, float weight,
                      int64_t width) {
    float lanes[16] = {};
    for (int64_t first = 0; first < width; first += 16) {
        float product[16] = {};
        const int count = int(std::min<int64_t>(16, width - first));
        const auto one = [&](int j) {
            const int64_t at = first + j;
            const float g = load_value(gate + at), u = load_value(up + at), s = sigmoid(g), silu = g * s;
            product[j] = d[at] * silu * u;
            store_value(act + at, silu * u * weight);
            store_value(d_up + at, d[at] * weight * silu);
            store_value(d_gate + at, d[at] * weight * u * (s + silu * (1.0f - s)));
        };
        if (count == 16) {
#pragma omp simd
            for (int j = 0; j < 16; j++) one(j);
        } else {
            for (int j = 0; j < count; j++) one(j);
        }
        for (int j = 0; j < 16; j++) lanes[j] += product[j];
    }
    float sum = 0;
    for (float lane : lanes) sum += lane;
    return sum;
}

// d_out [rows, columns] of one expert: Σ over its slots of left[slot, row] · right[slot, column].
template <class T>
bool outer_sum(T *out, const T *left, int64_t left_stride, const int64_t *left_rows, const T *right,
               int64_t right_stride, const int64_t *right_rows, int64_t slots, int64_t rows, int64_t columns) {
    const int64_t steps = steps_of<T>(slots), num_panels = (columns + NR - 1) / NR;
    Step *panels = thread_extra.get<Step>(num_panels * NR * steps);
    const Step **pointers = thread_pointers.get<const Step *>(rows);
    Step *copy = thread_steps.get<Step>(round_up(rows, MR) * steps);
    if (!panels || !pointers || !copy) return false;
    for (int64_t p = 0; p < num_panels; p++)
        pack_panel(panels + p * steps * NR, right + p * NR, right_stride, right_rows, false, slots, int(std::min<int64_t>(NR, columns - p * NR)));
    const Left a = make_left(pointers, copy, left, left_stride, left_rows, false, rows, slots);
    multiply_block<Layout<T>::PAIRS>(a, rows, panels, steps, 0, columns,
        [&](int64_t i, int64_t column, const float *values, int count) {
            T *to = out + i * columns + column;
            for (int j = 0; j < count; j++) store_value(to + j, values[j]);
        });
    return true;
}

template <class T>
int experts_backward(T *dx, float *d_weights, T *d_gate_up, T *d_down, const T *dy, const T *x, const T *h,
                     const T *gate_up, const T *down, const int64_t *token, const float *weights,
                     const int64_t *offsets, int64_t num_experts, int64_t hidden, int64_t width, int threads) {
    const int64_t num_tasks = make_tasks(nullptr, offsets, num_experts), slots = offsets[num_experts];
    Task *tasks = static_cast<Task *>(malloc(sizeof(Task) * std::max<int64_t>(num_tasks, 1)));
    T *dh = static_cast<T *>(malloc(sizeof(T) * std::max<int64_t>(slots * 2 * width, 1)));
    T *act = static_cast<T *>(malloc(sizeof(T) * std::max<int64_t>(slots * width, 1)));  // times the weight
    const int64_t up_size = panel_steps<T>(hidden, 2 * width), down_size = panel_steps<T>(width, hidden);
    Step *up_panels = shared_panels.get<Step>(num_experts * up_size), *down_panels = shared_more.get<Step>(num_experts * down_size);
    if (!tasks || !dh || !act || !up_panels || !down_panels) {
        free(tasks);
        free(dh);
        free(act);
        return MOESTRO_NO_MEMORY;
    }
    make_tasks(tasks, offsets, num_experts);
    const int64_t out_steps = steps_of<T>(hidden), mid_steps = steps_of<T>(2 * width);
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        pack_experts(down_panels, down, offsets, num_experts, width, hidden, width, false);
        pack_experts(up_panels, gate_up, offsets, num_experts, hidden, 2 * width, hidden, false);
#pragma omp for schedule(dynamic) reduction(| : failed)
        for (int64_t t = 0; t < num_tasks; t++) {
            const Task task = tasks[t];
            const Step **pointers = thread_pointers.get<const Step *>(ROW_BLOCK);
            Step *copy = thread_steps.get<Step>(ROW_BLOCK * std::max(out_steps, mid_steps));
            float *d_act = thread_floats.get<float>(ROW_BLOCK * width);
            if (!pointers || !copy || !d_act) {
                failed = 1;
                continue;
            }
            Left left = make_left(pointers, copy, dy, hidden, token + task.first, true, task.rows, hidden);
            multiply_block<Layout<T>::PAIRS>(left, task.rows, down_panels + task.expert * down_size, out_steps, 0, width,
                [&](int64_t i, int64_t column, const float *values, int count) {
                    memcpy(d_act + i * width + column, values, sizeof(float) * count);
                });
            for (int64_t i = 0; i < task.rows; i++) {
                const int64_t slot = task.first + i;
                const T *gate = h + slot * 2 * width, *up = gate + width;
                T *d_gate = dh + slot * 2 * width, *d_up = d_gate + width, *kept = act + slot * width;
                d_weights[slot] = swiglu_backward(d_gate, d_up, kept, d_act + i * width, gate, up, weights[slot], width);
            }
            left = make_left(pointers, copy, dh + task.first * 2 * width, 2 * width, nullptr, true, task.rows, 2 * width);
            multiply_block<Layout<T>::PAIRS>(left, task.rows, up_panels + task.expert * up_size, mid_steps, 0, hidden,
                [&](int64_t i, int64_t column, const float *values, int count) {
                    T *to = dx + (task.first + i) * hidden + column;
                    for (int j = 0; j < count; j++) store_value(to + j, values[j]);
                });
        }
#pragma omp for schedule(dynamic) reduction(| : failed)
        for (int64_t t = 0; t < 2 * num_experts; t++) {
            const int64_t e = t / 2, first = offsets[e], count = offsets[e + 1] - first;
            const bool ok = t % 2
                ? outer_sum(d_gate_up + e * 2 * width * hidden, dh + first * 2 * width, 2 * width, nullptr, x, hidden, token + first, count, 2 * width, hidden)
                : outer_sum(d_down + e * hidden * width, dy, hidden, token + first, act + first * width, width, nullptr, count, hidden, width);
            if (!ok) failed = 1;
        }
    }
    free(tasks);
    free(dh);
    free(act);
    return failed ? MOESTRO_NO_MEMORY : MOESTRO_OK;
}

template <class T>
void combine(T *out, const T *y, const int64_t *slot, int64_t num_tokens, int64_t top_k, int64_t num_slots, int64_t hidden,
             int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < num_tokens; n++) {
        for (int64_t first = 0; first < hidden; first += 64) {
            const int count = int(std::min<int64_t>(64, hidden - first));
            float sum[64] = {};
            for (int64_t a = 0; a < top_k; a++) {
                const int64_t s = slot[n * top_k + a];
                if (s < 0 || s >= num_slots) continue;
                const T *row = y + s * hidden + first;
                for (int j = 0; j < count; j++) sum[j] += load_value(row + j);
            }
            for (int j = 0; j < count; j++) store_value(out + n * hidden + first + j, sum[j]);
        }
    }
}

}  // namespace
