#pragma once

#include <string_view>
#include <vector>

namespace alignpro {

// Instruction sets with kernels of their own, weakest first.
// kAvx512 is F, BW, DQ, VL and VNNI; kAmx is that with AMX's tiles of bytes.
enum class CpuIsa { kGeneric, kNeon, kAvx2, kAvx512, kAmx };

std::string_view cpu_isa_name(CpuIsa isa);

// What was compiled into this build, weakest first.
std::vector<CpuIsa> compiled_isas();

// Whether this machine can run it and the operating system saves its registers. AMX's have to be
// asked for: the first call does so for the process.
bool machine_supports(CpuIsa isa);

// The best compiled one that this machine supports; or the one named by `forced` ("generic",
// "neon", "avx2", "avx512", "amx"). Throws InvalidArgument for an unknown word, Unavailable for
// what the build or the machine lacks.
CpuIsa choose_cpu_isa(std::string_view forced);

// The choice for this process, made once: choose_cpu_isa($ALIGNPRO_CPU_ISA).
CpuIsa cpu_isa();

}  // namespace alignpro
