#include "bind.h"

#include <pybind11/stl.h>

#include <string>

#include "alignpro/core/cpu_isa.h"
#include "alignpro/core/parallel.h"
#include "alignpro/ops/machine_limits.h"
#include "cuda/ops.h"
#include "gil.h"

namespace py = pybind11;

void bind_system(py::module_& m) {
  m.def("cpu_isa", [] { return std::string(alignpro::cpu_isa_name(alignpro::cpu_isa())); });
  m.def("available_cpus", &alignpro::available_cpus);
  const auto measure = [](double (*limit)(alignpro::ThreadPool&)) {
    return [limit](int threads) {
      const alignpro::bindings::GilRelease release;
      alignpro::ThreadPool pool(threads);
      return limit(pool);
    };
  };
  m.def("measure_fma_peak", measure(&alignpro::ops::fma_peak_gflops), py::arg("threads") = 0);
  m.def("measure_read_bandwidth", measure(&alignpro::ops::read_bandwidth_gbps),
        py::arg("threads") = 0);
  m.def("build_info", [] {
    std::string isas;
    for (const alignpro::CpuIsa isa : alignpro::compiled_isas()) {
      isas += (isas.empty() ? "" : ", ") + std::string(alignpro::cpu_isa_name(isa));
    }
    py::dict info;
    info["version"] = ALIGNPRO_VERSION;
    info["compiler"] = __VERSION__;
    info["isas"] = isas;
    info["cuda"] = alignpro::cuda::version();
    return info;
  });
  py::module_ cuda = m.def_submodule("cuda", "Whether there is a device, and which.");
  cuda.def("is_available", &alignpro::cuda::is_available);
  cuda.def("unavailable_reason", &alignpro::cuda::unavailable_reason);
  cuda.def("device_name", &alignpro::cuda::device_name);
  cuda.def("version", &alignpro::cuda::version);
}
