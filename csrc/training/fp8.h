// Layers in FP8 for training, for one instruction set: quantising in blocks, products of codes with scales per block,
// SwiGLU around kept codes. Codes are multiplied as bf16 values, which hold them exactly. Any thread may take any task;
// tasks do not overlap, and sums inside a task have one order. moestro/ops/training/reference_fp8.py says what is
// computed.
#pragma once
#include "math/fp8.h"
#include "training/experts.h"
#include "training/train_rows.h"

namespace {

constexpr int64_t FP8_BLOCK = 128, FP8_COLUMNS = 64, FP8_ROWS = 16;  // a tile's side; columns, rows of a task

// x / scale, correctly rounded. With the reciprocal rounded correctly, one step of Newton's method gives that
// (Markstein 1990) where nothing underflows; a reciprocal of 0 says that it might.
inline float divide(float x, float scale, float reciprocal) {
    const float near = x * reciprocal;
    return std::fma(std::fma(-near, scale, x), reciprocal, near);
}
inline float reciprocal_of(float scale) { return scale > 0x1p-60f && scale < 0x1p60f ? 1.0f / scale : 0.0f; }

// Values of up to FP8_BLOCK columns of a row of the matrix to quantise.
inline void load_fp8_source(float *to, const Fp8Quantize &p, int64_t slot, int64_t column, int count, int type) {
    const int64_t row = p.rows ? p.rows[slot] : slot, at = row * p.width + column;
    if (p.x_scales) {
        const uint8_t *codes = static_cast<const uint8_t *>(p.x) + at;
        const float *scales = p.x_scales + row * ((p.width + FP8_BLOCK - 1) / FP8_BLOCK);
        const float scale = scales[column / FP8_BLOCK];  // tasks do not cross tiles
#pragma omp simd
        for (int j = 0; j < count; j++) to[j] = from_e4m3(codes[j]) * scale;
    } else if (type == MOESTRO_FLOAT32) {
        memcpy(to, static_cast<const float *>(p.x) + at, sizeof(float) * count);
    } else {
        const uint16_t *from = static_cast<const uint16_t *>(p.x) + at;
#pragma omp simd
        for (int j = 0; j < count; j++) to[j] = to_float(from[j]);
    }
}

// One row of codes. Each column has its scale and reciprocal, or, ONE, all share the first. FAST: no reciprocal is 0.
template <class Format, bool ONE, bool FAST> void store_fp8_row(uint16_t *values, uint8_t *codes, const float *x,
                                                                const float *scale, const float *reciprocal,
                                                                int count) {
    float rounded[FP8_BLOCK];
    const float first = scale[0], inverse = reciprocal[0];
#pragma omp simd
    for (int j = 0; j < count; j++) {
        const float s = ONE ? first : scale[j], r = ONE ? inverse : reciprocal[j];
        rounded[j] = Format::round(FAST ? divide(x[j], s, r) : x[j] / s, x[j]);
    }
    if (values) {
#pragma omp simd
        for (int j = 0; j < count; j++) values[j] = uint16_t(bits_of(rounded[j]) >> 16);
    }
    if (codes) {
#pragma omp simd
        for (int j = 0; j < count; j++) codes[j] = to_e4m3(rounded[j]);
    }
}

// Rows of a tile, which begin at `column`: their codes.
template <class Format, bool ONE> void store_fp8_tile(const Fp8Quantize &p, const Fp8Tile &tile, int64_t column,
                                                      int count, const float *x, const float *scale) {
    float reciprocal[FP8_BLOCK];
    bool fast = true;
    for (int j = 0; j < (ONE ? 1 : count); j++) {
        reciprocal[j] = reciprocal_of(scale[j]);
        fast &= reciprocal[j] != 0.0f;
    }
    for (int64_t i = 0; i < tile.rows; i++) {
        const int64_t at = (tile.first + i) * p.width + column;
        uint16_t *values = p.values ? p.values + at : nullptr;
        uint8_t *codes = p.codes ? p.codes + at : nullptr;
        if (fast)
            store_fp8_row<Format, ONE, true>(values, codes, x + i * FP8_BLOCK, scale, reciprocal, count);
        else
            store_fp8_row<Format, ONE, false>(values, codes, x + i * FP8_BLOCK, scale, reciprocal, count);
    }
}

// A tile of at most 128 rows and columns with one scale.
template <class Format>
void quantize_wide(const Fp8Quantize &p, const Fp8Tile &tile, int64_t column, int count, int type, float *x) {
    uint32_t most = 0;
    for (int64_t i = 0; i < tile.rows; i++) {
        float *row = x + i * FP8_BLOCK;
        load_fp8_source(row, p, tile.first + i, column, count, type);
#pragma omp simd reduction(max : most)
        for (int j = 0; j < count; j++) most = std::max(most, bits_of(row[j]) & 0x7fffffff);
    }
    const float scale = p.given ? p.given[tile.group] : choose_scale(most, Format::LARGEST, p.power_of_two);
    p.scales[tile.index * ((p.width + FP8_BLOCK - 1) / FP8_BLOCK) + column / FP8_BLOCK] = scale;
    store_fp8_tile<Format, true>(p, tile, column, count, x, &scale);
}

// Tiles of at most 128 rows side by side, one to a column.
template <class Format>
void quantize_columns(const Fp8Quantize &p, const Fp8Tile &tile, int64_t column, int count, int type, float *x) {
    uint32_t most[FP8_BLOCK] = {};
    for (int64_t i = 0; i < tile.rows; i++) {
        float *row = x + i * FP8_BLOCK;
        load_fp8_source(row, p, tile.first + i, column, count, type);
#pragma omp simd
        for (int j = 0; j < count; j++) most[j] = std::max(most[j], bits_of(row[j]) & 0x7fffffff);
    }
    float *scale = p.scales + tile.index * p.width + column;
    const bool power_of_two = p.power_of_two;
    if (p.given) {
        std::fill_n(scale, count, p.given[tile.group]);
    } else {
#pragma omp simd
        for (int j = 0; j < count; j++) scale[j] = choose_scale(most[j], Format::LARGEST, power_of_two);
    }
    store_fp8_tile<Format, false>(p, tile, column, count, x, scale);
}

template <class Format>
void quantize_tile(const Fp8Quantize &p, const Fp8Tile &tile, int64_t column, int count, int type, float *x) {
    p.wide ? quantize_wide<Format>(p, tile, column, count, type, x)
           : quantize_columns<Format>(p, tile, column, count, type, x);
}

// The tiles of all groups: of 128 rows, or rows by themselves.
inline int64_t make_fp8_tiles(Fp8Tile *tiles, const Fp8Quantize &p) {
    int64_t count = 0;
    const int64_t height = p.tall ? FP8_BLOCK : 1;
    for (int64_t g = 0; g < p.num_groups; g++)
        for (int64_t s = p.bounds[g]; s < p.bounds[g + 1]; s += height, count++)
            if (tiles) tiles[count] = {g, s, std::min(height, p.bounds[g + 1] - s), p.tall ? count : s};
    return count;
}

inline int fp8_quantize(const Fp8Quantize &p, int type, int threads) {
    const int64_t count = make_fp8_tiles(nullptr, p), at_once = p.tall ? 1 : FP8_ROWS,
                  columns = p.wide || p.x_scales || !p.tall ? FP8_BLOCK : FP8_COLUMNS;
    Fp8Tile *tiles = static_cast<Fp8Tile *>(malloc(sizeof(Fp8Tile) * std::max<int64_t>(count, 1)));
    if (!tiles) return MOESTRO_NO_MEMORY;
    make_fp8_tiles(tiles, p);
    const int64_t height = p.tall ? FP8_BLOCK : 1;
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4) reduction(| : failed)
    for (int64_t task = 0; task < (count + at_once - 1) / at_once; task++) {
        float *x = thread_floats.get<float>(height * FP8_BLOCK);
        if (!x) {
            failed = 1;
            continue;
        }
        for (int64_t t = task * at_once; t < std::min(count, (task + 1) * at_once); t++)
            for (int64_t column = 0; column < p.width; column += columns) {
                const int some = int(std::min(columns, p.width - column));
                if (p.e5m6)
                    quantize_tile<E5M6>(p, tiles[t], column, some, type, x);
                else
                    quantize_tile<E4M3>(p, tiles[t], column, some, type, x);
            }
    }
    free(tiles);
    return failed ? MOESTRO_NO_MEMORY : MOESTRO_OK;
}

