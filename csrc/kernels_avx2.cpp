// AVX2 and FMA.
#define MOESTRO_HAS_VNNI 0
#include "avx2.h"
#define KERNELS kernels_avx2
#include "kernels.h"
