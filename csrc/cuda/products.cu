#include "products.h"

#include <cstdlib>

#include "alignpro/core/error.h"

namespace alignpro::cuda {
namespace {

#if defined(ALIGNPRO_SM90A)
constexpr bool kBuilt = true;
#else
constexpr bool kBuilt = false;
#endif

}  // namespace

Products choose_products(std::string_view wanted, int capability, bool built) {
  if (wanted.empty() || wanted == "mma") return Products::kMma;
  require(wanted == "wgmma", "ALIGNPRO_CUDA_PRODUCTS: expected mma or wgmma, got \"", wanted, "\"");
  if (!built) {
    throw Unavailable(
        "ALIGNPRO_CUDA_PRODUCTS=wgmma: this build has no kernels for sm_90a; unset it, set it to "
        "mma, or build with 90a in CMAKE_CUDA_ARCHITECTURES");
  }
  if (capability != 90) {
    throw Unavailable(
        cat("ALIGNPRO_CUDA_PRODUCTS=wgmma: expected a GPU of compute capability 9.0, "
            "got ",
            capability / 10, ".", capability % 10, "; unset it or set it to mma"));
  }
  return Products::kWgmma;
}

Products products() {
  static const Products chosen = [] {
    const char* wanted = std::getenv("ALIGNPRO_CUDA_PRODUCTS");
    return wanted == nullptr ? Products::kMma
                             : choose_products(wanted, compute_capability(), kBuilt);
  }();
  return chosen;
}

}  // namespace alignpro::cuda
