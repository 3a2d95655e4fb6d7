// Rows of a cache in FP8 (moestro.h, moestro_store_fp8_rows): codes, the scales of their tiles, the rest in bf16.
#pragma once
#include "abi/table.h"
#include "math/fp8.h"
#include "math/rows.h"

namespace {

// At most FP8_TILE values: their codes, and the scale, which is not finite if one of them is not.
template <class T> float store_tile(char *codes, const T *x, int64_t count) {
    float v[FP8_TILE];
    uint8_t to[FP8_TILE];
    uint32_t most = bits_of(FP8_LEAST_ACTIVATION);  // compared as bits, NaN is the largest
    for (int64_t j = 0; j < count; j++) v[j] = load_value(x + j);
    for (int64_t j = 0; j < count; j++) most = std::max(most, bits_of(v[j]) & 0x7fffffff);
    const float scale = float_of(most) / E4M3::LARGEST;
#pragma omp simd
    for (int64_t j = 0; j < count; j++) to[j] = to_e4m3(E4M3::round(v[j] / scale, v[j]));
    memcpy(codes, to, count);
    return scale;
}

template <class T> void store_fp8_rows(const Fp8CacheRows &a, int threads) {
    const int64_t bytes = fp8_row_bytes(a.coded, a.width);
    for_rows(a.num_rows, a.width, threads, [&](int64_t i) {
        const T *x = static_cast<const T *>(a.x) + i * a.width;
        char *codes = a.pages + a.slots[i] * bytes, *next = codes + a.coded;
        for (int64_t j = 0; j < a.coded; j += FP8_TILE, next += 4) {
            const float scale = store_tile(codes + j, x + j, std::min(FP8_TILE, a.coded - j));
            memcpy(next, &scale, 4);
        }
        for (int64_t j = a.coded; j < a.width; j++, next += 2) {
            uint16_t value;
            store_value(&value, load_value(x + j));
            memcpy(next, &value, 2);
        }
    });
}

inline void store_vector(float *to, Isa::Vector v) { Isa::store_any(to, v); }
inline void store_vector(uint16_t *to, Isa::Vector v) { Isa::store_bf16(to, v); }

// code · scale, multiplied in fp32 and rounded once. Scales are at least FP8_LEAST_ACTIVATION / 448, so nothing
// is subnormal in fp32, and codes are NaN only where the scale is not finite.
template <class T> void widen_tile(T *to, const char *codes, int64_t count, float scale) {
    const float by = std::isfinite(scale) ? scale * 256 : NAN;
    const Isa::Vector factor = Isa::broadcast(&by);
    int64_t j = 0;
    for (; j + Isa::WIDTH <= count; j += Isa::WIDTH)
        store_vector(to + j, Isa::multiply(Isa::load_fp8(codes + j), factor));
    if (j == count) return;
    char last[Isa::WIDTH] = {};
    T values[Isa::WIDTH];
    memcpy(last, codes + j, count - j);
    store_vector(values, Isa::multiply(Isa::load_fp8(last), factor));
    memcpy(to + j, values, sizeof(T) * (count - j));
}

// The cached row in a slot, as values.
template <class T> void widen_row(T *to, const PagedAttention &a, int64_t slot) {
    const int64_t coded = a.value_width;
    const char *codes = static_cast<const char *>(a.pages) + slot * fp8_row_bytes(coded, a.page_width),
               *next = codes + coded;
    for (int64_t j = 0; j < coded; j += FP8_TILE, next += 4) {
        float scale;
        memcpy(&scale, next, 4);
        widen_tile(to + j, codes + j, std::min(FP8_TILE, coded - j), scale);
    }
    if (sizeof(T) == 2) {
        memcpy(to + coded, next, 2 * (a.page_width - coded));
        return;
    }
    for (int64_t j = coded; j < a.page_width; j++, next += 2) {
        uint16_t value;
        memcpy(&value, next, 2);
        store_value(to + j, to_float(value));
    }
}

}  // namespace
