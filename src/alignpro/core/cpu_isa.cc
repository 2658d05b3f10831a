#include "alignpro/core/cpu_isa.h"

#include <algorithm>
#include <cstdlib>

#include "alignpro/core/error.h"

namespace alignpro {

std::string_view cpu_isa_name(CpuIsa isa) { return isa == CpuIsa::kAvx2 ? "avx2" : "generic"; }

std::vector<CpuIsa> compiled_isas() {
#ifdef ALIGNPRO_HAVE_AVX2
  return {CpuIsa::kGeneric, CpuIsa::kAvx2};
#else
  return {CpuIsa::kGeneric};
#endif
}

bool machine_supports(CpuIsa isa) {
  if (isa == CpuIsa::kGeneric) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

CpuIsa choose_cpu_isa(std::string_view forced) {
  const std::vector<CpuIsa> compiled = compiled_isas();
  if (forced.empty()) {
    CpuIsa best = CpuIsa::kGeneric;
    for (const CpuIsa isa : compiled) {
      if (machine_supports(isa)) best = isa;
    }
    return best;
  }
  for (const CpuIsa isa : {CpuIsa::kGeneric, CpuIsa::kAvx2}) {
    if (forced != cpu_isa_name(isa)) continue;
    if (std::find(compiled.begin(), compiled.end(), isa) == compiled.end()) {
      throw Unavailable(cat("ALIGNPRO_CPU_ISA=", forced, ": this build has no ", forced,
                            " kernels; unset it or set it to generic"));
    }
    if (!machine_supports(isa)) {
      throw Unavailable(cat("ALIGNPRO_CPU_ISA=", forced, ": this machine lacks ", forced,
                            " (AVX2, FMA and F16C are needed); unset it or set it to generic"));
    }
    return isa;
  }
  throw InvalidArgument(cat("ALIGNPRO_CPU_ISA: expected generic or avx2, got \"", forced, "\""));
}

CpuIsa cpu_isa() {
  static const CpuIsa chosen = [] {
    const char* forced = std::getenv("ALIGNPRO_CPU_ISA");
    return choose_cpu_isa(forced == nullptr ? "" : forced);
  }();
  return chosen;
}

}  // namespace alignpro
