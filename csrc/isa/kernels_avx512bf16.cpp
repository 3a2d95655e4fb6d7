// AVX-512 with vdpbf16ps and vpdpbusd.
#define MOESTRO_HAS_BF16 1
#define MOESTRO_HAS_VNNI 1
#include "isa/avx512.h"
#define KERNELS kernels_avx512bf16
#include "isa/kernels.h"
