#pragma once

#include <pybind11/pybind11.h>

// One file a layer, bind_NAME.cc.
void bind_errors(pybind11::module_& m);
void bind_system(pybind11::module_& m);
void bind_trace(pybind11::module_& m);
void bind_files(pybind11::module_& m);
void bind_ops(pybind11::module_& m);
void bind_model(pybind11::module_& m);
void bind_engine(pybind11::module_& m);

// In the calling extension alone: InvalidArgument is Python's ValueError.
void translate_invalid_argument();

namespace alignpro::model {
class ModelFiles;
}
namespace alignpro::bindings {

// Of a ModelFiles, or of the path of a model as text.
model::ModelFiles files_from(const pybind11::object& model);

}  // namespace alignpro::bindings
