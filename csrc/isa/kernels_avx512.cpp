// AVX-512 without vpdpbusd. bf16 is widened to fp32.
#define MOESTRO_HAS_BF16 0
#define MOESTRO_HAS_VNNI 0
#include "isa/avx512.h"
#define KERNELS kernels_avx512
#include "isa/kernels.h"
