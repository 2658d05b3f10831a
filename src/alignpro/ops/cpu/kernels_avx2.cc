// Compiled with -mavx2 -mfma -mf16c; reached only through kernels() on a machine that has them.
#define ALIGNPRO_ISA avx2
#define ALIGNPRO_ISA_NAME "avx2"
#include "alignpro/ops/cpu/kernels-inl.h"
