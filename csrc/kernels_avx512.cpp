// AVX-512 F, BW, DQ, VL. bf16 is widened to fp32.
#define MOESTRO_HAS_DOT 0
#include "avx512.h"
#define KERNELS kernels_avx512
#include "kernels.h"
