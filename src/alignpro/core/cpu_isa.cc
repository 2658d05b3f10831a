#include "alignpro/core/cpu_isa.h"

#include <algorithm>
#include <cstdlib>

#include "alignpro/core/error.h"

namespace alignpro {

namespace {

struct Isa {
  CpuIsa isa;
  std::string_view name, needs;
};

constexpr Isa kIsas[] = {
    {CpuIsa::kGeneric, "generic", ""},
    {CpuIsa::kNeon, "neon", "Advanced SIMD and FMA"},
    {CpuIsa::kAvx2, "avx2", "AVX2, FMA and F16C"},
    {CpuIsa::kAvx512, "avx512", "AVX2, FMA, F16C and AVX-512 F, BW, DQ, VL and VNNI"},
};

}  // namespace

std::string_view cpu_isa_name(CpuIsa isa) { return kIsas[static_cast<size_t>(isa)].name; }

std::vector<CpuIsa> compiled_isas() {
#ifdef ALIGNPRO_X86_KERNELS
  return {CpuIsa::kGeneric, CpuIsa::kAvx2, CpuIsa::kAvx512};
#elif defined(ALIGNPRO_NEON_KERNELS)
  return {CpuIsa::kGeneric, CpuIsa::kNeon};
#else
  return {CpuIsa::kGeneric};
#endif
}

bool machine_supports(CpuIsa isa) {
  if (isa == CpuIsa::kGeneric) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (isa == CpuIsa::kAvx2) return avx2;
  return isa == CpuIsa::kAvx512 && avx2 && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#elif defined(__aarch64__)
  return isa == CpuIsa::kNeon;  // no aarch64 of Linux is without
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
  for (const auto& [isa, name, needs] : kIsas) {
    if (forced != name) continue;
    require<Unavailable>(std::find(compiled.begin(), compiled.end(), isa) != compiled.end(),
                         "ALIGNPRO_CPU_ISA=", forced, ": this build has no ", forced,
                         " kernels; unset it or set it to generic");
    require<Unavailable>(machine_supports(isa), "ALIGNPRO_CPU_ISA=", forced,
                         ": this machine lacks ", forced, " (", needs,
                         " are needed); unset it or set it to generic");
    return isa;
  }
  throw InvalidArgument(
      cat("ALIGNPRO_CPU_ISA: expected generic, neon, avx2 or avx512, got \"", forced, "\""));
}

CpuIsa cpu_isa() {
  static const CpuIsa chosen = [] {
    const char* forced = std::getenv("ALIGNPRO_CPU_ISA");
    return choose_cpu_isa(forced == nullptr ? "" : forced);
  }();
  return chosen;
}

}  // namespace alignpro
