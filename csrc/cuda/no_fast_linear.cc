// A build without cuBLASLt's header, or without CUDA.

#include "alignpro/core/error.h"
#include "fast_linear.h"

namespace alignpro::cuda {
namespace {

[[noreturn]] void missing() {
  throw Unavailable(
      "deterministic false: this build has no cuBLASLt, whose header cublasLt.h was not found; pip "
      "install nvidia-cublas (torch's CUDA build brings it) or give CMake "
      "-DALIGNPRO_CUBLAS_INCLUDE=FOLDER, and build again; or load with deterministic true");
}

}  // namespace

struct FastLinear::State {};

std::shared_ptr<const FastLibrary> open_fast_library(const std::vector<std::string>&) { missing(); }
FastLinear::FastLinear(std::shared_ptr<const FastLibrary>, ops::Ops&, Stream) { missing(); }
FastLinear::~FastLinear() = default;
void FastLinear::multiply(const Matrix&, const Matrix&, float, const void*, const Matrix&,
                          const Matrix&) {
  missing();
}

}  // namespace alignpro::cuda
