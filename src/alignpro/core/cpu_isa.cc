#include "alignpro/core/cpu_isa.h"

#include <algorithm>
#include <cstdlib>

#include "alignpro/core/error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
    {CpuIsa::kAmx, "amx", "what avx512 needs, AMX-TILE, AMX-INT8 and Linux 5.16"},
};

#if defined(__x86_64__)
// Whether the processor has tiles of bytes and Linux lets this process use them.
bool may_use_amx() {
  constexpr unsigned kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kAmxTile) || !(d & kAmxInt8)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

}  // namespace

std::string_view cpu_isa_name(CpuIsa isa) { return kIsas[static_cast<size_t>(isa)].name; }

std::vector<CpuIsa> compiled_isas() {
#ifdef ALIGNPRO_X86_KERNELS
  return {CpuIsa::kGeneric, CpuIsa::kAvx2, CpuIsa::kAvx512, CpuIsa::kAmx};
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
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  if (isa == CpuIsa::kAvx512) return avx512;
  return isa == CpuIsa::kAmx && avx512 && may_use_amx();
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
      cat("ALIGNPRO_CPU_ISA: expected generic, neon, avx2, avx512 or amx, got \"", forced, "\""));
}

CpuIsa cpu_isa() {
  static const CpuIsa chosen = [] {
    const char* forced = std::getenv("ALIGNPRO_CPU_ISA");
    return choose_cpu_isa(forced == nullptr ? "" : forced);
  }();
  return chosen;
}

}  // namespace alignpro