inline void fp8_widen(uint16_t *values, const uint8_t *codes, int64_t count, int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (int64_t j = 0; j < count; j++) values[j] = uint16_t(bits_of(from_e4m3(codes[j])) >> 16);
}

// One group of a product: out [m, n] = Σ over blocks of k of (Σ a[i, k] · b(k, j)) · left · right, where left is
// left[row · left_row + block · left_block] and right is right[j / width · right_column + block · right_block].
struct Fp8Group {
    Operand<uint16_t> a;
    const float *left;
    int64_t left_row, left_block;
    const uint16_t *b;
    int64_t b_stride;
    bool contiguous_k;
    const float *right;
    int64_t width, right_column, right_block, m, k;
    void *out;
    int64_t panels, scales;  // where its packed b and the scales of each panel begin

    int64_t blocks() const { return (k + FP8_BLOCK - 1) / FP8_BLOCK; }
};

// Adds to MR rows of sums the products of one block of k, scaled.
struct ScaledSums {
    static constexpr int64_t PIECE = FP8_BLOCK / Layout<uint16_t>::PER_STEP;
    const float *const *left;  // of each row
    int64_t left_block;
    const float *right;  // [panel][block][NR]
    int64_t blocks, rows;

    void operator()(float *c, int64_t stride, const Step *const *from, int64_t step, const Step *panel, int64_t steps,
                    int64_t at, int64_t row, int64_t column) const {
        alignas(64) float sums[MR * NR];
        microkernel<Layout<uint16_t>::PAIRS>(sums, NR, from, step, panel, steps, false);
        const int64_t block = at / PIECE;
        const float *of_columns = right + (column / NR * blocks + block) * NR;
        for (int64_t i = 0; i < MR; i++) {
            const auto of_row = Isa::broadcast(left[std::min(row + i, rows - 1)] + block * left_block);
            unroll<Isa::VECTORS>([&](auto v) MOESTRO_INLINE {
                float *to = c + i * stride + v * Isa::WIDTH;
                const auto both = Isa::multiply(of_row, Isa::load_any(of_columns + v * Isa::WIDTH));
                const auto before = block ? Isa::load_any(to) : Isa::zero();
                Isa::store_any(
                    to, Isa::template multiply_add<false>(before, Isa::load_any(sums + i * NR + v * Isa::WIDTH), both));
            });
        }
    }
};

