// FP8 numbers and the scales of their blocks, as moestro/ops/fp8.py specifies them.
#pragma once
#include <cfloat>

#include "abi/table.h"
#include "math/gemm.h"

namespace {

constexpr float FP8_LEAST_ACTIVATION = 1e-4f;  // DeepSeek's floor under the largest magnitude of a tile in inference

inline uint32_t bits_of(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}
inline float float_of(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}

// A format with so many fraction bits, whose least normal value is 2^EMIN and whose largest value is MOST.
template <int FRACTION, int EMIN, int MOST> struct Fp8Format {
    static constexpr float LARGEST = MOST;
    // The nearest value, ties to even, with another number's sign; |x| is at most a rounding above the largest one.
    static float round(float x, float sign) {
        constexpr int CUT = 23 - FRACTION;
        constexpr uint32_t HALF = (1u << (CUT - 1)) - 1, KEEP = ~((1u << CUT) - 1), LEAST = uint32_t(EMIN + 127) << 23;
        const float big = float_of(uint32_t(EMIN - FRACTION + 23 + 127) << 23);
        const uint32_t magnitude = bits_of(x) & 0x7fffffff;
        const uint32_t normal = (magnitude + HALF + ((magnitude >> CUT) & 1)) & KEEP;
        const uint32_t small = bits_of((float_of(magnitude) + big) - big);
        const uint32_t rounded = magnitude > 0x7f800000 ? 0x7fc00000 : magnitude < LEAST ? small : normal;
        return float_of(rounded | (bits_of(sign) & 0x80000000));
    }
};
using E4M3 = Fp8Format<3, -6, 448>;
using E5M6 = Fp8Format<6, -14, 65024>;

// The byte of an E4M3 value.
inline uint8_t to_e4m3(float x) {
    const uint32_t u = bits_of(x), magnitude = u & 0x7fffffff;
    const uint32_t normal = (magnitude >> 20) - (120 << 3), small = uint32_t(float_of(magnitude) * 512.0f);
    const uint32_t code = magnitude > 0x7f800000 ? 0x7f : magnitude < 0x3c800000 ? small : normal;
    return uint8_t(code | u >> 31 << 7);
}

inline float from_e4m3(uint8_t code) {
    const uint32_t magnitude = code & 0x7f;
    const uint32_t normal = (magnitude << 20) + (120u << 23), small = bits_of(float(int(magnitude)) * 0x1p-9f);
    const uint32_t value = magnitude == 0x7f ? 0x7fc00000 : magnitude < 8 ? small : normal;
    return float_of(value | uint32_t(code & 0x80) << 24);
}

// The scale of a block from the bits of its largest magnitude (moestro/ops/fp8.py: choose_scales).
inline float choose_scale(uint32_t magnitude, float largest, bool power_of_two) {
    float scale = float_of(magnitude) / largest;
    if (scale < FLT_MIN) scale = 1.0f;
    const uint32_t u = bits_of(scale), up = u & 0x7fffff ? 1u << 23 : 0;
    return power_of_two && scale < INFINITY ? float_of((u + up) & 0xff800000) : scale;
}

}  // namespace
