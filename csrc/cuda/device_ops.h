#pragma once

#include <memory>
#include <string>
#include <vector>

#include "alignpro/ops/ops.h"

namespace alignpro::cuda {

// The current GPU, with a model's weights, activations and KV in `compute`: kBF16 or kF32 (sums are
// float32). `threads` convert the file. Deterministic: products by linear (ops.h), a row's bits are
// its own. Otherwise by cuBLASLt, which may lie in `library_folders`, and they are not.
// Throws Unavailable without a GPU or without cuBLASLt where that is asked for, InvalidArgument for
// a dtype.
std::unique_ptr<ops::Device> make_device(DType compute, bool deterministic, int threads,
                                         const std::vector<std::string>& library_folders = {});

}  // namespace alignpro::cuda
