#include "alignpro/ops/cpu/kernels.h"

#include "alignpro/core/cpu_isa.h"

namespace alignpro::ops::cpu {

const Kernels& kernels() {
#if defined(ALIGNPRO_HAVE_AVX2)
  if (cpu_isa() == CpuIsa::kAvx2) return avx2::kKernels;
#endif
  return generic::kKernels;
}

}  // namespace alignpro::ops::cpu
