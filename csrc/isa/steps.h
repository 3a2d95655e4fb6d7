// Shared by all instruction sets: reading a step, and the tables that widen E4M3.
#pragma once
#include <cstdint>
#include <cstring>

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

// E4M3 -> bf16, exact, by nibbles. For exponents 0 and 1 the low nibble decides both bytes of the result; for others
// the high nibble decides the upper byte (sign, exponent + 120 over 2), and the lower byte is the low nibble · 16.
alignas(16) constexpr uint8_t UPPER_OF_HIGH[16] = {0x00, 0x3d, 0x3e, 0x3f, 0x40, 0x41, 0x42, 0x43,
                                                   0x80, 0xbd, 0xbe, 0xbf, 0xc0, 0xc1, 0xc2, 0xc3};
alignas(16) constexpr uint8_t UPPER_OF_LOW[16] = {0x00, 0x3b, 0x3b, 0x3b, 0x3c, 0x3c, 0x3c, 0x3c,
                                                  0x3c, 0x3c, 0x3c, 0x3c, 0x3c, 0x3c, 0x3c, 0x3c};
alignas(16) constexpr uint8_t LOWER_OF_LOW[16] = {0x00, 0x00, 0x80, 0xc0, 0x00, 0x20, 0x40, 0x60,
                                                  0x80, 0x90, 0xa0, 0xb0, 0xc0, 0xd0, 0xe0, 0xf0};
