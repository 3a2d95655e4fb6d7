// Matrix products of one thread, for one instruction set; included by each kernels_*.cpp after it has defined `Isa`.
//
// Everything is in units of one 32-bit step of k: a float, or a pair of bf16 (k, k+1). The left operand is read in
// place (a broadcast needs no packing) through one pointer per row; the right one is packed into panels of NR columns:
// panel[k][NR]. The microkernel adds up MR × NR sums in registers, one piece of k after another, in the order of k, so
// a row's result does not depend on which other rows are computed with it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "abi/moestro.h"

namespace {

#define MOESTRO_INLINE __attribute__((always_inline))

template <class F, int... I> inline MOESTRO_INLINE void unroll_each(F &&f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>()), ...);
}
template <int N, class F> inline MOESTRO_INLINE void unroll(F &&f) {
    unroll_each(f, std::make_integer_sequence<int, N>());
}

using Step = uint32_t;  // a float, or two bf16
constexpr int MR = 6;
constexpr int NR = Isa::WIDTH * Isa::VECTORS;
// A task is ROW_BLOCK rows by COLUMN_BLOCK columns. Its sums and K_BLOCK steps of its left operand stay in the
// second-level cache, and K_PIECE steps of a panel of 16 columns in the first.
constexpr int64_t ROW_BLOCK = 96, COLUMN_BLOCK = 512, K_BLOCK = 512, K_PIECE = NR == 16 ? 256 : 512;

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

// Memory of one call, aligned to cache lines; it grows, and its thread keeps it.
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

// Eight neighbours at once: elements p[0 … 7] at k, q[0 … 7] at k + 1.
inline Eight make_steps8(const float *p, const float *) { return load8(p); }
inline Eight make_steps8(const uint16_t *p, const uint16_t *q) { return Isa::HAS_BF16 ? pair8(p, q) : widen8(p); }

// The steps of k consecutive elements.
template <class T> inline void copy_steps(Step *to, const T *row, int64_t k) {
    constexpr int PER = Layout<T>::PER_STEP;
    const int64_t whole = k / PER;
    int64_t s = 0;
    if (sizeof(T) * PER == 4) {
        memcpy(to, row, whole * 4);
        s = whole;
    }
    for (; s + 8 <= whole; s += 8) store8(to + s, make_steps8(row + s, row + s));
    for (; s < whole; s++) to[s] = make_step(row + s, static_cast<const T *>(nullptr));
    if (k % PER) to[whole] = make_step(row + k - 1, static_cast<const T *>(nullptr));
}

// Pack columns of k contiguous elements each into panel[steps][width]; missing columns and the odd last element are
// zero. width is a multiple of 8.
template <class T> void pack_columns(Step *panel, int width, const T *const *columns, int count, int64_t k) {
    constexpr int PER = Layout<T>::PER_STEP;
    const int64_t steps = steps_of<T>(k), whole = k / PER;
    for (int first = 0; first < width; first += 8) {
        int64_t s = 0;
        for (; first + 8 <= count && s + 8 <= whole; s += 8) {
            const void *from[8];
            Step wide[8][8];
            for (int n = 0; n < 8; n++) {
                const T *p = columns[first + n] + s * PER;
                from[n] = p;
                if (sizeof(T) * PER == 4) continue;
                copy_steps(wide[n], p, 8);
                from[n] = wide[n];
            }
            Isa::transpose8(panel + s * width + first, width, from);
        }
        for (; s < steps; s++)
            for (int n = first; n < first + 8; n++) {
                const T *p = n < count ? columns[n] + s * PER : nullptr;
                panel[s * width + n] = p ? make_step(p, s < whole ? p + 1 : nullptr) : 0;
            }
    }
}

// Elements k and k + 1 of a strided operand: element (k, n) is row(k)[n], row(k) = src + (rows ? rows[k] : k) * stride.
// For an odd last k, or where a step holds one element, the second is null.
template <class T> struct StepRows {
    const T *first, *second;
    StepRows(const T *src, int64_t stride, const int64_t *rows, int64_t step, int64_t k) {
        constexpr int PER = Layout<T>::PER_STEP;
        const int64_t at = step * PER;
        first = src + (rows ? rows[at] : at) * stride;
        second = PER == 2 && at + 1 < k ? src + (rows ? rows[at + 1] : at + 1) * stride : nullptr;
    }
    bool whole() const { return Layout<T>::PER_STEP == 1 || second; }
    Step one(int64_t n) const { return make_step(first + n, second ? second + n : nullptr); }
    Eight eight(int64_t n) const { return make_steps8(first + n, second + n); }
};

