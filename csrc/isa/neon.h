// Vectors of AArch64's NEON, two registers of 128 bits each, with and without products of int8 quadruples
// (MOESTRO_HAS_DOTPROD). bf16 is widened to fp32.
#pragma once
#if !MOESTRO_EMULATED  // by tests, in AVX2 (tests/ops/emulated_neon.h)
#include <arm_neon.h>
#endif

#include "isa/steps.h"

// Eight consecutive steps of a row, read and written at any address. bf16 is widened, or paired with the values of the
// next k.
struct Eight {
    uint32x4_t low, high;
};
inline Eight load8(const void *p) {
    const uint32_t *from = static_cast<const uint32_t *>(p);
    return {vld1q_u32(from), vld1q_u32(from + 4)};
}
inline void store8(void *p, Eight v) {
    uint32_t *to = static_cast<uint32_t *>(p);
    vst1q_u32(to, v.low);
    vst1q_u32(to + 4, v.high);
}
inline Eight widen8(const uint16_t *p) {
    const uint16x8_t v = vld1q_u16(p);
    return {vshlq_n_u32(vmovl_u16(vget_low_u16(v)), 16), vshlq_n_u32(vmovl_u16(vget_high_u16(v)), 16)};
}
inline Eight pair8(const uint16_t *p, const uint16_t *q) {
    const uint16x8_t a = vld1q_u16(p), b = vld1q_u16(q);
    return {vreinterpretq_u32_u16(vzip1q_u16(a, b)), vreinterpretq_u32_u16(vzip2q_u16(a, b))};
}

namespace {
struct Isa {
    static constexpr int WIDTH = 8, VECTORS = 2;
    static constexpr bool HAS_BF16 = false, FETCH_CLOSE = true;
    struct Vector {
        float32x4_t low, high;
    };
    static Vector zero() { return {vdupq_n_f32(0), vdupq_n_f32(0)}; }
    static Vector load(const float *p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
    static void store(float *p, Vector v) {
        vst1q_f32(p, v.low);
        vst1q_f32(p + 4, v.high);
    }
    static Vector load_any(const void *p) { return as_floats(load8(p)); }
    static void store_any(void *p, Vector v) { store8(p, as_steps(v)); }
    static Vector load_steps(const uint32_t *p) { return load_any(p); }
    static Vector broadcast(const void *p) {
        const float32x4_t value = vdupq_n_f32(step_as_float(p));
        return {value, value};
    }
    static Vector multiply(Vector a, Vector b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
    template <bool PAIRS> static Vector multiply_add(Vector c, Vector a, Vector b) {
        return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
    }
    static Vector low_half(Vector v) {
        const Eight bits = as_steps(v);
        return as_floats({vshlq_n_u32(bits.low, 16), vshlq_n_u32(bits.high, 16)});
    }
    static Vector high_half(Vector v) {
        const uint32x4_t upper = vdupq_n_u32(0xffff0000);
        const Eight bits = as_steps(v);
        return as_floats({vandq_u32(bits.low, upper), vandq_u32(bits.high, upper)});
    }

    struct Integers {
        int32x4_t low, high;
    };
    static Integers load_codes(const char *p) {
        const int8_t *from = reinterpret_cast<const int8_t *>(p);
        return {vreinterpretq_s32_s8(vld1q_s8(from)), vreinterpretq_s32_s8(vld1q_s8(from + 16))};
    }
    static Integers low_codes(Integers v) {
        const int32x4_t nibbles = vdupq_n_s32(0x0f0f0f0f);
        return {vandq_s32(v.low, nibbles), vandq_s32(v.high, nibbles)};
    }
    static Integers high_codes(Integers v) { return {upper_nibbles(v.low), upper_nibbles(v.high)}; }
    static Integers set(int value) { return {vdupq_n_s32(value), vdupq_n_s32(value)}; }
    // Sums of a block: begin, then dot for every four unsigned codes w and signed codes x of a lane, then end; exact.
    // Codes of 8 bits become signed numbers, so that nothing is left to subtract.
    template <int BITS> static Integers begin(int start) { return set(BITS == 4 ? start : 0); }
    template <int BITS> static Integers dot(Integers c, Integers w, Integers x) {
        return {dot4<BITS>(c.low, w.low, x.low), dot4<BITS>(c.high, w.high, x.high)};
    }
    template <int BITS> static Integers end(Integers c, int) { return c; }
    static Vector to_float(Integers v) { return {vcvtq_f32_s32(v.low), vcvtq_f32_s32(v.high)}; }
    static Vector load_widened(const char *p) { return as_floats(widen8(reinterpret_cast<const uint16_t *>(p))); }

    // E4M3 codes of WIDTH outputs, in groups of four outputs [k, k + 1][4] and then [k + 2, k + 3][4] -> their pairs of
    // bf16, WIDTH for k and WIDTH for k + 2.
    static void widen_codes(Vector &first, Vector &second, const char *codes) {
        widen_group(first.low, second.low, codes);
        widen_group(first.high, second.high, codes + 16);
    }
    static Vector load_fp8(const char *p) {  // times 2⁻⁸: sign, exponent and fraction where fp16 has them
        const int16x8_t shifted = vshll_n_s8(vld1_s8(reinterpret_cast<const int8_t *>(p)), 7);
        const uint16x8_t halves = vandq_u16(vreinterpretq_u16_s16(shifted), vdupq_n_u16(0xbf80));
        return {vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(halves))),
                vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(halves)))};
    }
    // To the nearest, ties to even; a NaN must have its last bits zero.
    static void store_bf16(uint16_t *p, Vector v) {
        const Eight bits = as_steps(v);
        vst1q_u16(p, vcombine_u16(round_half(bits.low), round_half(bits.high)));
    }
    // to[j · stride + i] = from[i][j] for i, j in 0 … 7.
    static void transpose8(uint32_t *to, int64_t stride, const void *const *from) {
        for (int i = 0; i < 8; i += 4)
            for (int j = 0; j < 8; j += 4) transpose4(to + j * stride + i, stride, from + i, j);
    }

