#pragma once

#include <pybind11/pybind11.h>

void bind_device_model(pybind11::module_& m);
