#include "bind.h"

#include "alignpro/core/error.h"

namespace py = pybind11;

void bind_errors(py::module_& m) {
  // Translators run newest first: the base class is registered before what derives from it.
  py::register_exception<alignpro::Error>(m, "EngineError", PyExc_RuntimeError);
  py::register_exception<alignpro::FileError>(m, "ModelFileError", PyExc_ValueError);
  py::register_exception<alignpro::Unavailable>(m, "UnavailableError", PyExc_RuntimeError);
  py::register_exception<alignpro::NumericError>(m, "NumericError", PyExc_ArithmeticError);
  translate_invalid_argument();
}

void translate_invalid_argument() {
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const alignpro::InvalidArgument& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    }
  });
}
