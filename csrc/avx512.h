// The vector of AVX-512, with and without products of bf16 pairs.
#pragma once
#include "avx2.h"

namespace {
struct Isa {
    static constexpr int WIDTH = 16, VECTORS = 4;
    static constexpr bool HAS_BF16 = MOESTRO_HAS_BF16;
    using Vector = __m512;
    static Vector zero() { return _mm512_setzero_ps(); }
    static Vector load(const float *p) { return _mm512_load_ps(p); }
    static void store(float *p, Vector v) { _mm512_store_ps(p, v); }
    static Vector load_steps(const uint32_t *p) { return _mm512_load_ps(p); }
    static Vector broadcast(const uint32_t *p) { return _mm512_set1_ps(step_as_float(p)); }
    template <bool PAIRS> static Vector multiply_add(Vector c, Vector a, Vector b) {
#if MOESTRO_HAS_BF16
        if (PAIRS) return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#endif
        return _mm512_fmadd_ps(a, b, c);
    }
    static void transpose8(uint32_t *to, int64_t stride, const void *from, int64_t bytes) { transpose8_avx2(to, stride, from, bytes); }
};
}  // namespace
