// Matrix products of one thread, for one instruction set; included by each kernels_*.cpp after it has defined `Isa`.
//
// Everything is in units of one 32-bit step of k: a float, or a pair of bf16 (k, k+1). The left operand is read where it
// lies (a broadcast needs no packing) through one pointer a row; the right one is packed into panels of NR columns:
// panel[k][NR]. The microkernel computes MR × NR sums over all of k in registers, in the order of k: a row's result does
// not depend on which other rows are computed with it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <immintrin.h>

#include "moestro.h"

namespace {

using Step = uint32_t;  // a float, or two bf16
constexpr int MR = 6;
constexpr int NR = Isa::WIDTH * Isa::VECTORS;
constexpr int64_t K_BLOCK = 512;  // steps of k that stay in the cache at a time

inline float to_float(uint16_t b) {
    uint32_t u = uint32_t(b) << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

inline uint16_t to_bf16(float f) {  // round to nearest even; NaN stays NaN
    uint32_t u;
    memcpy(&u, &f, 4);
    if ((u & 0x7fffffff) > 0x7f800000) return uint16_t((u >> 16) | 0x40);
    return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

inline float load_value(const float *p) { return *p; }
inline float load_value(const uint16_t *p) { return to_float(*p); }
inline void store_value(float *p, float v) { *p = v; }
inline void store_value(uint16_t *p, float v) { *p = to_bf16(v); }

template <class T> struct Layout;  // how elements of T become steps
template <> struct Layout<float> {
    static constexpr int PER_STEP = 1;
    static constexpr bool PAIRS = false;
};
template <> struct Layout<uint16_t> {
    static constexpr int PER_STEP = Isa::HAS_BF16 ? 2 : 1;  // without bf16 products, elements are widened to floats
    static constexpr bool PAIRS = Isa::HAS_BF16;
};

template <class T> inline int64_t steps_of(int64_t k) { return (k + Layout<T>::PER_STEP - 1) / Layout<T>::PER_STEP; }
inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Memory of one call, aligned to cache lines; grows, is kept by its thread.
struct Scratch {
    char *data = nullptr;
    size_t size = 0;
    ~Scratch() { free(data); }
    template <class T> T *get(int64_t count) {
        size_t bytes = round_up(std::max<int64_t>(count, 1) * int64_t(sizeof(T)), 64);
        if (bytes > size) {
            free(data);
            data = static_cast<char *>(aligned_alloc(64, bytes));
            size = data ? bytes : 0;
        }
        return reinterpret_cast<T *>(data);
    }
};

// One element step (k of b) as it goes into a panel: from elements p (at k) and q (at k + 1), which may be absent.
inline Step make_step(const float *p, const float *) {
    Step s;
    memcpy(&s, p, 4);
    return s;
}
inline Step make_step(const uint16_t *p, const uint16_t *q) {
    if (Isa::HAS_BF16) return Step(*p) | (q ? Step(*q) << 16 : 0);
    return Step(*p) << 16;  // the float with these upper bits
}

// Pack columns of k contiguous elements each into panel[steps][width]; missing columns and the odd last element are zero.
// width is a multiple of 8.
template <class T> void pack_columns(Step *panel, int width, const T *const *columns, int count, int64_t k) {
    constexpr int PER = Layout<T>::PER_STEP;
    const int64_t steps = steps_of<T>(k), whole = k / PER;
    for (int first = 0; first < width; first += 8) {
        int64_t s = 0;
        if (first + 8 <= count && (PER == 2 || sizeof(T) == 4)) {
            for (; s + 8 <= whole; s += 8) {
                const void *from[8];
                for (int n = 0; n < 8; n++) from[n] = columns[first + n] + s * PER;
                Isa::transpose8(panel + s * width + first, width, from);
            }
        }
        for (; s < steps; s++)
            for (int n = first; n < first + 8; n++) {
                const T *p = n < count ? columns[n] + s * PER : nullptr;
                panel[s * width + n] = p ? make_step(p, s < whole ? p + 1 : nullptr) : 0;
            }
    }
}

// Pack b(k, n), n in [0, columns), into panel[steps][NR]; missing columns and the odd last element are zero.
// contiguous_k: element (k, n) is src[n * stride + k]; else row(k)[n], row(k) = src + (rows ? rows[k] : k) * stride.
template <class T>
void pack_panel(Step *panel, const T *src, int64_t stride, const int64_t *rows, bool contiguous_k, int64_t k,
                int columns) {
    constexpr int PER = Layout<T>::PER_STEP;
    const int64_t steps = steps_of<T>(k);
    if (contiguous_k) {
        const T *starts[NR];
        for (int n = 0; n < columns; n++) starts[n] = src + n * stride;
        return pack_columns(panel, NR, starts, columns, k);
    }
    for (int64_t s = 0; s < steps; s++) {
        const T *p = src + (rows ? rows[s * PER] : s * PER) * stride;
        const T *q = PER == 2 && s * 2 + 1 < k ? src + (rows ? rows[s * 2 + 1] : s * 2 + 1) * stride : nullptr;
        Step *out = panel + s * NR;
        if (q)
            for (int n = 0; n < columns; n++) out[n] = make_step(p + n, q + n);
        else
            for (int n = 0; n < columns; n++) out[n] = make_step(p + n, static_cast<const T *>(nullptr));
        for (int n = columns; n < NR; n++) out[n] = 0;
    }
}

// acc (+)= rows of a · panel. a_rows: MR pointers; step k of row i is a_rows[i][k * a_step]. c is [MR][NR].
template <bool PAIRS>
inline void microkernel(float *c, const Step *const *a_rows, int64_t a_step, const Step *panel, int64_t steps,
                        bool accumulate) {
    using V = typename Isa::Vector;
    V acc[MR][Isa::VECTORS];
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < Isa::VECTORS; j++)
            acc[i][j] = accumulate ? Isa::load(c + i * NR + j * Isa::WIDTH) : Isa::zero();
    const Step *r0 = a_rows[0], *r1 = a_rows[1], *r2 = a_rows[2], *r3 = a_rows[3], *r4 = a_rows[4], *r5 = a_rows[5];
    for (int64_t k = 0; k < steps; k++) {
        V b[Isa::VECTORS];
        for (int j = 0; j < Isa::VECTORS; j++) b[j] = Isa::load_steps(panel + k * NR + j * Isa::WIDTH);
        const int64_t at = k * a_step;
#define ROW(i, r)                                                                                                      \
    {                                                                                                                  \
        const V a = Isa::broadcast(r + at);                                                                            \
        for (int j = 0; j < Isa::VECTORS; j++) acc[i][j] = Isa::template multiply_add<PAIRS>(acc[i][j], a, b[j]);       \
    }
        ROW(0, r0) ROW(1, r1) ROW(2, r2) ROW(3, r3) ROW(4, r4) ROW(5, r5)
#undef ROW
    }
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < Isa::VECTORS; j++) Isa::store(c + i * NR + j * Isa::WIDTH, acc[i][j]);
}

// The left operand of one block of rows, as steps.
struct Left {
    const Step *const *rows;  // a pointer for each row, at k = 0
    int64_t step;             // distance of two steps of k
};

// One block of rows times packed panels: use(row, column, values, count) receives finished pieces of rows.
// panels: ceil(n / NR) panels of `steps` steps each, of which those of [first_column, last_column) are used.
template <bool PAIRS, class Use>
void multiply_block(const Left &left, int64_t m, const Step *panels, int64_t steps, int64_t first_column,
                    int64_t last_column, Use use) {
    alignas(64) float c[MR * NR];
    for (int64_t column = first_column; column < last_column; column += NR) {
        const Step *panel = panels + column / NR * steps * NR;
        const int count = int(std::min<int64_t>(NR, last_column - column));
        for (int64_t row = 0; row < m; row += MR) {
            const Step *pointers[MR];
            for (int i = 0; i < MR; i++) pointers[i] = left.rows[std::min(row + i, m - 1)];
            for (int64_t k = 0; k < steps; k += K_BLOCK) {
                const Step *shifted[MR];
                for (int i = 0; i < MR; i++) shifted[i] = pointers[i] + k * left.step;
                microkernel<PAIRS>(c, shifted, left.step, panel + k * NR, std::min(K_BLOCK, steps - k), k > 0);
            }
            if (steps == 0) std::fill(c, c + MR * NR, 0.0f);
            const int live = int(std::min<int64_t>(MR, m - row));
            for (int i = 0; i < live; i++) use(row + i, column, c + i * NR, count);
        }
    }
}

// Steps of a block of rows of a. Along a contiguous k they are used in place; where elements are not steps (bf16 without
// bf16 products, an odd k), and along a strided k, they are copied to `copy`: [m][steps], or [m / MR][steps][MR].
// `copy` holds round_up(m, MR) · steps.
template <class T>
Left make_left(const Step **pointers, Step *copy, const T *src, int64_t stride, const int64_t *rows, bool contiguous_k,
               int64_t m, int64_t k) {
    constexpr int PER = Layout<T>::PER_STEP;
    const int64_t steps = steps_of<T>(k);
    if (contiguous_k) {
        const bool in_place = sizeof(T) * PER == 4 && k % PER == 0;
        for (int64_t i = 0; i < m; i++) {
            const T *row = src + (rows ? rows[i] : i) * stride;
            if (in_place) {
                pointers[i] = reinterpret_cast<const Step *>(row);
                continue;
            }
            Step *to = copy + i * steps;
            for (int64_t s = 0; s < steps; s++) to[s] = make_step(row + s * PER, s * PER + 1 < k ? row + s * PER + 1 : nullptr);
            pointers[i] = to;
        }
        return {pointers, 1};
    }
    for (int64_t s = 0; s < steps; s++) {
        const T *p = src + (rows ? rows[s * PER] : s * PER) * stride;
        const T *q = PER == 2 && s * 2 + 1 < k ? src + (rows ? rows[s * 2 + 1] : s * 2 + 1) * stride : nullptr;
        for (int64_t first = 0; first < m; first += MR) {
            Step *to = copy + (first * steps + s * MR);
            const int live = int(std::min<int64_t>(MR, m - first));
            for (int i = 0; i < live; i++) to[i] = make_step(p + first + i, q ? q + first + i : nullptr);
        }
    }
    for (int64_t i = 0; i < m; i++) pointers[i] = copy + i / MR * MR * steps + i % MR;
    return {pointers, MR};
}

// exp(x) within 2 units in the last place for x in [-87, 88]; below, 0; the same polynomial on every instruction set.
inline float fast_exp(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    const float n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;  // to the nearest integer
    const float r = std::fma(n, -0.693145751953125f, x) - n * 1.42860682030941723212e-6f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = (int32_t(n) + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return p * scale;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

}  // namespace
