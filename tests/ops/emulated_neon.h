// NEON in AVX2, through SIMDe, so that x86-64 can test its paths: forced into kernels_neon*.cpp (g++ -include).
#pragma once
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/arm/neon.h>
