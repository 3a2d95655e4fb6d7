// AVX-512 with vdpbf16ps.
#define MOESTRO_HAS_BF16 1
#include "avx512.h"
#define KERNELS kernels_avx512bf16
#include "experts.h"
