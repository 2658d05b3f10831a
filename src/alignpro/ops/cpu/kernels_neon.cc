// Advanced SIMD and FMA, which every aarch64 has: the compiler's baseline.
#define ALIGNPRO_ISA neon
#define ALIGNPRO_ISA_NAME "neon"
#define ALIGNPRO_NEON
#include "alignpro/ops/cpu/kernels-inl.h"