template <class Out>
bool fp8_task(const Fp8Group &g, const Task &task, const Step *panels, const float *scales, int64_t first, int64_t n) {
    const float *left[ROW_BLOCK];
    for (int64_t i = 0; i < task.rows; i++) {
        const int64_t row = task.first + i;
        left[i] = g.left + (g.a.contiguous_k && g.a.rows ? g.a.rows[row] : row) * g.left_row;
    }
    Operand<uint16_t> some = g.a;
    if (g.a.contiguous_k && g.a.rows)
        some.rows += task.first;
    else
        some.data += g.a.contiguous_k ? task.first * g.a.stride : task.first;
    Out *out = static_cast<Out *>(g.out) + task.first * n;
    return multiply_rows(
        some, task.rows, g.k, panels + g.panels, first, std::min(first + COLUMN_BLOCK, n),
        [&](int64_t i, int64_t column, const float *values, int64_t count) {
            store_row(out + i * n + column, values, std::min(count, n - column));
        },
        ScaledSums{left, g.left_block, scales + g.scales, g.blocks(), task.rows});
}

// All groups, each with n columns.
template <class Out> int fp8_multiply(Fp8Group *groups, int64_t num_groups, int64_t n, int threads) {
    const int64_t across = (n + NR - 1) / NR, wide = (n + COLUMN_BLOCK - 1) / COLUMN_BLOCK;
    int64_t num_steps = 0, num_scales = 0, num_tasks = 0;
    for (int64_t g = 0; g < num_groups; g++) {
        Fp8Group &group = groups[g];
        group.panels = num_steps, group.scales = num_scales;
        if (group.m == 0) continue;
        num_steps += across * NR * steps_of<uint16_t>(group.k);
        num_scales += across * NR * group.blocks();
        num_tasks += (group.m + ROW_BLOCK - 1) / ROW_BLOCK;
    }
    Step *panels = shared_panels.get<Step>(num_steps);
    float *scales = shared_more.get<float>(num_scales);
    Task *tasks = static_cast<Task *>(malloc(sizeof(Task) * std::max<int64_t>(num_tasks, 1)));
    if (!panels || !scales || !tasks) {
        free(tasks);
        return MOESTRO_NO_MEMORY;
    }
    int64_t place = 0;
    for (int64_t g = 0; g < num_groups; g++)
        for (int64_t row = 0; row < groups[g].m; row += ROW_BLOCK)
            tasks[place++] = {g, row, std::min(ROW_BLOCK, groups[g].m - row)};
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t task = 0; task < num_groups * across; task++) {
            const Fp8Group &g = groups[task / across];
            const int64_t p = task % across, column = p * NR, count = std::min<int64_t>(NR, n - column);
            if (g.m == 0) continue;
            pack_panel(panels + g.panels + column * steps_of<uint16_t>(g.k),
                       g.contiguous_k ? g.b + column * g.b_stride : g.b + column, g.b_stride, nullptr, g.contiguous_k,
                       g.k, int(count));
            float *to = scales + g.scales + column * g.blocks();
            for (int64_t block = 0; block < g.blocks(); block++, to += NR)
                for (int64_t j = 0; j < NR; j++)
                    to[j] = j < count ? g.right[(column + j) / g.width * g.right_column + block * g.right_block] : 0.0f;
        }
