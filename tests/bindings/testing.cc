// alignpro._testing: what the tests call and no user does. Built with -DALIGNPRO_TESTING=ON.

#include <pybind11/pybind11.h>

#include "bindings/bind.h"
#include "cuda_ops.h"

PYBIND11_MODULE(_testing, m) {
  m.doc() = "Ops on device memory, for the tests; tensors cross by DLPack.";
  // Its exceptions are the ones that these ops raise.
  pybind11::module_::import("alignpro._core");
  translate_invalid_argument();
  bind_cuda_ops(m);
}
