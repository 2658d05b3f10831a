#pragma once

#include <pybind11/pybind11.h>

#include "alignpro/model/model_files.h"

void bind_files(pybind11::module_& m);

namespace alignpro::bindings {

// Of a ModelFiles, or of the path of a model as text.
model::ModelFiles files_from(const pybind11::object& model);

}  // namespace alignpro::bindings
