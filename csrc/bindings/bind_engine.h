#pragma once

#include <pybind11/pybind11.h>

// SamplingParams, Sequence and Engine.
void bind_engine(pybind11::module_& m);
