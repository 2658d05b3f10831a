// Table of contents of alignpro._core; one file a layer.

#include <pybind11/pybind11.h>

#include "bind.h"
#include "gil.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "The compiled engine of alignpro; use it through the alignpro package.";
  bind_errors(m);
  bind_system(m);
  bind_trace(m);
  bind_files(m);
  bind_ops(m);
  bind_model(m);
  bind_engine(m);
  alignpro::bindings::GilRelease::watch_forks();
  pybind11::module_::import("atexit").attr("register")(
      pybind11::cpp_function(&alignpro::bindings::GilRelease::stop_returning));
}
