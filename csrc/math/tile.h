// Products in registers for serving: R equally spaced rows times V vectors of a packed panel. A result is one sum over
// k in order, whatever R and V are, so the number of rows can choose the shape freely.
#pragma once
#include "math/gemm.h"

namespace {

// Calls f with the constant `rows`, which is 1 … MOST.
template <int MOST, class F> inline void with_rows(int64_t rows, F &&f) {
    if constexpr (MOST > 1) {
        if (rows < MOST) return with_rows<MOST - 1>(rows, f);
    }
    f(std::integral_constant<int, MOST>());
}

struct Rows {
    const char *data;
    int64_t bytes;       // from row to row
    int64_t scales = 0;  // where the BlockScales of quantised rows begin
};

// Where to fetch ahead of use, some lines per step.
struct Ahead {
    const char *at;
    int64_t bytes;
    template <int LINES> MOESTRO_INLINE void fetch() {
        unroll<LINES>([&](auto line) MOESTRO_INLINE { __builtin_prefetch(at + 64 * line); });
        at += bytes;
    }
};
// Lines per step of V vectors, no more than the products of R rows leave time for.
template <int R, int V> constexpr int LINES = std::min(V * Isa::WIDTH / 16, R == 1 && Isa::FETCH_CLOSE ? 4 : 2);

// Three rows share a pointer: one instruction can address base, base + distance and base + 2 · distance.
template <int R> struct Pointers {
    const char *at[(R + 2) / 3];
    int64_t distance;
    MOESTRO_INLINE Pointers(const char *data, int64_t bytes) : distance(bytes) {
        unroll<(R + 2) / 3>([&](auto q) MOESTRO_INLINE { at[q] = data + 3 * q * bytes; });
    }
    template <class I> MOESTRO_INLINE const char *operator[](I i) const { return at[i / 3] + i % 3 * distance; }
    MOESTRO_INLINE void advance(int64_t bytes) {
        unroll<(R + 2) / 3>([&](auto q) MOESTRO_INLINE { at[q] += bytes; });
    }
};

// use(row, vector, what was loaded): V vectors of a step for R rows. With one row, each vector is used up before the
// next is loaded, so that many columns fit the registers; with several, each is loaded once for all.
template <int R, int V, class Vector, class Load, class Use>
inline MOESTRO_INLINE void for_vectors(Load &&load, Use &&use) {
    if constexpr (R == 1) {
        unroll<V>([&](auto v) MOESTRO_INLINE { use(std::integral_constant<int, 0>(), v, load(v)); });
    } else {
        Vector b[V];
        unroll<V>([&](auto v) MOESTRO_INLINE { b[v] = load(v); });
        unroll<R>([&](auto i) MOESTRO_INLINE { unroll<V>([&](auto v) MOESTRO_INLINE { use(i, v, b[v]); }); });
    }
}

// Keeps the compiler from holding what it has read in registers that the sums need.
#define READ_AGAIN asm volatile("" ::: "memory")

// How rows meet a panel, and what a step is: a float of each; a pair of bf16 of each; two floats of a row and a pair of
// bf16 of the panel; a pair of bf16 of a row and two steps of floats of the panel; a float of a row and bf16 of the
// panel.
enum class Mode { FLOATS, PAIRS, WIDE_PANEL, WIDE_ROWS, WIDE_VALUES };

// c (+)= rows · panel over `steps` steps, which lie panel_bytes apart.
template <Mode MODE, int R, int V> void tile(float *c, int64_t c_stride, Rows rows, const char *panel,
                                             int64_t panel_bytes, int64_t steps, bool accumulate, Ahead ahead) {
    using Vector = typename Isa::Vector;
    constexpr bool PAIRS = MODE == Mode::PAIRS, WIDE_PANEL = MODE == Mode::WIDE_PANEL,
                   WIDE_ROWS = MODE == Mode::WIDE_ROWS;
    constexpr int HALVES = WIDE_PANEL || WIDE_ROWS ? 2 : 1, LANE = MODE == Mode::WIDE_VALUES ? 2 : 4;
    Vector acc[R][V];
    Pointers<R> row(rows.data, rows.bytes);
    unroll<R>([&](auto i) MOESTRO_INLINE {
        unroll<V>([&](auto v) MOESTRO_INLINE {
            acc[i][v] = accumulate ? Isa::load_any(c + i * c_stride + v * Isa::WIDTH) : Isa::zero();
        });
    });
    for (int64_t s = 0; s < steps; s++) {
        ahead.fetch<LINES<R, V>>();
        unroll<HALVES>([&](auto half) MOESTRO_INLINE {
            if (half) READ_AGAIN;
            for_vectors<R, V, Vector>(
                [&](auto v) MOESTRO_INLINE {
                    const char *at = panel + v * Isa::WIDTH * LANE + (WIDE_ROWS ? half * panel_bytes : 0);
                    if (MODE == Mode::WIDE_VALUES) return Isa::load_widened(at);
                    const Vector b = Isa::load_any(at);
                    return !WIDE_PANEL ? b : half ? Isa::high_half(b) : Isa::low_half(b);
                },
                [&](auto i, auto v, Vector b) MOESTRO_INLINE {
                    const Vector a = Isa::broadcast(row[i] + (WIDE_PANEL ? 4 * half : 0));
                    acc[i][v] = Isa::template multiply_add<PAIRS>(acc[i][v],
                                                                  !WIDE_ROWS ? a
                                                                  : half     ? Isa::high_half(a)
                                                                             : Isa::low_half(a),
                                                                  b);
                });
        });
        row.advance(WIDE_PANEL ? 8 : 4);
        panel += WIDE_ROWS ? 2 * panel_bytes : panel_bytes;
    }
    unroll<R>([&](auto i) MOESTRO_INLINE {
        unroll<V>([&](auto v) MOESTRO_INLINE { Isa::store_any(c + i * c_stride + v * Isa::WIDTH, acc[i][v]); });
    });
}

constexpr int PANEL = 64;  // outputs of a packed panel, on every instruction set

// Vectors of columns of a tile: few rows leave registers for more of them than NR has.
constexpr int vectors_of(int rows) {
    return std::min(std::max(rows == 1 ? 8 : rows == 2 ? 4 : 0, Isa::VECTORS), PANEL / Isa::WIDTH);
}

// Rows that lie a multiple of 2048 bytes apart would share few sets of the first-level cache.
inline int64_t spread(int64_t bytes) { return bytes % 2048 ? bytes : bytes + 64; }

// Quantised blocks of a panel: codes [LENGTH / 4][PANEL][4] around ZERO, of 4 bits with steps s and s + LENGTH / 8 in
// the low and high halves of a byte; then PANEL scales in bf16.
template <int BITS> struct Block {
    static constexpr int LENGTH = BITS == 8 ? 64 : 32, ZERO = BITS == 8 ? 128 : 8;
    static constexpr int CODES = LENGTH * PANEL * BITS / 8, BYTES = CODES + 2 * PANEL, LOADS = CODES / (4 * PANEL);
};

// A block of a quantised row: value = scale · code; `start` subtracts the panel's ZERO, −ZERO · Σ codes.
struct BlockScale {
    float scale;
    int32_t start;
};

// c (+)= rows · blocks, at `column` of the panel. Sums inside a block are exact integers.
template <int BITS, int R, int V> void block_tile(float *c, int64_t c_stride, Rows rows, const char *blocks,
                                                  int64_t column, int64_t count, bool accumulate, Ahead ahead) {
    using Integers = typename Isa::Integers;
    using B = Block<BITS>;
    constexpr int HALVES = 8 / BITS, HALF = B::LENGTH / 2;  // of a byte of codes; bytes of a row between them
    Pointers<R> row(rows.data, rows.bytes), scale(rows.data + rows.scales, rows.bytes);
    for (int64_t b = 0; b < count; b++) {
        Integers acc[R][V];
        unroll<R>([&](auto i) MOESTRO_INLINE {
            unroll<V>([&](auto v) MOESTRO_INLINE { acc[i][v] = Isa::template begin<BITS>(step_as_int(scale[i] + 4)); });
        });
        const char *codes = blocks + b * B::BYTES + column * 4;
        for (int s = 0; s < B::LOADS; s++) {
            ahead.fetch<LINES<R, V> + (R <= 2 ? 1 : 0)>();  // the scales, too
            unroll<HALVES>([&](auto half) MOESTRO_INLINE {
                if (half) READ_AGAIN;
                for_vectors<R, V, Integers>(
                    [&](auto v) MOESTRO_INLINE {
                        const Integers w = Isa::load_codes(codes + v * Isa::WIDTH * 4);
                        return HALVES == 1 ? w : half ? Isa::high_codes(w) : Isa::low_codes(w);
                    },
                    [&](auto i, auto v, Integers w) MOESTRO_INLINE {
                        acc[i][v] = Isa::template dot<BITS>(acc[i][v], w, Isa::set(step_as_int(row[i] + HALF * half)));
                    });
            });
            row.advance(4);
            codes += 4 * PANEL;
        }
        if (BITS == 4) row.advance(HALF);
        const char *scales = blocks + b * B::BYTES + B::CODES + column * 2;
        unroll<V>([&](auto v) MOESTRO_INLINE {
            const auto of_columns = Isa::load_widened(scales + v * Isa::WIDTH * 2);
            unroll<R>([&](auto i) MOESTRO_INLINE {
                float *to = c + i * c_stride + v * Isa::WIDTH;
                const auto both = Isa::multiply(of_columns, Isa::broadcast(scale[i]));
                const auto before = b || accumulate ? Isa::load_any(to) : Isa::zero();
                const auto sum = Isa::template end<BITS>(acc[i][v], step_as_int(scale[i] + 4));
                Isa::store_any(to, Isa::template multiply_add<false>(before, Isa::to_float(sum), both));
            });
        });
        scale.advance(sizeof(BlockScale));
    }
}

}  // namespace