// One step of `columns` columns, padded with zeros to `width`.
template <class T> inline void copy_step(Step *out, const StepRows<T> &row, int64_t columns, int64_t width) {
    int64_t n = 0;
    for (; row.whole() && n + 8 <= columns; n += 8) store8(out + n, row.eight(n));
    for (; n < columns; n++) out[n] = row.one(n);
    for (; n < width; n++) out[n] = 0;
}

// Pack b(k, n), n in [0, columns), into panel[steps][NR]; missing columns and the odd last element are zero.
// contiguous_k: element (k, n) is src[n * stride + k]; else row(k)[n] as in StepRows.
template <class T> void pack_panel(Step *panel, const T *src, int64_t stride, const int64_t *rows, bool contiguous_k,
                                   int64_t k, int columns) {
    const int64_t steps = steps_of<T>(k);
    if (contiguous_k) {
        const T *starts[NR];
        for (int n = 0; n < columns; n++) starts[n] = src + n * stride;
        return pack_columns(panel, NR, starts, columns, k);
    }
    for (int64_t s = 0; s < steps; s++) copy_step(panel + s * NR, StepRows<T>(src, stride, rows, s, k), columns, NR);
}

// c (+)= rows of a · panel: MR rows of sums, `c_stride` apart. Step k of row i is a_rows[i][k * a_step].
template <bool PAIRS> __attribute__((noinline)) void microkernel(float *c, int64_t c_stride, const Step *const *a_rows,
                                                                 int64_t a_step, const Step *panel, int64_t steps,
                                                                 bool accumulate) {
    using Vector = typename Isa::Vector;
    constexpr int V = Isa::VECTORS;
    Vector acc[MR][V];
    const Step *row[MR];
    unroll<MR>([&](auto i) MOESTRO_INLINE {
        row[i] = a_rows[i];
        unroll<V>([&](auto v) MOESTRO_INLINE {
            acc[i][v] = accumulate ? Isa::load(c + i * c_stride + v * Isa::WIDTH) : Isa::zero();
        });
    });
    for (int64_t at = 0; steps > 0; steps--, at += a_step, panel += NR) {
        Vector b[V];
        unroll<V>([&](auto v) MOESTRO_INLINE { b[v] = Isa::load_steps(panel + v * Isa::WIDTH); });
        unroll<MR>([&](auto i) MOESTRO_INLINE {
            const Vector a = Isa::broadcast(row[i] + at);
            unroll<V>([&](auto v)
                          MOESTRO_INLINE { acc[i][v] = Isa::template multiply_add<PAIRS>(acc[i][v], a, b[v]); });
        });
    }
    unroll<MR>([&](auto i) MOESTRO_INLINE {
        unroll<V>([&](auto v) MOESTRO_INLINE { Isa::store(c + i * c_stride + v * Isa::WIDTH, acc[i][v]); });
    });
}

// The left operand of a product: element (i, k) is row(i)[k] where k is contiguous, else row(k)[i];
// row(j) = data + (rows ? rows[j] : j) * stride.
template <class T> struct Operand {
    const T *data;
    int64_t stride;
    const int64_t *rows;
    bool contiguous_k;
    Operand from_k(int64_t k) const {
        if (contiguous_k) return {data + k, stride, rows, true};
        return rows ? Operand{data, stride, rows + k, false} : Operand{data + k * stride, stride, nullptr, false};
    }
};

// Steps of a block of rows: a pointer for each row, and the distance of two steps of k.
struct Left {
    const Step *rows[ROW_BLOCK];
    int64_t step;
};

