// Shared by all machines with AVX2: eight steps at once, and transposing eight rows of eight steps.
#pragma once
#include <immintrin.h>

#include "isa/steps.h"

// Eight consecutive steps of a row, read and written at any address. bf16 is widened, or paired with the values of the
// next k.
using Eight = __m256i;
inline Eight load8(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }
inline void store8(void *p, Eight v) { _mm256_storeu_si256(static_cast<__m256i *>(p), v); }
inline Eight widen8(const uint16_t *p) {
    return _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))), 16);
}
inline Eight pair8(const uint16_t *p, const uint16_t *q) {
    const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p)),
                  b = _mm_loadu_si128(reinterpret_cast<const __m128i *>(q));
    return _mm256_set_m128i(_mm_unpackhi_epi16(a, b), _mm_unpacklo_epi16(a, b));
}

// Eight E4M3 codes as floats times 2⁻⁸: sign, exponent and fraction are put where fp16 has them. NaN is not known.
inline __m256 halves_of_fp8(const char *p) {
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(p));
    const __m128i shifted = _mm_slli_epi16(_mm_cvtepi8_epi16(codes), 7);
    return _mm256_cvtph_ps(_mm_and_si128(shifted, _mm_set1_epi16(short(0xbf80))));
}

// To the nearest bf16, ties to even; a NaN must have its last bits zero.
inline __m128i round_to_bf16(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i high = _mm256_srli_epi32(up, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

// to[j · to_stride + i] = from[i][j] for i, j in 0 … 7.
inline void transpose8_avx2(uint32_t *to, int64_t to_stride, const void *const *from) {
    __m256 r[8], t[8];
    for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(static_cast<const float *>(from[i]));
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(reinterpret_cast<float *>(to + i * to_stride), _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(reinterpret_cast<float *>(to + (i + 4) * to_stride),
                         _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
}

// One of steps.h's tables.
inline __m128i code_table(const uint8_t *table) { return _mm_load_si128(reinterpret_cast<const __m128i *>(table)); }
