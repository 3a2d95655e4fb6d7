// AVX2 and FMA. bf16 is widened to fp32.
#include "avx2.h"

namespace {
struct Isa {
    static constexpr int WIDTH = 8, VECTORS = 2;
    static constexpr bool HAS_BF16 = false;
    using Vector = __m256;
    static Vector zero() { return _mm256_setzero_ps(); }
    static Vector load(const float *p) { return _mm256_load_ps(p); }
    static void store(float *p, Vector v) { _mm256_store_ps(p, v); }
    static Vector load_steps(const uint32_t *p) { return _mm256_load_ps(reinterpret_cast<const float *>(p)); }
    static Vector broadcast(const uint32_t *p) { return _mm256_set1_ps(step_as_float(p)); }
    template <bool PAIRS> static Vector multiply_add(Vector c, Vector a, Vector b) { return _mm256_fmadd_ps(a, b, c); }
    static void transpose8(uint32_t *to, int64_t stride, const void *from, int64_t bytes) { transpose8_avx2(to, stride, from, bytes); }
};
}  // namespace

#define KERNELS kernels_avx2
#include "experts.h"
