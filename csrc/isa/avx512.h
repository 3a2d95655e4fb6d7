// Vectors of AVX-512 F, BW, DQ, VL, with and without products of bf16 pairs (MOESTRO_HAS_BF16) and of int8
// quadruples (MOESTRO_HAS_VNNI).
#pragma once
#include "isa/steps8.h"

namespace {
struct Isa {
    static constexpr int WIDTH = 16, VECTORS = 4;
    static constexpr bool HAS_BF16 = MOESTRO_HAS_BF16, FETCH_CLOSE = false;
    using Vector = __m512;
    static Vector zero() { return _mm512_setzero_ps(); }
    static Vector load(const float *p) { return _mm512_load_ps(p); }
    static void store(float *p, Vector v) { _mm512_store_ps(p, v); }
    static Vector load_any(const void *p) { return _mm512_loadu_ps(p); }
    static void store_any(void *p, Vector v) { _mm512_storeu_ps(p, v); }
    static Vector load_steps(const uint32_t *p) { return _mm512_load_ps(p); }
    static Vector broadcast(const void *p) { return _mm512_set1_ps(step_as_float(p)); }
    static Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
    template <bool PAIRS> static Vector multiply_add(Vector c, Vector a, Vector b) {
#if MOESTRO_HAS_BF16
        if (PAIRS) return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#endif
        return _mm512_fmadd_ps(a, b, c);
    }
    // The two bf16 of every step, as floats.
    static Vector low_half(Vector v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(v), 16)); }
    static Vector high_half(Vector v) {
        return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(int(0xffff0000))));
    }

    using Integers = __m512i;
    static Integers load_codes(const char *p) { return _mm512_loadu_si512(p); }
    static Integers low_codes(Integers v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
    static Integers high_codes(Integers v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15)); }
    static Integers set(int value) { return _mm512_set1_epi32(value); }
    // Sums of a block: begin, then dot for every four unsigned codes w and signed codes x of a lane, then end; exact.
    // Without VNNI, eight products of 4-bit codes, 2 · 15 · 127 each, fit 16 bits and are widened at the end of a
    // block.
    static constexpr bool SHORT_SUMS = !MOESTRO_HAS_VNNI;
    template <int BITS> static Integers begin(int start) {
        return SHORT_SUMS && BITS == 4 ? _mm512_setzero_si512() : set(start);
    }
    template <int BITS> static Integers dot(Integers c, Integers w, Integers x) {
#if MOESTRO_HAS_VNNI
        return _mm512_dpbusd_epi32(c, w, x);
#else
        if (BITS == 4) return _mm512_add_epi16(c, _mm512_maddubs_epi16(w, x));
        const Integers even = _mm512_madd_epi16(_mm512_and_si512(w, _mm512_set1_epi16(255)),
                                                _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8));
        const Integers odd = _mm512_madd_epi16(_mm512_srli_epi16(w, 8), _mm512_srai_epi16(x, 8));
        return _mm512_add_epi32(c, _mm512_add_epi32(even, odd));
#endif
    }
    template <int BITS> static Integers end(Integers c, int start) {
        return SHORT_SUMS && BITS == 4 ? _mm512_add_epi32(_mm512_madd_epi16(c, _mm512_set1_epi16(1)), set(start)) : c;
    }
    static Vector to_float(Integers v) { return _mm512_cvtepi32_ps(v); }
    static Vector load_widened(const char *p) {  // WIDTH bf16
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    // E4M3 codes of WIDTH outputs, in groups of four outputs [k, k + 1][4] and then [k + 2, k + 3][4] -> their pairs of
    // bf16, WIDTH for k and WIDTH for k + 2.
    static void widen_codes(Vector &first, Vector &second, const char *codes) {
        const auto table = [](const uint8_t *t) { return _mm512_broadcast_i32x4(code_table(t)); };
        const __m512i w = _mm512_loadu_si512(codes);
        const __m512i nibble = _mm512_set1_epi8(15);
        const __m512i low = _mm512_and_si512(w, nibble), high = _mm512_and_si512(_mm512_srli_epi16(w, 4), nibble);
        const __mmask64 few = _mm512_testn_epi8_mask(w, _mm512_set1_epi8(0x70));
        const __m512i upper = _mm512_or_si512(_mm512_shuffle_epi8(table(UPPER_OF_HIGH), high),
                                              _mm512_maskz_shuffle_epi8(few, table(UPPER_OF_LOW), low));
        const __m512i lower = _mm512_mask_shuffle_epi8(
            _mm512_and_si512(_mm512_slli_epi16(w, 4), _mm512_set1_epi8(char(0xf0))), few, table(LOWER_OF_LOW), low);
        first = _mm512_castsi512_ps(_mm512_unpacklo_epi8(lower, upper));
        second = _mm512_castsi512_ps(_mm512_unpackhi_epi8(lower, upper));
    }
    static Vector load_fp8(const char *p) {  // times 2⁻⁸
        const __m256i shifted =
            _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))), 7);
        return _mm512_cvtph_ps(_mm256_and_si256(shifted, _mm256_set1_epi16(short(0xbf80))));
    }
    // Not for subnormal numbers, which the instruction takes for 0.
    static void store_bf16(uint16_t *p, Vector v) {
#if MOESTRO_HAS_BF16 && !MOESTRO_EMULATED
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), (__m256i)_mm512_cvtneps_pbh(v));
#else
        const __m256 low = _mm512_castps512_ps256(v), high = _mm512_extractf32x8_ps(v, 1);
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm256_set_m128i(round_to_bf16(high), round_to_bf16(low)));
#endif
    }
    static void transpose8(uint32_t *to, int64_t stride, const void *const *from) { transpose8_avx2(to, stride, from); }
};
}  // namespace
