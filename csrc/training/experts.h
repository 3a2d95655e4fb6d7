// The kernels of training for one instruction set, on the products of gemm.h. Work is cut into tasks whose results do
// not overlap; any thread may take any task, and sums inside a task have one order.
#pragma once
#include <omp.h>

#include "math/gemm.h"
#include "abi/table.h"

namespace {

thread_local Scratch thread_floats, thread_extra;
Scratch shared_panels, shared_more;  // of the calling thread's call; calls are serialised by the caller

template <class T> int64_t panel_steps(int64_t n, int64_t k) { return round_up(n, NR) * steps_of<T>(k); }

// All panels of b(k, n), shared by the threads of a call.
template <class T> void pack_all(Step *panels, const T *b, int64_t stride, bool contiguous_k, int64_t n, int64_t k) {
#pragma omp for schedule(static)
    for (int64_t p = 0; p < (n + NR - 1) / NR; p++)
        pack_panel(panels + p * NR * steps_of<T>(k), contiguous_k ? b + p * NR * stride : b + p * NR, stride, nullptr,
                   contiguous_k, k, int(std::min<int64_t>(NR, n - p * NR)));
}

// Products of a call, one task for each block of rows and columns: store(row, column, values, count).
template <class T, class Store>
bool multiply_all(const Operand<T> &a, int64_t m, int64_t k, const Step *panels, int64_t n, Store store) {
    bool ok = true;
    const int64_t across = (n + COLUMN_BLOCK - 1) / COLUMN_BLOCK;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < (m + ROW_BLOCK - 1) / ROW_BLOCK * across; task++) {
        const int64_t row = task / across * ROW_BLOCK, first = task % across * COLUMN_BLOCK;
        const Operand<T> some = {a.contiguous_k ? a.data + row * a.stride : a.data + row, a.stride, nullptr,
                                 a.contiguous_k};
        ok &= multiply_rows(some, std::min(ROW_BLOCK, m - row), k, panels, first, std::min(first + COLUMN_BLOCK, n),
                            [&](int64_t i, int64_t column, const float *values, int64_t count) {
                                store(row + i, column, values, count);
                            });
    }
    return ok;
}

template <class T, class Out> int matmul(Out *out, const T *a, const T *b, const MatmulSizes &s, int threads) {
    Step *panels = shared_panels.get<Step>(panel_steps<T>(s.n, s.k));
    if (!panels) return MOESTRO_NO_MEMORY;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        pack_all(panels, b, s.b_stride, s.b_transposed, s.n, s.k);
        failed |= !multiply_all<T>({a, s.a_stride, nullptr, !s.a_transposed}, s.m, s.k, panels, s.n,
                                   [&](int64_t row, int64_t column, const float *values, int64_t count) {
                                       store_row(out + row * s.out_stride + column, values, count);
                                   });
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

// Packs a weight matrix of every expert that has slots: b(k, n) as in matmul.
template <class T> void pack_experts(Step *panels, const void *const *weights, const int64_t *offsets,
                                     int64_t num_experts, int64_t n, int64_t k, int64_t stride, bool contiguous_k) {
    const int64_t num_panels = (n + NR - 1) / NR, steps = steps_of<T>(k);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < num_experts * num_panels; task++) {
        const int64_t e = task / num_panels, p = task % num_panels;
        if (offsets[e] == offsets[e + 1]) continue;
        const T *matrix = static_cast<const T *>(weights[e]);
        const T *src = contiguous_k ? matrix + p * NR * stride : matrix + p * NR;
        pack_panel(panels + task * steps * NR, src, stride, nullptr, contiguous_k, k,
                   int(std::min<int64_t>(NR, n - p * NR)));
    }
}