#pragma omp for schedule(dynamic) reduction(| : failed)
        for (int64_t task = 0; task < num_tasks * wide; task++) {
            const Task &some = tasks[task / wide];
            failed |= !fp8_task<Out>(groups[some.expert], some, panels, scales, task % wide * COLUMN_BLOCK, n);
        }
    }
    free(tasks);
    return failed ? MOESTRO_NO_MEMORY : MOESTRO_OK;
}

// Rows of each group times its matrix b [m, k]: `back` contracts over m, else over k.
inline int fp8_rows(const Fp8Rows &p, int threads) {
    const int64_t across = (p.k + FP8_BLOCK - 1) / FP8_BLOCK, length = p.back ? p.m : p.k, n = p.back ? p.k : p.m,
                  blocks = (length + FP8_BLOCK - 1) / FP8_BLOCK;
    Fp8Group *groups = static_cast<Fp8Group *>(malloc(sizeof(Fp8Group) * std::max<int64_t>(p.num_groups, 1)));
    if (!groups) return MOESTRO_NO_MEMORY;
    for (int64_t g = 0; g < p.num_groups; g++) {
        const int64_t first = p.bounds[g], count = p.bounds[g + 1] - first;
        Fp8Group &group = groups[g];
        group = {};
        group.a = {p.rows ? p.a : p.a + first * length, length, p.rows ? p.rows + first : nullptr, true};
        group.left = p.rows ? p.a_scales : p.a_scales + first * blocks;
        group.left_row = blocks, group.left_block = 1;
        group.b = static_cast<const uint16_t *>(p.b[g]), group.b_stride = p.k, group.contiguous_k = !p.back;
        group.right = static_cast<const float *>(p.b_scales[g]), group.width = FP8_BLOCK;
        group.right_column = p.back ? 1 : across, group.right_block = p.back ? across : 1;
        group.m = count, group.k = length, group.out = p.out + first * n;
    }
    const int error = fp8_multiply<uint16_t>(groups, p.num_groups, n, threads);
    free(groups);
    return error;
}

