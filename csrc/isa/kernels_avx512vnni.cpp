// AVX-512 with vpdpbusd. bf16 is widened to fp32.
#define MOESTRO_HAS_BF16 0
#define MOESTRO_HAS_VNNI 1
#include "isa/avx512.h"
#define KERNELS kernels_avx512vnni
#include "isa/kernels.h"