template <class T> int experts_forward(const ExpertsForward &a, int threads) {
    T *y = static_cast<T *>(a.y), *h = static_cast<T *>(a.h);
    const T *x = static_cast<const T *>(a.x);
    const int64_t *token = a.token, *offsets = a.offsets, num_experts = a.num_experts, hidden = a.hidden,
                  width = a.width;
    const float *weights = a.weights;
    const int64_t num_tasks = make_tasks(nullptr, offsets, num_experts);
    Task *tasks = static_cast<Task *>(malloc(sizeof(Task) * std::max<int64_t>(num_tasks, 1)));
    const int64_t up_size = panel_steps<T>(2 * width, hidden), down_size = panel_steps<T>(hidden, width);
    Step *up_panels = shared_panels.get<Step>(num_experts * up_size),
         *down_panels = shared_more.get<Step>(num_experts * down_size);
    if (!tasks || !up_panels || !down_panels) {
        free(tasks);
        return MOESTRO_NO_MEMORY;
    }
    make_tasks(tasks, offsets, num_experts);
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        pack_experts<T>(up_panels, a.gate_up, offsets, num_experts, 2 * width, hidden, hidden, true);
        pack_experts<T>(down_panels, a.down, offsets, num_experts, hidden, width, width, true);
#pragma omp for schedule(dynamic) reduction(| : failed)
        for (int64_t t = 0; t < num_tasks; t++) {
            const Task task = tasks[t];
            float *mixed = thread_floats.get<float>(ROW_BLOCK * 2 * width);
            T *act = thread_extra.get<T>(ROW_BLOCK * width);
            if (!mixed || !act) {
                failed = 1;
                continue;
            }
            const Operand<T> in = {x, hidden, token + task.first, true}, middle = {act, width, nullptr, true};
            failed |= !multiply_rows(in, task.rows, hidden, up_panels + task.expert * up_size, 0, 2 * width,
                                     [&](int64_t i, int64_t column, const float *values, int64_t count) {
                                         memcpy(mixed + i * 2 * width + column, values, sizeof(float) * count);
                                     });
            for (int64_t i = 0; i < task.rows; i++) {
                const float *gate = mixed + i * 2 * width, *up = gate + width, weight = weights[task.first + i];
                store_row(h + (task.first + i) * 2 * width, gate, 2 * width);
#pragma omp simd
                for (int64_t j = 0; j < width; j++)
                    store_value(act + i * width + j, gate[j] * sigmoid(gate[j]) * up[j] * weight);
            }
            failed |= !multiply_rows(middle, task.rows, width, down_panels + task.expert * down_size, 0, hidden,
                                     [&](int64_t i, int64_t column, const float *values, int64_t count) {
                                         store_row(y + (task.first + i) * hidden + column, values, count);
                                     });
        }
    }
    free(tasks);
    return failed ? MOESTRO_NO_MEMORY : MOESTRO_OK;
}

