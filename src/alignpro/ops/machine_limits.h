#pragma once

#include "alignpro/core/parallel.h"

namespace alignpro::ops {

// What this machine can do at most, measured now on the whole pool: medians of five runs of a
// fraction of a second. Benchmarks state their results as shares of these.

// Multiply-adds of the kernels' instruction set on registers alone, in GFLOP/s (two a
// multiply-add).
double fma_peak_gflops(ThreadPool& pool);

// Reading memory that no cache holds (512 MiB), in GB/s.
double read_bandwidth_gbps(ThreadPool& pool);

}  // namespace alignpro::ops
