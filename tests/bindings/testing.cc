// alignpro._testing: what the tests call and no user does. Built with -DALIGNPRO_TESTING=ON.

#include <pybind11/pybind11.h>

#include <cstdlib>
#include <string_view>

#include "bindings/bind_errors.h"
#include "cuda/products.h"
#include "cuda_ops.h"

PYBIND11_MODULE(_testing, m) {
  m.doc() = "Ops on device memory, for the tests; tensors cross by DLPack.";
  // Its exceptions are the ones that these ops raise.
  pybind11::module_::import("alignpro._core");
  translate_invalid_argument();
  // How its ops multiply bfloat16 matrices: by mma.sync, or by wgmma where this says so.
  const char* products = std::getenv("ALIGNPRO_TEST_PRODUCTS");
  if (products != nullptr && std::string_view(products) == "wgmma") {
    alignpro::cuda::set_products(alignpro::cuda::Products::kWgmma);
  }
  bind_cuda_ops(m);
  bind_cuda_ops_backward(m);
}
