#pragma once

#include <pybind11/pybind11.h>

void bind_cuda_ops(pybind11::module_& m);  // all of them
void bind_cuda_ops_backward(pybind11::module_& m);
