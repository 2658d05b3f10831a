#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <span>
#include <string>
#include <vector>

#include "alignpro/core/error.h"

// The one caster for tensors: what crosses is C-contiguous, of the expected type and number of
// dimensions, or an error names the argument. Nothing is converted behind the caller's back (no
// forcecast).

namespace alignpro::bindings {

namespace py = pybind11;

// An array of any type; the caller looks at its dtype.
inline py::array contiguous_array(const py::handle& object, const std::string& name,
                                  int dimensions) {
  if (!py::isinstance<py::array>(object)) {
    throw InvalidArgument(
        cat(name, ": expected a numpy array, got ", std::string(py::str(py::type::of(object)))));
  }
  auto array = py::reinterpret_borrow<py::array>(object);
  if (array.ndim() != dimensions) {
    throw InvalidArgument(cat(name, ": expected ", dimensions, " dimensions, got ", array.ndim()));
  }
  if ((array.flags() & py::array::c_style) == 0) {
    throw InvalidArgument(cat(name,
                              ": expected C-contiguous memory; call .contiguous() (torch) or "
                              "numpy.ascontiguousarray first"));
  }
  return array;
}

inline py::array float_array(const py::handle& object, const std::string& name, int dimensions) {
  if (py::isinstance<py::array>(object)) {
    const auto type = py::reinterpret_borrow<py::array>(object).dtype();
    if (!type.is(py::dtype::of<float>())) {
      throw InvalidArgument(cat(name, ": expected float32, got ", std::string(py::str(type))));
    }
  }
  return contiguous_array(object, name, dimensions);
}

// A 1-D float32 array as a span; None is an empty one. Valid while the array lives.
inline std::span<const float> float_vector(const py::handle& object, const std::string& name) {
  if (object.is_none()) return {};
  const py::array array = float_array(object, name, 1);
  return {static_cast<const float*>(array.data()), static_cast<size_t>(array.size())};
}

inline py::array_t<float> to_array(const std::vector<float>& values) {
  return py::array_t<float>(static_cast<py::ssize_t>(values.size()), values.data());
}

inline py::array_t<float> to_array(const std::vector<float>& values, int64_t rows, int64_t cols) {
  return py::array_t<float>({rows, cols}, values.data());
}

}  // namespace alignpro::bindings
