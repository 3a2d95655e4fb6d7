// AVX2 and FMA with the vpdpbusd of AVX-VNNI.
#define MOESTRO_HAS_VNNI 1
#include "isa/avx2.h"
#define KERNELS kernels_avxvnni
#include "isa/kernels.h"
