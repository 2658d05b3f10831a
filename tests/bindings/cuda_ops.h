#pragma once

#include <pybind11/pybind11.h>

// The ops of csrc/cuda/ops.h on tensors of device memory, and their gradients.
void bind_cuda_ops(pybind11::module_& m);
void bind_cuda_ops_backward(pybind11::module_& m);
