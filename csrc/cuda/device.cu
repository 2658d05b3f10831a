#include <cuda_runtime.h>

#include "launch.h"
#include "products.h"

namespace alignpro::cuda {

std::string unavailable_reason() {
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status != cudaSuccess || devices == 0) {
    (void)cudaGetLastError();
    return cat("no GPU answers (",
               status == cudaSuccess ? "none found" : cudaGetErrorString(status),
               "); run on a machine with one, or use the CPU engine");
  }
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) {
    return cat("the GPU does not answer (", cudaGetErrorString(cudaGetLastError()), ")");
  }
  if (major < 8) {
    return cat("expected a GPU of compute capability 8.0 or later, got ", major,
               ".x; use the CPU engine");
  }
  return "";
}

bool is_available() { return unavailable_reason().empty(); }

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "current_device");
  return device;
}

int compute_capability() {
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, current_device()),
        "compute_capability");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, current_device()),
        "compute_capability");
  return 10 * major + minor;
}

int multiprocessors() {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, current_device()),
        "multiprocessors");
  return count;
}

int dlpack_device_type() { return 2; }

std::string device_name() {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, current_device()), "device_name");
  return properties.name;
}

std::string version() { return cat(CUDART_VERSION / 1000, ".", CUDART_VERSION % 1000 / 10); }

}  // namespace alignpro::cuda