// One row of the backward pass between the two products; d is the gradient of the activation before its weight. Returns
// the gradient of the weight, summed in 16 lanes on every instruction set.
template <class T> float swiglu_backward(T *d_gate, T *d_up, T *act, const float *d, const T *gate, const T *up,
                                         float weight, int64_t width) {
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

// out [rows, columns] of one expert: Σ over its slots of left[slot, row] · right[slot, column]; left and right have
// their rows' indices, or lie slot by slot.
template <class T>
bool outer_sum(T *out, const Operand<T> &left, const Operand<T> &right, int64_t slots, int64_t rows, int64_t columns) {
    const int64_t steps = steps_of<T>(slots);
    Step *panels = thread_extra.get<Step>(round_up(columns, NR) * steps);
    if (!panels) return false;
    for (int64_t c = 0; c < columns; c += NR)
        pack_panel(panels + c * steps, right.data + c, right.stride, right.rows, false, slots,
                   int(std::min<int64_t>(NR, columns - c)));
    bool ok = true;
    for (int64_t row = 0; row < rows; row += ROW_BLOCK) {
        const Operand<T> some = {left.data + row, left.stride, left.rows, false};
        ok &= multiply_rows(some, std::min(ROW_BLOCK, rows - row), slots, panels, 0, columns,
                            [&](int64_t i, int64_t column, const float *values, int64_t count) {
                                store_row(out + (row + i) * columns + column, values, count);
                            });
    }
    return ok;
}

template <class T> int experts_backward(const ExpertsBackward &a, int threads) {
    T *dx = static_cast<T *>(a.dx);
    const T *dy = static_cast<const T *>(a.dy), *x = static_cast<const T *>(a.x), *h = static_cast<const T *>(a.h);
    const int64_t *token = a.token, *offsets = a.offsets, num_experts = a.num_experts, hidden = a.hidden,
                  width = a.width;
    const float *weights = a.weights;
    const int64_t num_tasks = make_tasks(nullptr, offsets, num_experts), slots = offsets[num_experts];
    Task *tasks = static_cast<Task *>(malloc(sizeof(Task) * std::max<int64_t>(num_tasks, 1)));
    T *dh = static_cast<T *>(malloc(sizeof(T) * std::max<int64_t>(slots * 2 * width, 1)));
    T *act = static_cast<T *>(malloc(sizeof(T) * std::max<int64_t>(slots * width, 1)));  // times the weight
    const int64_t up_size = panel_steps<T>(hidden, 2 * width), down_size = panel_steps<T>(width, hidden);
    Step *up_panels = shared_panels.get<Step>(num_experts * up_size),
         *down_panels = shared_more.get<Step>(num_experts * down_size);
    if (!tasks || !dh || !act || !up_panels || !down_panels) {
        free(tasks);
        free(dh);
        free(act);
        return MOESTRO_NO_MEMORY;
    }
    make_tasks(tasks, offsets, num_experts);
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        pack_experts<T>(down_panels, a.down, offsets, num_experts, width, hidden, width, false);
        pack_experts<T>(up_panels, a.gate_up, offsets, num_experts, hidden, 2 * width, hidden, false);
#pragma omp for schedule(dynamic) reduction(| : failed)
        for (int64_t t = 0; t < num_tasks; t++) {
            const Task task = tasks[t];
            float *d_act = thread_floats.get<float>(ROW_BLOCK * width);
            if (!d_act) {
                failed = 1;
                continue;
            }
            T *d_h = dh + task.first * 2 * width;
            const Operand<T> in = {dy, hidden, token + task.first, true}, middle = {d_h, 2 * width, nullptr, true};
            failed |= !multiply_rows(in, task.rows, hidden, down_panels + task.expert * down_size, 0, width,
                                     [&](int64_t i, int64_t column, const float *values, int64_t count) {
                                         memcpy(d_act + i * width + column, values, sizeof(float) * count);
                                     });
            for (int64_t i = 0; i < task.rows; i++) {
                const int64_t slot = task.first + i;
                const T *gate = h + slot * 2 * width, *up = gate + width;
                T *d_gate = d_h + i * 2 * width, *d_up = d_gate + width, *kept = act + slot * width;
                a.d_weights[slot] =
                    swiglu_backward(d_gate, d_up, kept, d_act + i * width, gate, up, weights[slot], width);
            }
            failed |= !multiply_rows(middle, task.rows, 2 * width, up_panels + task.expert * up_size, 0, hidden,
                                     [&](int64_t i, int64_t column, const float *values, int64_t count) {
                                         store_row(dx + (task.first + i) * hidden + column, values, count);
                                     });
        }
#pragma omp for schedule(dynamic) reduction(| : failed)
        for (int64_t t = 0; t < 2 * num_experts; t++) {
            const int64_t e = t / 2, first = offsets[e], count = offsets[e + 1] - first;
            const Operand<T> tokens = {x, hidden, token + first, false}, out = {dy, hidden, token + first, false};
            const Operand<T> up = {dh + first * 2 * width, 2 * width, nullptr, false},
                             middle = {act + first * width, width, nullptr, false};
            failed |= t % 2 ? !outer_sum(static_cast<T *>(a.d_gate_up[e]), up, tokens, count, 2 * width, hidden)
                            : !outer_sum(static_cast<T *>(a.d_down[e]), out, middle, count, hidden, width);
        }
    }
    free(tasks);
    free(dh);
    free(act);
    return failed ? MOESTRO_NO_MEMORY : MOESTRO_OK;
}

template <class T> void combine(T *out, const T *y, const int64_t *slot, int64_t num_tokens, int64_t top_k,
                                int64_t num_slots, int64_t hidden, int threads) {
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
