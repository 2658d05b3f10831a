#pragma once

#include "alignpro/core/parallel.h"

namespace alignpro::ops {

// What this machine can do at most, measured now on the whole team: medians of five runs of a
// fraction of a second. Benchmarks state their results as shares of these.

// Multiply-adds of the kernels' instruction set on registers alone, in GFLOP/s (two a
// multiply-add).
double fma_peak_gflops(ThreadTeam& team);

// Reading memory that no cache holds (512 MiB), in GB/s.
double read_bandwidth_gbps(ThreadTeam& team);

}  // namespace alignpro::ops
