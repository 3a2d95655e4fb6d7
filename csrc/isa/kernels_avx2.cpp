// AVX2 and FMA.
#define MOESTRO_HAS_VNNI 0
#include "isa/avx2.h"
#define KERNELS kernels_avx2
#include "isa/kernels.h"
