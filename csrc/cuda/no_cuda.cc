// A build without CUDA says so: there is no device to make, and no op is compiled.

#include "alignpro/core/error.h"
#include "device_ops.h"
#include "ops.h"

namespace alignpro::cuda {

bool is_available() { return false; }
std::string unavailable_reason() {
  return "this build has no CUDA; build with -DALIGNPRO_CUDA=ON where nvcc is, or use the CPU "
         "engine";
}
std::string device_name() { throw Unavailable(cat("cuda: device_name: ", unavailable_reason())); }
std::string version() { return "no"; }

std::unique_ptr<ops::Device> make_device(DType, bool, int, const std::vector<std::string>&) {
  throw Unavailable(cat("device cuda: ", unavailable_reason()));
}

}  // namespace alignpro::cuda
