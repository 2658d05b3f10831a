#include "alignpro/ops/cpu/kernels.h"

namespace alignpro::ops::cpu {

const Kernels& kernels_of(CpuIsa isa) {
  switch (isa) {
#if defined(ALIGNPRO_X86_KERNELS)
    case CpuIsa::kAmx:
      return avx512::kAmxKernels;
    case CpuIsa::kAvx512:
      return avx512::kKernels;
    case CpuIsa::kAvx2:
      return avx2::kKernels;
#elif defined(ALIGNPRO_NEON_KERNELS)
    case CpuIsa::kNeon:
      return neon::kKernels;
#endif
    default:
      return generic::kKernels;
  }
}

const Kernels& kernels() {
  static const Kernels& chosen = kernels_of(cpu_isa());
  return chosen;
}

}  // namespace alignpro::ops::cpu
