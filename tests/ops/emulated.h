// AVX-512 and AVX-VNNI in AVX2, through SIMDe, so that machines without it can test its paths: forced into each kernels_*.cpp (g++ -include).
#pragma once
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

// What SIMDe 0.7.4, that of Debian 12, lacks or gets wrong.
inline __m512i emulated_madd(__m512i a, __m512i b) {
    simde__m512i_private x = simde__m512i_to_private(a), y = simde__m512i_to_private(b);
    for (int i = 0; i < 2; i++) x.m256i[i] = _mm256_madd_epi16(x.m256i[i], y.m256i[i]);
    return simde__m512i_from_private(x);
}
inline __m512 emulated_to_float(__m512i v) {
    simde__m512i_private x = simde__m512i_to_private(v);
    simde__m512_private to;
    for (int i = 0; i < 2; i++) to.m256[i] = _mm256_cvtepi32_ps(x.m256i[i]);
    return simde__m512_from_private(to);
}
inline __m512i emulated_widen(__m256i v) {
    simde__m512i_private to;
    to.m256i[0] = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(v));
    to.m256i[1] = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(v, 1));
    return simde__m512i_from_private(to);
}
inline __m512 emulated_halves(__m256i v) {
    simde__m512_private to;
    to.m256[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(v));
    to.m256[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1));
    return simde__m512_from_private(to);
}
inline __m256 emulated_half(__m512 v, int which) { return simde__m512_to_private(v).m256[which]; }
#undef _mm512_madd_epi16
#define _mm512_madd_epi16 emulated_madd
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps emulated_to_float
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 emulated_widen
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps emulated_halves
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps emulated_half
#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32
