// AArch64, every CPU of it.
#define MOESTRO_HAS_DOTPROD 0
#include "isa/neon.h"
#define KERNELS kernels_neon
#include "isa/kernels.h"
