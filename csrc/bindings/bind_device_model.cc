#include "bind_device_model.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "array.h"
#include "bind_files.h"
#include "bind_model.h"
#include "bind_score.h"
#include "cuda/model/device_model.h"
#include "cuda/model/device_score.h"
#include "gil.h"

namespace py = pybind11;
using namespace alignpro;
using namespace alignpro::bindings;
using cuda::DeviceModel;

namespace {

DType compute_from(const std::string& name) {
  if (name == "bfloat16") return DType::kBF16;
  require(name == "float32", "compute: expected \"bfloat16\" or \"float32\" on device cuda, got \"",
          name, "\"");
  return DType::kF32;
}

bool is_fast(const std::string& mode) {
  require(mode == "strict" || mode == "fast",
          "mode: expected \"strict\" or \"fast\" on device cuda, got \"", mode, "\"");
  return mode == "fast";
}

py::dict describe_model(const DeviceModel& model) {
  py::dict d = describe(model.config(), model.context_length());
  const char* compute = model.weights().dtype == DType::kBF16 ? "bfloat16" : "float32";
  d["device"] = "cuda";
  d["threads"] = 0;
  d["weight_bytes"] = model.weights().bytes();
  d["compute"] = compute;
  d["kv_dtype"] = compute;
  d["mode"] = model.weights().fast == nullptr ? "strict" : "fast";
  d["streamed_bytes"] = model.weights().streamed_bytes();
  return d;
}

}  // namespace

void bind_device_model(py::module_& m) {
  bind_score<cuda::DeviceScore>(m, "DeviceScore");

  py::class_<DeviceModel, std::shared_ptr<DeviceModel>> of(m, "DeviceModel");
  of.def_property_readonly("config", &describe_model)
      .def_static(
          "load",
          [](const py::object& files, int threads, int64_t context_length,
             const std::string& compute, const std::string& mode,
             std::vector<std::string> library_folders) {
            const DType dtype = compute_from(compute);
            const cuda::Mode how{is_fast(mode), std::move(library_folders)};
            const model::ModelFiles opened = files_from(files);
            const GilRelease release;
            return DeviceModel::load(opened, dtype, context_length, threads, how);
          },
          py::arg("files"), py::arg("threads") = 0, py::arg("context_length") = 0,
          py::arg("compute") = "bfloat16", py::arg("mode") = "strict",
          py::arg("library_folders") = std::vector<std::string>())
      .def("lora_modules", [](const DeviceModel& self) { return lora_shapes(self.config()); })
      .def(
          "make_adapter",
          [](const DeviceModel& self, const py::dict& matrices, float scale) {
            return make_adapter(self.config(), matrices, scale);
          },
          py::arg("matrices"), py::arg("scale"));
  bind_scoring<cuda::DeviceScore>(of);
}
