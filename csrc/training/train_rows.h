// The small operations of a training step: gradients of RMSNorm and SwiGLU, heads with a rotated part. Any thread may
// take any row. Sums over rows run in blocks that depend only on the number of rows, then over the blocks in order.
#pragma once
#include "math/rows.h"
#include "abi/table.h"
#include "math/tile.h"

namespace {

constexpr int64_t SUM_BLOCKS = 64, SUM_ROWS = 16;  // at most so many blocks, of at least so many rows

Scratch call_sums;

// f(j, count) for the pieces of a row: count is the constant LANES, or the rest in the last piece.
template <class F> inline MOESTRO_INLINE void for_lanes(int64_t width, F &&f) {
    int64_t j = 0;
    for (; j + LANES <= width; j += LANES) f(j, std::integral_constant<int, LANES>());
    if (j < width) f(j, int(width - j));
}

// Gradient of one row: with g = dy · weight and r = 1 / rms, dx = r · (g − x · r² · mean(g · x)); d_weight += dy · x ·
// r.
template <class T, class W>
void rms_norm_backward_row(T *dx, float *d_weight, const T *dy, const T *x, const W *weight, int64_t width, float eps) {
    float squares[LANES] = {}, dots[LANES] = {};
    for_lanes(width, [&](int64_t j, auto count) MOESTRO_INLINE {
        for (int l = 0; l < count; l++) {
            const float v = load_value(x + j + l);
            squares[l] = std::fma(v, v, squares[l]);
            dots[l] = std::fma(load_value(dy + j + l) * load_value(weight + j + l), v, dots[l]);
        }
    });
    const float r = 1.0f / std::sqrt(sum_lanes(squares) / float(width) + eps);
    const float along = sum_lanes(dots) / float(width) * r * r;
    for_lanes(width, [&](int64_t j, auto count) MOESTRO_INLINE {
#pragma omp simd
        for (int l = 0; l < count; l++) {
            const float v = load_value(x + j + l), d = load_value(dy + j + l);
            d_weight[j + l] = std::fma(d, v * r, d_weight[j + l]);
            store_value(dx + j + l, r * (d * load_value(weight + j + l) - v * along));
        }
    });
}

template <class T, class W> int rms_norm_backward(const NormBackward &p, int threads) {
    const int64_t block = std::max(SUM_ROWS, (p.rows + SUM_BLOCKS - 1) / SUM_BLOCKS),
                  blocks = (p.rows + block - 1) / block;
    float *sums = call_sums.get<float>(blocks * p.width);
    if (!sums) return MOESTRO_NO_MEMORY;
#pragma omp parallel num_threads(p.rows *p.width < SHARED_VALUES ? 1 : threads)
    {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; b++) {
            std::fill_n(sums + b * p.width, p.width, 0.0f);
            for (int64_t i = b * block; i < std::min(p.rows, (b + 1) * block); i++)
                rms_norm_backward_row(static_cast<T *>(p.dx) + i * p.width, sums + b * p.width,
                                      static_cast<const T *>(p.dy) + i * p.width,
                                      static_cast<const T *>(p.x) + i * p.width, static_cast<const W *>(p.weight),
                                      p.width, p.eps);
        }
#pragma omp for schedule(static)
        for (int64_t piece = 0; piece < (p.width + LANES - 1) / LANES; piece++)
            for (int64_t j = piece * LANES; j < std::min(p.width, (piece + 1) * LANES); j++) {
                float sum = 0;
                for (int64_t b = 0; b < blocks; b++) sum += sums[b * p.width + j];
                store_value(static_cast<W *>(p.d_weight) + j, sum);
            }
    }
    return MOESTRO_OK;
}

template <class T>
void swiglu_gradient(T *d_gate_up, const T *dy, const T *gate_up, int64_t rows, int64_t width, int threads) {
    for_rows(rows, width, threads, [&](int64_t i) {
        const T *gate = gate_up + i * 2 * width, *d = dy + i * width;
        T *to = d_gate_up + i * 2 * width;
        for_lanes(width, [&](int64_t j, auto count) MOESTRO_INLINE {
#pragma omp simd
            for (int l = 0; l < count; l++) {
                const float g = load_value(gate + j + l), u = load_value(gate + width + j + l),
                            v = load_value(d + j + l);
                const float s = sigmoid(g), silu = g * s;
                store_value(to + j + l, v * u * (s + silu * (1.0f - s)));
                store_value(to + width + j + l, v * silu);
            }
        });
    });
}

template <class T> void join_heads(const JoinHeads &p, int threads) {
    const int64_t width = p.plain_width + p.rotary_width;
    for_rows(p.rows, p.heads * width, threads, [&](int64_t i) {
        const float *cos = p.cos + i * (p.rotary_width / 2), *sin = p.sin + i * (p.rotary_width / 2);
        for (int64_t h = 0; h < p.heads; h++) {
            T *to = static_cast<T *>(p.out) + (i * p.heads + h) * width;
            const T *plain = static_cast<const T *>(p.plain) + i * p.plain_row + h * p.plain_head;
            std::copy_n(plain, p.plain_width, to);
            rotate_vector(to + p.plain_width, static_cast<const T *>(p.rotary) + i * p.rotary_row + h * p.rotary_head,
                          cos, sin, p.rotary_width, 1.0f);
        }
    });
}

// If all heads share the rotated part, their gradients are added in the order of the heads, then rotated back.
template <class T> void split_heads(const SplitHeads &p, int threads) {
    constexpr int64_t PIECE = 64;
    const int64_t width = p.plain_width + p.rotary_width, sums = p.shared ? 1 : p.heads,
                  summed = p.shared ? p.heads : 1;
    for_rows(p.rows, p.heads * width, threads, [&](int64_t i) {
        const T *from = static_cast<const T *>(p.d_out) + i * p.heads * width;
        T *d_plain = static_cast<T *>(p.d_plain) + i * p.heads * p.plain_width,
          *d_rotary = static_cast<T *>(p.d_rotary) + i * sums * p.rotary_width;
        for (int64_t h = 0; h < p.heads; h++) std::copy_n(from + h * width, p.plain_width, d_plain + h * p.plain_width);
        for (int64_t h = 0; h < sums; h++)
            for (int64_t first = 0; first < p.rotary_width; first += PIECE) {
                const int64_t count = std::min(PIECE, p.rotary_width - first),
                              angle = i * (p.rotary_width / 2) + first / 2;
                float sum[PIECE] = {};
                for (int64_t g = h; g < h + summed; g++)
                    for (int64_t j = 0; j < count; j++)
                        sum[j] += load_value(from + g * width + p.plain_width + first + j);
                rotate_vector(d_rotary + h * p.rotary_width + first, sum, p.cos + angle, p.sin + angle, count, -1.0f);
            }
    });
}

}  // namespace
