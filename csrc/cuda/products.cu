#include "products.h"

#include <atomic>

#include "alignpro/core/error.h"

namespace alignpro::cuda {
namespace {

#if defined(ALIGNPRO_SM90A)
constexpr bool kBuilt = true;
#else
constexpr bool kBuilt = false;
#endif

std::atomic<Products> chosen{Products::kMma};

}  // namespace

Products products() { return chosen.load(std::memory_order_relaxed); }

void set_products(Products wanted) {
  if (wanted == Products::kWgmma) {
    if (!kBuilt) {
      throw Unavailable(
          "wgmma: this build has no kernels for sm_90a; build with 90a in "
          "CMAKE_CUDA_ARCHITECTURES");
    }
    const int capability = compute_capability();
    require<Unavailable>(capability == 90, "wgmma: expected a GPU of compute capability 9.0, got ",
                         capability / 10, ".", capability % 10);
  }
  chosen = wanted;
}

}  // namespace alignpro::cuda