// The steps of m rows, used in place if elements are steps. Otherwise (bf16 without bf16 products, an odd k, a strided
// k) they are copied to `copy`: [m][steps], or [m / MR][steps][MR] with a cache line between the strips, so that they
// do not share cache sets. `copy` holds (ROW_BLOCK / MR) · (MR · steps + 16).
template <class T> void make_left(Left &left, Step *copy, const Operand<T> &a, int64_t m, int64_t k) {
    constexpr int PER = Layout<T>::PER_STEP;
    const int64_t steps = steps_of<T>(k);
    const bool in_place = sizeof(T) * PER == 4 && k % PER == 0;
    left.step = a.contiguous_k ? 1 : MR;
    for (int64_t i = 0; a.contiguous_k && i < m; i++) {
        const T *row = a.data + (a.rows ? a.rows[i] : i) * a.stride;
        left.rows[i] = in_place ? reinterpret_cast<const Step *>(row) : copy + i * steps;
        if (!in_place) copy_steps(copy + i * steps, row, k);
    }
    if (a.contiguous_k) return;
    const int64_t strip = MR * steps + 16;
    for (int64_t i = 0; i < m; i++) left.rows[i] = copy + i / MR * strip + i % MR;
    for (int64_t s = 0; s < steps; s++) {
        const StepRows<T> row(a.data, a.stride, a.rows, s, k);
        // Eight steps are written where six are needed. The next step overwrites the two extra ones; those of the last
        // step fall into the gap between strips.
        const int64_t wide = row.whole() ? m - 7 : 0;
        for (int64_t first = 0; first < m; first += MR) {
            Step *to = copy + first / MR * strip + s * MR;
            if (first < wide)
                store8(to, row.eight(first));
            else
                for (int64_t i = first; i < std::min(first + MR, m); i++) to[i - first] = row.one(i);
        }
    }
}

thread_local Scratch left_steps, block_sums;

// How MR rows of sums at (row, column) take in `steps` steps of k, the first of which is `at`: added, in order.
template <class T> struct PlainSums {
    static constexpr int64_t PIECE = K_PIECE;
    void operator()(float *c, int64_t stride, const Step *const *from, int64_t step, const Step *panel, int64_t steps,
                    int64_t at, int64_t, int64_t) const {
        microkernel<Layout<T>::PAIRS>(c, stride, from, step, panel, steps, at > 0);
    }
};

// At most ROW_BLOCK rows of `a` times the columns [first, last) of packed panels, each of all steps of k: use(row,
// column, values, count) receives the finished sums of a row, a panel's or COLUMN_BLOCK at a time. `first` is a
// multiple of NR. `sum` adds pieces of k to the sums, as PlainSums does.
template <class T, class Use, class Sum = PlainSums<T>> bool multiply_rows(const Operand<T> &a, int64_t m, int64_t k,
                                                                           const Step *panels, int64_t first,
                                                                           int64_t last, Use use, Sum sum = {}) {
    static_assert(K_BLOCK % Sum::PIECE == 0);
    constexpr int PER = Layout<T>::PER_STEP;
    const int64_t steps = steps_of<T>(k);
    const int64_t block_columns = steps <= K_BLOCK ? NR : COLUMN_BLOCK;
    Step *copy = left_steps.get<Step>(ROW_BLOCK / MR * (MR * K_BLOCK + 16));
    float *sums = block_sums.get<float>(ROW_BLOCK * COLUMN_BLOCK);
    if (!copy || !sums) return false;
    Left left;
    for (int64_t block = first; block < last; block += block_columns) {
        const int64_t columns = std::min(block_columns, last - block), stride = round_up(columns, NR);
        if (steps == 0) std::fill(sums, sums + m * stride, 0.0f);
        for (int64_t s = 0; s < steps; s += K_BLOCK) {
            const int64_t some = std::min(K_BLOCK, steps - s);
            if (block == first || steps > K_BLOCK)
                make_left(left, copy, a.from_k(s * PER), m, std::min(k - s * PER, some * PER));
            for (int64_t column = 0; column < columns; column += NR)
                for (int64_t piece = 0; piece < some; piece += Sum::PIECE) {
                    const Step *panel = panels + (block + column) / NR * steps * NR + (s + piece) * NR;
                    for (int64_t row = 0; row < m; row += MR) {
                        const Step *from[MR];
                        for (int i = 0; i < MR; i++) from[i] = left.rows[std::min(row + i, m - 1)] + piece * left.step;
                        sum(sums + row * stride + column, stride, from, left.step, panel,
                            std::min(Sum::PIECE, some - piece), s + piece, row, block + column);
                    }
                }
        }
        for (int64_t row = 0; row < m; row++) use(row, block, sums + row * stride, columns);
    }
    return true;
}

// Finished sums as a row of a result.
template <class T> inline void store_row(T *to, const float *values, int64_t count) {
    for (int64_t j = 0; j < count; j++) store_value(to + j, values[j]);
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
