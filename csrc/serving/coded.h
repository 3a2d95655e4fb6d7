// Products with FP8 weights. A block of a panel, 128 k of 64 outputs, is widened to bf16, which is exact, and used for
// all rows while it is in the first-level cache. Its sums are multiplied by the scales of its outputs in fp32 and added
// to the results, block after block, so a row's bits do not depend on how many others there are.
//
//   block    codes E4M3 [k / 4][output / 4][k / 2 % 2][output % 4][k % 2], then fp32 scales [output]
//   rows     as they are: fp32, or bf16 and used in place; or, with ROUNDED, code values of tiles of 128, then a scale
//            for every tile (DeepSeek's own inference)
#pragma once
#include "math/fp8.h"
#include "math/tile.h"

namespace {

thread_local Scratch wide_block;

template <Mode MODE, bool ROUNDED> struct CodedProduct {
    using Vector = typename Isa::Vector;
    static constexpr bool IN_BLOCKS = true, QUANTISED = ROUNDED;
    static constexpr int64_t UNIT = FP8_TILE, CODES = UNIT * PANEL, BYTES = CODES + 4 * PANEL, STEPS = UNIT / 2,
                             ROWS = MODE == Mode::WIDE_PANEL ? 5 : MR, FEW = 4;
    using Value = std::conditional_t<MODE == Mode::PAIRS, uint16_t, float>;  // of prepared rows
    using Element = std::conditional_t<ROUNDED, float, Value>;               // of rows before they are rounded
    static constexpr int64_t ROW_BYTES = UNIT * int64_t(sizeof(Value));      // of a block

    static int64_t scales(int64_t k) { return ROUNDED ? round_up(k, UNIT) * int64_t(sizeof(Value)) : 0; }
    static int64_t row_bytes(int64_t k) {
        const int64_t whole = round_up(k, UNIT);
        return spread(whole * int64_t(sizeof(Value)) + (ROUNDED ? whole / UNIT * 4 : 0));
    }
    template <class T> static bool in_place(int64_t rows, int64_t stride, int64_t k) {
        const int64_t bytes = stride * int64_t(sizeof(T));
        return !ROUNDED && std::is_same<T, Value>::value && k % UNIT == 0 && (rows == 1 || bytes == spread(bytes));
    }
    template <class T> static void prepare(char *to, const T *x, int64_t k) {
        Value *out = reinterpret_cast<Value *>(to);
        float *scale = reinterpret_cast<float *>(to + scales(k));
        for (int64_t first = 0; first < k; first += UNIT, out += UNIT) {
            const int64_t count = std::min(UNIT, k - first);
            float v[UNIT] = {};
            for (int64_t i = 0; i < count; i++) v[i] = load_value(x + first + i);
            if (ROUNDED) *scale++ = round_tile(v);
            for (int64_t i = 0; i < UNIT; i++) store_value(out + i, v[i]);
        }
    }
    // Replaces a tile by its codes and returns its scale: NaN if a value is not finite.
    static float round_tile(float *v) {
        uint32_t most = bits_of(FP8_LEAST_ACTIVATION);  // bits of magnitudes: NaN is the largest of all
        for (int64_t i = 0; i < UNIT; i++) most = std::max(most, bits_of(v[i]) & 0x7fffffff);
        if (most >= 0x7f800000) {
            std::fill(v, v + UNIT, 0.0f);
            return NAN;
        }
        const float scale = choose_scale(most, E4M3::LARGEST, false);
        for (int64_t i = 0; i < UNIT; i++) v[i] = E4M3::round(v[i] / scale, v[i]);
        return scale;
    }

    // c [count][PANEL] = rows · panel. Few rows multiply what is widened in registers; more share a widened block.
    static bool multiply_blocks(float *c, Rows rows, int64_t count, const char *panel, int64_t units) {
        char *wide = count > FEW ? wide_block.get<char>(2 * CODES) : nullptr;
        if (count > FEW && !wide) return false;
        const int64_t most = wide ? ROWS : FEW, groups = (count + most - 1) / most;
        const int64_t rows_each = (count + groups - 1) / groups;
        for (int64_t unit = 0; unit < units; unit++, panel += BYTES) {
            if (wide) widen(wide, panel);
            for (int64_t row = 0; row < count; row += rows_each)
                with_rows<ROWS>(std::min(rows_each, count - row), [&](auto r) {
                    constexpr int R = decltype(r)::value;
                    const Rows own = {rows.data + row * rows.bytes + unit * ROW_BYTES, rows.bytes};
                    const char *of_rows = own.data - unit * ROW_BYTES + rows.scales + unit * 4;
                    const Ahead next = {panel + BYTES, row ? 0 : 2 * 64};  // fetched beside the first rows
                    multiply_block<R>(c + row * PANEL, own, of_rows, wide, panel, unit > 0, next);
                });
        }
        return true;
    }
    static void widen(char *to, const char *codes) {
        for (int64_t step = 0; step < CODES; step += 4 * PANEL, to += 8 * PANEL)
            for (int64_t at = 0; at < 4 * PANEL; at += 4 * Isa::WIDTH) {
                Vector pairs[2];
                Isa::widen_codes(pairs[0], pairs[1], codes + step + at);
                Isa::store_any(to + at, pairs[0]);
                Isa::store_any(to + 4 * PANEL + at, pairs[1]);
            }
    }
    // Adds a block to R rows of results: sums of its products times its scales.
    template <int R> static void multiply_block(float *c, Rows rows, const char *of_rows, const char *wide,
                                                const char *block, bool accumulate, Ahead next) {
        constexpr int V = vectors_of(R), COLUMNS = V * Isa::WIDTH;
        alignas(64) float sums[R * COLUMNS];
        for (int64_t column = 0; column < PANEL; column += COLUMNS) {
            const Ahead ahead = {next.at + column / COLUMNS * (CODES * COLUMNS / PANEL), next.bytes * COLUMNS / PANEL};
            if (wide)
                tile<MODE, R, V>(sums, COLUMNS, rows, wide + column * 4, 4 * PANEL, STEPS, false, ahead);
            else if constexpr (R <= FEW)
                multiply_codes<R, V>(sums, rows, block + column * 4, ahead);
            unroll<V>([&](auto v) MOESTRO_INLINE {
                const Vector of_columns = Isa::load_any(block + CODES + (column + v * Isa::WIDTH) * 4);
                unroll<R>([&](auto i) MOESTRO_INLINE {
                    float *to = c + i * PANEL + column + v * Isa::WIDTH;
                    const char *of_row = of_rows + i * rows.bytes;
                    const Vector both = ROUNDED ? Isa::multiply(of_columns, Isa::broadcast(of_row)) : of_columns;
                    const Vector before = accumulate ? Isa::load_any(to) : Isa::zero();
                    const Vector sum = Isa::load_any(sums + i * COLUMNS + v * Isa::WIDTH);
                    Isa::store_any(to, Isa::template multiply_add<false>(before, sum, both));
                });
            });
        }
    }
    // sums [R][V · WIDTH] = rows · codes, in the same order as `tile` with the widened block.
    template <int R, int V> static void multiply_codes(float *sums, Rows rows, const char *codes, Ahead ahead) {
        Vector acc[R][V];
        Pointers<R> row(rows.data, rows.bytes);
        unroll<R>([&](auto i) MOESTRO_INLINE { unroll<V>([&](auto v) MOESTRO_INLINE { acc[i][v] = Isa::zero(); }); });
        for (int64_t s = 0; s < STEPS / 2; s++) {
            ahead.template fetch<LINES<R, V>>();
            ahead.template fetch<LINES<R, V>>();
            unroll<V>([&](auto v) MOESTRO_INLINE {
                Vector pairs[2];
                Isa::widen_codes(pairs[0], pairs[1], codes + v * Isa::WIDTH * 4);
                unroll<2>([&](auto half) MOESTRO_INLINE {
                    unroll<R>([&](auto i) MOESTRO_INLINE {
                        acc[i][v] = add_pairs(acc[i][v], row[i] + half * 2 * int64_t(sizeof(Value)), pairs[half]);
                    });
                });
            });
            row.advance(4 * sizeof(Value));
            codes += 4 * PANEL;
        }
        unroll<R>([&](auto i) MOESTRO_INLINE {
            unroll<V>([&](auto v) MOESTRO_INLINE { Isa::store_any(sums + (i * V + v) * Isa::WIDTH, acc[i][v]); });
        });
    }
    // acc + x[0] · first of each pair + x[1] · second.
    static Vector add_pairs(Vector acc, const char *x, Vector pairs) {
        if (MODE == Mode::PAIRS) return Isa::template multiply_add<true>(acc, Isa::broadcast(x), pairs);
        acc = Isa::template multiply_add<false>(acc, Isa::broadcast(x), Isa::low_half(pairs));
        return Isa::template multiply_add<false>(acc, Isa::broadcast(x + 4), Isa::high_half(pairs));
    }
};

// Codes [m, k], row after row, and the scales [m, blocks] of every row -> panels.
inline void pack_codes_panel(char *to, const uint8_t *codes, const float *scales, int64_t count, int64_t k) {
    using P = CodedProduct<Mode::FLOATS, false>;
    const int64_t blocks = (k + P::UNIT - 1) / P::UNIT;
    memset(to, 0, blocks * P::BYTES);
    for (int64_t b = 0; b < blocks; b++, to += P::BYTES) {
        const int64_t first = b * P::UNIT, length = std::min(P::UNIT, k - first);
        for (int64_t at = 0; at < length; at += 2) {
            char *step = to + at / 4 * 4 * PANEL + at / 2 % 2 * 8;
            const int64_t bytes = std::min<int64_t>(2, length - at);
            for (int64_t o = 0; o < count; o++)
                memcpy(step + o / 4 * 16 + o % 4 * 2, codes + o * k + first + at, bytes);
        }
        for (int64_t o = 0; o < count; o++) memcpy(to + P::CODES + 4 * o, scales + o * blocks + b, 4);
    }
}

inline int pack_codes(char *panels, const uint8_t *codes, const float *scales, int64_t m, int64_t k, int threads) {
    using P = CodedProduct<Mode::FLOATS, false>;
    const int64_t blocks = (k + P::UNIT - 1) / P::UNIT;
    if (!blocks) return MOESTRO_OK;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t p = 0; p < (m + PANEL - 1) / PANEL; p++)
        pack_codes_panel(panels + p * blocks * P::BYTES, codes + p * PANEL * k, scales + p * PANEL * blocks,
                         std::min<int64_t>(PANEL, m - p * PANEL), k);
    return MOESTRO_OK;
}

}  // namespace
