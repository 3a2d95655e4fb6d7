// Functions of single rows: RMSNorm, SwiGLU, router scores, rotation. Rows are taken in pieces of 16 values, the last
// one padded, so that every value of a row is computed by the same instructions.
#pragma once
#include "math/gemm.h"

namespace {

constexpr int LANES = 16;
constexpr int64_t SHARED_VALUES = 1 << 16;  // a call with this many is worth a second thread

template <class T> inline void load_lanes(float *to, const T *from, int64_t count) {
    if (count >= LANES) {
        for (int j = 0; j < LANES; j++) to[j] = load_value(from + j);
        return;
    }
    for (int j = 0; j < LANES; j++) to[j] = 0;
    for (int64_t j = 0; j < count; j++) to[j] = load_value(from + j);
}

template <class T> inline void store_lanes(T *to, const float *from, int64_t count) {
    if (count >= LANES) {
        for (int j = 0; j < LANES; j++) store_value(to + j, from[j]);
        return;
    }
    for (int64_t j = 0; j < count; j++) store_value(to + j, from[j]);
}

inline float sum_lanes(float *v) {
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int j = 0; j < half; j++) v[j] += v[j + half];
    return v[0];
}

template <class F> void for_rows(int64_t rows, int64_t width, int threads, F f) {
    if (rows * width < SHARED_VALUES || rows == 1) {
        for (int64_t i = 0; i < rows; i++) f(i);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++) f(i);
}

template <class T, class W>
void rms_norm(T *out, const T *x, const W *weight, int64_t rows, int64_t width, float eps, int threads) {
    for_rows(rows, width, threads, [&](int64_t i) {
        const T *from = x + i * width;
        float squares[LANES] = {}, v[LANES], w[LANES];
        for (int64_t j = 0; j < width; j += LANES) {
            load_lanes(v, from + j, width - j);
            for (int l = 0; l < LANES; l++) squares[l] = std::fma(v[l], v[l], squares[l]);
        }
        const float scale = 1.0f / std::sqrt(sum_lanes(squares) / float(width) + eps);
        for (int64_t j = 0; j < width; j += LANES) {
            load_lanes(v, from + j, width - j);
            load_lanes(w, weight + j, width - j);
            for (int l = 0; l < LANES; l++) v[l] = v[l] * scale * w[l];
            store_lanes(out + i * width + j, v, width - j);
        }
    });
}

template <class T> void swiglu(T *out, const T *gate_up, int64_t rows, int64_t width, int threads) {
    for_rows(rows, width, threads, [&](int64_t i) {
        const T *gate = gate_up + i * 2 * width;
        float g[LANES], u[LANES];
        for (int64_t j = 0; j < width; j += LANES) {
            load_lanes(g, gate + j, width - j);
            load_lanes(u, gate + width + j, width - j);
#pragma omp simd
            for (int l = 0; l < LANES; l++) g[l] = g[l] * sigmoid(g[l]) * u[l];
            store_lanes(out + i * width + j, g, width - j);
        }
    });
}

inline void softmax_row(float *out, const float *logits, int64_t width) {
    float largest = -INFINITY, sums[LANES] = {}, v[LANES];
    for (int64_t j = 0; j < width; j++) largest = std::max(largest, logits[j]);
    for (int64_t j = 0; j < width; j += LANES) {
        load_lanes(v, logits + j, width - j);
#pragma omp simd
        for (int l = 0; l < LANES; l++) v[l] = j + l < width ? fast_exp(v[l] - largest) : 0.0f;
        for (int l = 0; l < LANES; l++) sums[l] += v[l];
        store_lanes(out + j, v, width - j);
    }
    const float sum = sum_lanes(sums);
    for (int64_t j = 0; j < width; j++) out[j] /= sum;
}

// Scores of a router's logits [width]: the sigmoid, the softmax, √softplus, or ones.
inline void score_row(float *to, const float *from, int64_t width, int function) {
    if (function == MOESTRO_CONSTANT) return std::fill(to, to + width, 1.0f);
    if (function == MOESTRO_SOFTMAX) return softmax_row(to, from, width);
    float v[LANES];
    for (int64_t j = 0; function == MOESTRO_SIGMOID && j < width; j += LANES) {
        load_lanes(v, from + j, width - j);
#pragma omp simd
        for (int l = 0; l < LANES; l++) v[l] = sigmoid(v[l]);
        store_lanes(to + j, v, width - j);
    }
    for (int64_t j = 0; function == MOESTRO_SQRT_SOFTPLUS && j < width; j++) {
        const float plus = std::max(from[j], 0.0f) + std::log1p(std::exp(-std::fabs(from[j])));
        to[j] = std::sqrt(std::max(plus, 1.17549435e-38f));
    }
}

// Pairs (x0, x1), (x2, x3), … of one vector, LANES values at a time; every pair is rounded in the same way.
template <class T, class From>
void rotate_vector(T *out, const From *x, const float *cos, const float *sin, int64_t width, float sign) {
    constexpr int HALF = LANES / 2;
    for (int64_t j = 0; j < width; j += LANES) {
        float v[LANES], c[LANES], s[LANES];
        load_lanes(v, x + j, width - j);
        load_lanes(c, cos + j / 2, std::min<int64_t>(HALF, (width - j) / 2));
        load_lanes(s, sin + j / 2, std::min<int64_t>(HALF, (width - j) / 2));
        for (int l = 0; l < HALF; l++) {
            const float even = v[2 * l], odd = v[2 * l + 1], turn = sign * s[l];
            v[2 * l] = std::fma(even, c[l], -(odd * turn));
            v[2 * l + 1] = std::fma(odd, c[l], even * turn);
        }
        store_lanes(out + j, v, width - j);
    }
}

}  // namespace
