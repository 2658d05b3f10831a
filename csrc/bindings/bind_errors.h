#pragma once

#include <pybind11/pybind11.h>

void bind_errors(pybind11::module_& m);
// In the calling extension alone: InvalidArgument is Python's ValueError.
void translate_invalid_argument();
