#pragma once

// The dense products where deterministic is false, by cuBLASLt: sums in float32, in an order that
// the library chooses by shape and number of rows, so that a row's bits are not its own. No header
// of CUDA is named here; no_fast_linear.cc answers in a build that has not found cuBLASLt's.

#include <memory>
#include <string>
#include <vector>

#include "alignpro/ops/ops.h"
#include "ops.h"

namespace alignpro::cuda {

// What a model's sessions share: the library, and what to run for a shape and a number of rows,
// which is asked of it once.
class FastLibrary;
// Opens cuBLASLt for the current device: what ALIGNPRO_CUBLASLT names, or else where the loader
// looks and then in `folders`. Throws Unavailable, which says where it looked and what to do.
std::shared_ptr<const FastLibrary> open_fast_library(const std::vector<std::string>& folders);

// Products on one stream, by one thread at a time; holds a workspace.
class FastLinear {
 public:
  FastLinear(std::shared_ptr<const FastLibrary> library, ops::Ops& ops, Stream stream);
  ~FastLinear();
  FastLinear(const FastLinear&) = delete;
  FastLinear& operator=(const FastLinear&) = delete;

  // out [rows, out features] = scale x W^T + bias + residual, in one dtype. bias [out features],
  // residual [rows, out features]: null or no matrix: nothing; the residual may be out. Memory and
  // rows as ops.h has them; a shape's first call may not be recorded into a graph.
  void multiply(const Matrix& x, const Matrix& weight, float scale, const void* bias,
                const Matrix& residual, const Matrix& out);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace alignpro::cuda
