// Packs weights into panels, bit for bit as moestro/ops/serving/formats.py specifies.
#pragma once
#include <numeric>

#include "serving/packed.h"

namespace {

constexpr float LEAST_SCALE = 1e-37f;  // whose inverse is finite
constexpr int WORDS = 16;              // of four bytes, the most that a row has in a piece of a panel

// A piece of a panel: LENGTH of k, words [k of a word][PANEL], then the scales of codes.
template <int KIND> constexpr int64_t LENGTH = KIND == MOESTRO_KIND_FP32 ? 16 : KIND == MOESTRO_KIND_INT8 ? 64 : 32;
template <int KIND> constexpr bool CODED = KIND == MOESTRO_KIND_INT8 || KIND == MOESTRO_KIND_INT4;
template <int KIND> constexpr int64_t words_of(int64_t count) {
    return KIND == MOESTRO_KIND_FP32   ? count
           : KIND == MOESTRO_KIND_BF16 ? (count + 1) / 2
           : KIND == MOESTRO_KIND_INT8 ? 16
                                       : 4;
}
template <int KIND> constexpr int64_t bytes_of(int64_t count) {
    return (words_of<KIND>(count) * 4 + (CODED<KIND> ? 2 : 0)) * PANEL;
}

inline float inverse_of(float scale) { return std::fabs(scale) > LEAST_SCALE ? 1.0f / scale : 0.0f; }
inline float code_of(float value, float inverse, float least, float most) {
    const float code = std::nearbyint(value * inverse);
    return code > least ? std::min(code, most) : least;  // least for NaN, too
}

// Writes a row's words of a piece from v [LENGTH], padded with zeros, and returns its scale in bf16. Least is at most 0
// and largest at least 0, which changes nothing: if all values of a block have one sign, the other end is not used.
template <int KIND> inline uint16_t make_words(uint32_t *words, const float *v) {
    constexpr int64_t N = LENGTH<KIND>;
    if constexpr (KIND == MOESTRO_KIND_FP32) {
        memcpy(words, v, sizeof(float) * N);
        return 0;
    } else if constexpr (KIND == MOESTRO_KIND_BF16) {
        for (int64_t i = 0; i < N / 2; i++) words[i] = to_bf16(v[2 * i]) | uint32_t(to_bf16(v[2 * i + 1])) << 16;
        return 0;
    } else {
        uint8_t codes[N];
        if constexpr (KIND == MOESTRO_KIND_INT8) {
            int32_t bits[N], most = 0;  // bits of magnitudes: NaN is the largest of all
            memcpy(bits, v, sizeof bits);
            for (int64_t i = 0; i < N; i++) most = std::max(most, bits[i] & 0x7fffffff);
            float largest;
            memcpy(&largest, &most, 4);
            const uint16_t scale = to_bf16(largest / 127.0f);
            const float inverse = inverse_of(to_float(scale));
            for (int64_t i = 0; i < N; i++) codes[i] = uint8_t(128 + int(code_of(v[i], inverse, -127, 127)));
            memcpy(words, codes, N);
            return scale;
        } else {
            static_assert(KIND == MOESTRO_KIND_INT4);
            constexpr int LANES = 8;
            float low[LANES] = {}, high[LANES] = {};
            for (int64_t i = 0; i < N; i += LANES)
#pragma omp simd
                for (int l = 0; l < LANES; l++) {
                    low[l] = v[i + l] < low[l] ? v[i + l] : low[l];
                    high[l] = v[i + l] > high[l] ? v[i + l] : high[l];
                }
            const float least = *std::min_element(low, low + LANES), most = *std::max_element(high, high + LANES);
            const float scale = (-least > most ? least : most) / -8.0f, inverse = inverse_of(scale);
            double fits[LANES] = {};  // exact in any order: multiples of 2^-24, sums below 2^12
            int32_t squares = 0;
            for (int64_t i = 0; i < N; i += LANES)
#pragma omp simd
                for (int l = 0; l < LANES; l++) {
                    const float code = code_of(v[i + l], inverse, -8, 7);
                    fits[l] += double(v[i + l] * inverse * code);
                    codes[i + l] = uint8_t(8 + int32_t(code));
                }
            for (int64_t i = 0; i < N; i++) squares += (codes[i] - 8) * (codes[i] - 8);
            const float fit = float(std::accumulate(fits, fits + LANES, 0.0));
            for (int64_t i = 0; i < N / 2; i++) codes[i] = uint8_t(codes[i] | codes[N / 2 + i] << 4);
            memcpy(words, codes, N / 2);
            return to_bf16(scale * (fit / float(std::max(squares, 1))) + 0.0f);  // no -0
        }
    }
}

// The first `length` of N values, padded with zeros.
template <int64_t N, class T> inline void load_values(float *v, const T *x, int64_t length) {
    if (length == N) {
        for (int64_t i = 0; i < N; i++) v[i] = load_value(x + i);
    } else {
        for (int64_t i = 0; i < N; i++) v[i] = i < length ? load_value(x + i) : 0.0f;
    }
}

// Rows [count ≤ PANEL][k] -> one panel, eight rows at a time: as many as the processor prefetches side by side.
template <int KIND, class T> void pack_panel_of(char *to, const T *x, int64_t count, int64_t k) {
    for (int64_t row = 0; row < PANEL; row += 8) {
        char *piece = to;
        for (int64_t first = 0; first < k; first += LENGTH<KIND>) {
            const int64_t length = std::min(LENGTH<KIND>, k - first), words = words_of<KIND>(length);
            uint32_t of_rows[8][WORDS] = {}, turned[WORDS][8];
            uint16_t scales[8];
            for (int64_t r = 0; r < 8; r++) {
                const T *from = x + (row + r) * k + first;
                const int64_t own = row + r < count ? length : 0;
                if (KIND == MOESTRO_KIND_BF16 && sizeof(T) == 2) {
                    memcpy(of_rows[r], from, own * sizeof(T));
                    continue;
                }
                float v[LENGTH<KIND>];
                load_values<LENGTH<KIND>>(v, from, own);
                scales[r] = make_words<KIND>(of_rows[r], v);
            }
            for (int64_t w = 0; w < words; w += 8) {
                const void *from[8];
                for (int i = 0; i < 8; i++) from[i] = of_rows[i] + w;
                Isa::transpose8(turned[w], 8, from);
            }
            for (int64_t w = 0; w < words; w++) memcpy(piece + (w * PANEL + row) * 4, turned[w], sizeof turned[w]);
            if (CODED<KIND>) memcpy(piece + words * PANEL * 4 + row * 2, scales, sizeof scales);
            piece += bytes_of<KIND>(length);
        }
    }
}

template <int KIND, class T> void pack_panels(char *to, const T *x, int64_t m, int64_t k, int threads) {
    const int64_t whole = k / LENGTH<KIND>, rest = k % LENGTH<KIND>;
    const int64_t bytes = whole * bytes_of<KIND>(LENGTH<KIND>) + (rest ? bytes_of<KIND>(rest) : 0);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t p = 0; p < panels_of(m); p++)
        pack_panel_of<KIND>(to + p * bytes, x + p * PANEL * k, std::min<int64_t>(PANEL, m - p * PANEL), k);
}

template <class T> int pack_panels(char *to, const T *x, int64_t m, int64_t k, int kind, int threads) {
    switch (kind) {
        case MOESTRO_KIND_FP32: pack_panels<MOESTRO_KIND_FP32>(to, x, m, k, threads); break;
        case MOESTRO_KIND_BF16: pack_panels<MOESTRO_KIND_BF16>(to, x, m, k, threads); break;
        case MOESTRO_KIND_INT8: pack_panels<MOESTRO_KIND_INT8>(to, x, m, k, threads); break;
        case MOESTRO_KIND_INT4: pack_panels<MOESTRO_KIND_INT4>(to, x, m, k, threads); break;
        default: return MOESTRO_BAD_TYPE;
    }
    return MOESTRO_OK;
}

}  // namespace
