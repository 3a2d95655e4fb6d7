// The instruction sets that were built for this kind of CPU, and whether this one runs them.
#pragma once
#include "abi/table.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

extern const Kernels kernels_avx2, kernels_avxvnni, kernels_avx512, kernels_avx512vnni, kernels_avx512bf16,
    kernels_neon, kernels_neondot;

namespace {

struct Choice {
    const char *name;
    const Kernels *kernels;
    bool (*runs)();
};

#if defined(__x86_64__)

struct Registers {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned sub) {
    Registers r;
    if (__get_cpuid_max(0, nullptr) >= leaf) __cpuid_count(leaf, sub, r.eax, r.ebx, r.ecx, r.edx);
    return r;
}

bool bit(unsigned word, int index) { return word >> index & 1; }

// Registers that the operating system saves: bits of XCR0.
uint64_t saved_state() {
    if (!bit(cpuid(1, 0).ecx, 27)) return 0;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t(high) << 32 | low;
}

bool runs_avx2() {
    const Registers one = cpuid(1, 0), seven = cpuid(7, 0);
    return (saved_state() & 0x6) == 0x6 && bit(one.ecx, 12) && bit(one.ecx, 28) && bit(one.ecx, 29) &&
           bit(seven.ebx, 5);
}

#if MOESTRO_EMULATED  // by tests, in AVX2 (tests/ops/emulated.h, emulated_neon.h)
bool runs_avxvnni() { return runs_avx2(); }
bool runs_avx512() { return runs_avx2(); }
bool runs_avx512vnni() { return runs_avx2(); }
bool runs_avx512bf16() { return runs_avx2(); }
#else
bool runs_avxvnni() { return runs_avx2() && bit(cpuid(7, 1).eax, 4); }

bool runs_avx512() {
    const unsigned ebx = cpuid(7, 0).ebx;
    return runs_avx2() && (saved_state() & 0xe6) == 0xe6 && bit(ebx, 16) && bit(ebx, 17) && bit(ebx, 30) &&
           bit(ebx, 31);
}

bool runs_avx512vnni() { return runs_avx512() && bit(cpuid(7, 0).ecx, 11); }
bool runs_avx512bf16() { return runs_avx512vnni() && bit(cpuid(7, 1).eax, 5); }
#endif

const Choice CHOICES[] = {
// the best one first; a compiler that is too old leaves some out (setup.py)
#ifndef MOESTRO_WITHOUT_AVX512BF16
    {"avx512bf16", &kernels_avx512bf16, runs_avx512bf16},
#endif
#ifndef MOESTRO_WITHOUT_AVX512VNNI
    {"avx512vnni", &kernels_avx512vnni, runs_avx512vnni},
#endif
#ifndef MOESTRO_WITHOUT_AVX512
    {"avx512", &kernels_avx512, runs_avx512},
#endif
#ifndef MOESTRO_WITHOUT_AVXVNNI
    {"avxvnni", &kernels_avxvnni, runs_avxvnni},
#endif
    {"avx2", &kernels_avx2, runs_avx2},
#if MOESTRO_EMULATES_NEON
    {"neondot", &kernels_neondot, runs_avx2},
    {"neon", &kernels_neon, runs_avx2},
#endif
};

#else

bool runs_neon() { return true; }

bool runs_neondot() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
    int has = 0;
    size_t size = sizeof has;
    return !sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) && has;
#else
    return false;
#endif
}

const Choice CHOICES[] = {
#ifndef MOESTRO_WITHOUT_NEONDOT
    {"neondot", &kernels_neondot, runs_neondot},
#endif
    {"neon", &kernels_neon, runs_neon},
};

#endif

}  // namespace
