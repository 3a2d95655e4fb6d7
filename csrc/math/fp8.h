// E4M3 numbers, as moestro/ops/fp8.py specifies them.
#pragma once
#include "abi/table.h"
#include "math/gemm.h"

namespace {

constexpr float FP8_LARGEST = 448.0f;          // of a code
constexpr float FP8_LEAST_ACTIVATION = 1e-4f;  // DeepSeek's floor under the largest magnitude of a tile in inference
constexpr float FP8_LEAST_NORMAL = 1.17549435e-38f;  // of a scale; below, the block counts as zeros

// The nearest E4M3 number, ties to even, at most 448; NaN stays NaN.
inline float round_e4m3(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t sign = bits & 0x80000000;
    const float magnitude = std::fabs(x);
    const uint32_t wide = bits & 0x7fffffff, near = (wide + 0x7ffff + ((wide >> 20) & 1)) & 0xfff00000;
    const float few = (magnitude + 24576.0f) - 24576.0f;  // to multiples of 2^-9, below 2^-6
    float many;
    memcpy(&many, &near, 4);
    const float most = magnitude < 0.015625f ? few : many < FP8_LARGEST ? many : FP8_LARGEST;
    uint32_t result;
    memcpy(&result, magnitude == magnitude ? &most : &x, 4);
    result |= sign;
    float value;
    memcpy(&value, &result, 4);
    return value;
}

// To the nearest E4M3, ties to even; beyond its range and NaN: NaN.
inline uint8_t to_e4m3(float v) {
    uint32_t bits, small;
    memcpy(&bits, &v, 4);
    const uint32_t sign = bits >> 24 & 0x80, size = bits & 0x7fffffff;
    float f;
    memcpy(&f, &size, 4);
    f += 16384.0f;  // whose last place is the least subnormal
    memcpy(&small, &f, 4);
    small -= 0x46800000;
    const uint32_t normal = (size + 0x7ffff + (size >> 20 & 1) - (120u << 23)) >> 20;
    const uint32_t code = size < 121u << 23 ? small : size < 0x43f00000 ? normal : 0x7f;
    return uint8_t(code | sign);
}

// The scale of a block whose largest magnitude is `largest`.
inline float scale_e4m3(float largest) {
    const float scale = largest / FP8_LARGEST;
    return scale < FP8_LEAST_NORMAL ? 1.0f : scale;
}

}  // namespace