// For each group aᵀ b over its rows.
inline int fp8_columns(const Fp8Columns &p, int threads) {
    Fp8Group *groups = static_cast<Fp8Group *>(malloc(sizeof(Fp8Group) * std::max<int64_t>(p.num_groups, 1)));
    if (!groups) return MOESTRO_NO_MEMORY;
    int64_t tile = 0;
    for (int64_t g = 0; g < p.num_groups; g++) {
        const int64_t first = p.bounds[g], count = p.bounds[g + 1] - first;
        Fp8Group &group = groups[g];
        group = {};
        group.a = {p.a + first * p.m, p.m, nullptr, false};
        group.left = p.a_scales + tile * p.m, group.left_row = 1, group.left_block = p.m;
        group.b = p.b + first * p.k, group.b_stride = p.k;
        group.right = p.b_scales + tile * p.k, group.width = 1, group.right_column = 1, group.right_block = p.k;
        group.m = p.m, group.k = count, group.out = p.out + g * p.m * p.k;
        tile += group.blocks();
    }
    const int error = fp8_multiply<float>(groups, p.num_groups, p.k, threads);
    free(groups);
    return error;
}

// silu(gate) · up · weight of rows h [rows, 2 · width].
inline void fp8_swiglu(uint16_t *out, const uint16_t *h, const float *weights, int64_t rows, int64_t width,
                       int threads) {
    for_rows(rows, width, threads, [&](int64_t i) {
        const uint16_t *gate = h + i * 2 * width, *up = gate + width;
        const float weight = weights[i];
        for_lanes(width, [&](int64_t j, auto count) MOESTRO_INLINE {
#pragma omp simd
            for (int l = 0; l < count; l++) {
                const float g = to_float(gate[j + l]);
                store_value(out + i * width + j + l, g * sigmoid(g) * to_float(up[j + l]) * weight);
            }
        });
    });
}

// Values of a row of codes in tiles of 1 x 128.
inline void read_fp8_row(float *to, const uint8_t *codes, const float *scales, int64_t width) {
    for (int64_t first = 0; first < width; first += FP8_BLOCK) {
        const float scale = scales[first / FP8_BLOCK];
        const int64_t last = std::min(first + FP8_BLOCK, width);
#pragma omp simd
        for (int64_t j = first; j < last; j++) to[j] = from_e4m3(codes[j]) * scale;
    }
}

// From h in codes: the activation again, and the gradients of h and of the weights.
inline int fp8_swiglu_backward(const Fp8Swiglu &p, int threads) {
    const int64_t width = p.width, across = (2 * width + FP8_BLOCK - 1) / FP8_BLOCK;
    int failed = 0;
#pragma omp parallel for num_threads(p.rows *width < SHARED_VALUES ? 1 : threads) reduction(| : failed)
    for (int64_t i = 0; i < p.rows; i++) {
        float *gate = thread_floats.get<float>(2 * width), *up = gate + width;
        if (!gate) {
            failed = 1;
            continue;
        }
        read_fp8_row(gate, p.h + i * 2 * width, p.h_scales + i * across, 2 * width);
        const float weight = p.weights[i];
        uint16_t *act = p.act + i * width, *d_gate = p.dh + i * 2 * width, *d_up = d_gate + width;
        const uint16_t *d = p.d_act + i * width;
        float sums[LANES] = {};
        for_lanes(width, [&](int64_t j, auto count) MOESTRO_INLINE {
#pragma omp simd
            for (int l = 0; l < count; l++) {
                const float g = gate[j + l], u = up[j + l], s = sigmoid(g), silu = g * s, dy = to_float(d[j + l]),
                            weighted = dy * weight;
                sums[l] += dy * silu * u;
                store_value(act + j + l, silu * u * weight);
                store_value(d_up + j + l, weighted * silu);
                store_value(d_gate + j + l, weighted * u * (s + silu * (1.0f - s)));
            }
        });
        p.d_weights[i] = sum_lanes(sums);
    }
    return failed ? MOESTRO_NO_MEMORY : MOESTRO_OK;
}

}  // namespace
