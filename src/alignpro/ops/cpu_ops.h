#pragma once

#include <memory>

#include "alignpro/ops/ops.h"
#include "alignpro/ops/packed_matrix.h"

namespace alignpro::ops {

// The CPU. `threads` 0: available_cpus(). kv_dtype: kF32 or kF16, in sampling and scoring alike;
// kF16 has no gradients, and neither has kInt8.
std::unique_ptr<Device> make_cpu_device(int threads, Arithmetic arithmetic = Arithmetic::kFloat32,
                                        DType kv_dtype = DType::kF32);

// A weight without values, for sizes alone (PackedMatrix::plan).
std::unique_ptr<const Weight> planned_weight(PackedMatrix matrix);

}  // namespace alignpro::ops
