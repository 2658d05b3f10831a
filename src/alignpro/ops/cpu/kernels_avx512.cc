// Compiled for AVX-512 (F, BW, DQ, VL) with VNNI; reached only through kernels() on a machine that
// has them.
#define ALIGNPRO_ISA avx512
#define ALIGNPRO_ISA_NAME "avx512"
#include "alignpro/ops/cpu/kernels-inl.h"
