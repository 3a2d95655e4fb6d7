// AArch64 with products of int8 quadruples (FEAT_DotProd): Arm's cores since Cortex-A75, Apple's since the M1.
#define MOESTRO_HAS_DOTPROD 1
#include "isa/neon.h"
#define KERNELS kernels_neondot
#include "isa/kernels.h"
