// Shared by all machines with AVX2: reading a step, and transposing eight rows of eight steps.
#pragma once
#include <cstdint>
#include <cstring>
#include <immintrin.h>

// A step of a row of bf16 may lie at any even address.
inline float step_as_float(const void *p) {
    float f;
    memcpy(&f, p, 4);
    return f;
}

// Four codes of a row of int8.
inline int step_as_int(const void *p) {
    int i;
    memcpy(&i, p, 4);
    return i;
}

// Eight consecutive steps of a row. bf16 is widened, or paired with the values of the next k.
inline __m256i widen8(const uint16_t *p) {
    return _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))), 16);
}
inline __m256i pair8(const uint16_t *p, const uint16_t *q) {
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

// E4M3 -> bf16, exact, by nibbles. For exponents 0 and 1 the low nibble decides both bytes of the result; for others
// the high nibble decides the upper byte (sign, exponent + 120 over 2), and the lower byte is the low nibble · 16.
alignas(16) constexpr uint8_t UPPER_OF_HIGH[16] = {0x00, 0x3d, 0x3e, 0x3f, 0x40, 0x41, 0x42, 0x43,
                                                   0x80, 0xbd, 0xbe, 0xbf, 0xc0, 0xc1, 0xc2, 0xc3};
alignas(16) constexpr uint8_t UPPER_OF_LOW[16] = {0x00, 0x3b, 0x3b, 0x3b, 0x3c, 0x3c, 0x3c, 0x3c,
                                                  0x3c, 0x3c, 0x3c, 0x3c, 0x3c, 0x3c, 0x3c, 0x3c};
alignas(16) constexpr uint8_t LOWER_OF_LOW[16] = {0x00, 0x00, 0x80, 0xc0, 0x00, 0x20, 0x40, 0x60,
                                                  0x80, 0x90, 0xa0, 0xb0, 0xc0, 0xd0, 0xe0, 0xf0};
inline __m128i code_table(const uint8_t *table) { return _mm_load_si128(reinterpret_cast<const __m128i *>(table)); }
