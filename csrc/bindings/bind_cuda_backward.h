#pragma once

#include <pybind11/pybind11.h>

// The gradients among the ops on device memory, into alignpro._core.cuda.
void bind_cuda_backward(pybind11::module_& cuda);
