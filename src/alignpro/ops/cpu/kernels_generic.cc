// The portable path: the baseline instruction set of the compiler's target.
#define ALIGNPRO_ISA generic
#define ALIGNPRO_ISA_NAME "generic"
#include "alignpro/ops/cpu/kernels-inl.h"
