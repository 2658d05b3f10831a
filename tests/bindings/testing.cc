// alignpro._testing: what the tests call and no user does. Built with -DALIGNPRO_TESTING=ON.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "alignpro/prompter/tokenizer.h"
#include "bindings/bind.h"
#include "cuda_ops.h"

namespace {

namespace py = pybind11;
using alignpro::prompter::Tokenizer;

void bind_tokenizer(py::module_& m) {
  py::class_<Tokenizer>(m, "Tokenizer")
      .def(py::init([](const std::string& path) {
             return std::make_unique<Tokenizer>(alignpro::model::ModelFiles(path));
           }),
           py::arg("path"))
      .def("encode", [](const Tokenizer& self, const std::string& before, const std::string& text,
                        const std::string& after) { return self.encode(before, text, after); })
      .def("join_bytes", [](const Tokenizer& self, const std::vector<int32_t>& tokens) {
        return py::bytes(self.join_bytes(tokens));
      });
}

}  // namespace

PYBIND11_MODULE(_testing, m) {
  m.doc() =
      "What tests alone call: ops on device memory, whose tensors cross by DLPack, and the C++ "
      "tokenizer.";
  // Its exceptions are the ones that these ops raise.
  pybind11::module_::import("alignpro._core");
  translate_invalid_argument();
  bind_cuda_ops(m);
  bind_tokenizer(m);
}
