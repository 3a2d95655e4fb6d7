// Vectors of AVX2 and FMA, with and without products of int8 quadruples (MOESTRO_HAS_VNNI). bf16 is widened to fp32.
#pragma once
#include "isa/steps8.h"

namespace {
struct Isa {
    static constexpr int WIDTH = 8, VECTORS = 2;
    static constexpr bool HAS_BF16 = false, FETCH_CLOSE = true;
    using Vector = __m256;
    static Vector zero() { return _mm256_setzero_ps(); }
    static Vector load(const float *p) { return _mm256_load_ps(p); }
    static void store(float *p, Vector v) { _mm256_store_ps(p, v); }
    static Vector load_any(const void *p) { return _mm256_loadu_ps(static_cast<const float *>(p)); }
    static void store_any(void *p, Vector v) { _mm256_storeu_ps(static_cast<float *>(p), v); }
    static Vector load_steps(const uint32_t *p) { return _mm256_load_ps(reinterpret_cast<const float *>(p)); }
    static Vector broadcast(const void *p) { return _mm256_set1_ps(step_as_float(p)); }
    static Vector multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
    template <bool PAIRS> static Vector multiply_add(Vector c, Vector a, Vector b) { return _mm256_fmadd_ps(a, b, c); }
    static Vector low_half(Vector v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(v), 16)); }
    static Vector high_half(Vector v) {
        return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(int(0xffff0000))));
    }

    using Integers = __m256i;
    static Integers load_codes(const char *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }
    static Integers low_codes(Integers v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
    static Integers high_codes(Integers v) { return _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15)); }
    static Integers set(int value) { return _mm256_set1_epi32(value); }
    // Sums of a block: begin, then dot for every four unsigned codes w and signed codes x of a lane, then end; exact.
#if MOESTRO_HAS_VNNI
    template <int BITS> static Integers begin(int start) { return set(start); }
    template <int BITS> static Integers dot(Integers c, Integers w, Integers x) {
        return _mm256_dpbusd_avx_epi32(c, w, x);
    }
    template <int BITS> static Integers end(Integers c, int) { return c; }
#else
    // 8-bit codes: signed weights times |x|, the sign of x moved to the weight; 2 · 127 · 127 fits 16 bits. 4-bit
    // codes: eight products of 2 · 15 · 127 fit 16 bits, so the sums of a block are widened at its end.
    template <int BITS> static Integers begin(int) { return _mm256_setzero_si256(); }
    template <int BITS> static Integers dot(Integers c, Integers w, Integers x) {
        if (BITS == 4) return _mm256_add_epi16(c, _mm256_maddubs_epi16(w, x));
        const Integers code = _mm256_xor_si256(w, _mm256_set1_epi8(char(128)));
        return _mm256_add_epi32(c, sum_pairs(_mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(code, x))));
    }
    template <int BITS> static Integers end(Integers c, int start) {
        return BITS == 4 ? _mm256_add_epi32(sum_pairs(c), set(start)) : c;
    }
    static Integers sum_pairs(Integers v) { return _mm256_madd_epi16(v, _mm256_set1_epi16(1)); }
#endif
    static Vector to_float(Integers v) { return _mm256_cvtepi32_ps(v); }
    static Vector load_widened(const char *p) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
    // E4M3 codes of WIDTH outputs, in groups of four outputs [k, k + 1][4] and then [k + 2, k + 3][4] -> their pairs of
    // bf16, WIDTH for k and WIDTH for k + 2.
    static void widen_codes(Vector &first, Vector &second, const char *codes) {
        const auto table = [](const uint8_t *t) { return _mm256_broadcastsi128_si256(code_table(t)); };
        const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(codes)), nibble = _mm256_set1_epi8(15);
        const __m256i low = _mm256_and_si256(w, nibble), high = _mm256_and_si256(_mm256_srli_epi16(w, 4), nibble);
        const __m256i few = _mm256_cmpeq_epi8(_mm256_and_si256(w, _mm256_set1_epi8(0x70)), _mm256_setzero_si256());
        const __m256i upper = _mm256_or_si256(_mm256_shuffle_epi8(table(UPPER_OF_HIGH), high),
                                              _mm256_and_si256(few, _mm256_shuffle_epi8(table(UPPER_OF_LOW), low)));
        const __m256i lower =
            _mm256_blendv_epi8(_mm256_and_si256(_mm256_slli_epi16(w, 4), _mm256_set1_epi8(char(0xf0))),
                               _mm256_shuffle_epi8(table(LOWER_OF_LOW), low), few);
        first = _mm256_castsi256_ps(_mm256_unpacklo_epi8(lower, upper));
        second = _mm256_castsi256_ps(_mm256_unpackhi_epi8(lower, upper));
    }
    static Vector load_fp8(const char *p) { return halves_of_fp8(p); }
    static void store_bf16(uint16_t *p, Vector v) {
        _mm_storeu_si128(reinterpret_cast<__m128i *>(p), round_to_bf16(v));
    }
    static void transpose8(uint32_t *to, int64_t stride, const void *const *from) { transpose8_avx2(to, stride, from); }
};
}  // namespace