private:
    static Vector as_floats(Eight v) { return {vreinterpretq_f32_u32(v.low), vreinterpretq_f32_u32(v.high)}; }
    static Eight as_steps(Vector v) { return {vreinterpretq_u32_f32(v.low), vreinterpretq_u32_f32(v.high)}; }
    static int32x4_t upper_nibbles(int32x4_t v) { return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(v), 4)); }
    template <int BITS> static int32x4_t dot4(int32x4_t c, int32x4_t w, int32x4_t x) {
        const int8x16_t codes = vreinterpretq_s8_s32(BITS == 4 ? w : veorq_s32(w, vdupq_n_s32(int(0x80808080))));
        const int8x16_t row = vreinterpretq_s8_s32(x);
#if MOESTRO_HAS_DOTPROD
        return vdotq_s32(c, codes, row);
#else  // 2 · 128 · 127 fits 16 bits
        const int16x8_t low = vmull_s8(vget_low_s8(codes), vget_low_s8(row)),
                        high = vmull_s8(vget_high_s8(codes), vget_high_s8(row));
        return vpadalq_s16(c, vpaddq_s16(low, high));
#endif
    }
    static void widen_group(float32x4_t &first, float32x4_t &second, const char *codes) {
        const uint8x16_t w = vld1q_u8(reinterpret_cast<const uint8_t *>(codes));
        const uint8x16_t low = vandq_u8(w, vdupq_n_u8(15)), high = vshrq_n_u8(w, 4);
        const uint8x16_t few = vceqq_u8(vandq_u8(w, vdupq_n_u8(0x70)), vdupq_n_u8(0));
        const uint8x16_t upper =
            vorrq_u8(vqtbl1q_u8(vld1q_u8(UPPER_OF_HIGH), high), vandq_u8(few, vqtbl1q_u8(vld1q_u8(UPPER_OF_LOW), low)));
        const uint8x16_t lower = vbslq_u8(few, vqtbl1q_u8(vld1q_u8(LOWER_OF_LOW), low), vshlq_n_u8(w, 4));
        first = vreinterpretq_f32_u8(vzip1q_u8(lower, upper));
        second = vreinterpretq_f32_u8(vzip2q_u8(lower, upper));
    }
    static uint16x4_t round_half(uint32x4_t bits) {
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        return vshrn_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
    }
    // to[j · stride + i] = from[i][first + j] for i, j in 0 … 3.
    static void transpose4(uint32_t *to, int64_t stride, const void *const *from, int first) {
        uint32x4_t r[4];
        for (int i = 0; i < 4; i++) r[i] = vld1q_u32(static_cast<const uint32_t *>(from[i]) + first);
        const uint32x4_t even = vzip1q_u32(r[0], r[2]), even_high = vzip2q_u32(r[0], r[2]);
        const uint32x4_t odd = vzip1q_u32(r[1], r[3]), odd_high = vzip2q_u32(r[1], r[3]);
        vst1q_u32(to, vzip1q_u32(even, odd));
        vst1q_u32(to + stride, vzip2q_u32(even, odd));
        vst1q_u32(to + 2 * stride, vzip1q_u32(even_high, odd_high));
        vst1q_u32(to + 3 * stride, vzip2q_u32(even_high, odd_high));
    }
};
}  // namespace
