#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "alignpro/core/dtype.h"
#include "alignpro/core/error.h"
#include "cuda/ops.h"

// Tensors of device memory cross by DLPack as the host's do by csrc/bindings/array.h: nothing is
// converted or copied, and an error names the argument. The structures are the protocol's binary
// interface, version 0 (dmlc.github.io/dlpack).

namespace alignpro::bindings {

namespace py = pybind11;

struct DlTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dimensions;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;  // in elements; null: contiguous
  uint64_t byte_offset;
};

struct DlManagedTensor {
  DlTensor tensor;
  void* context;
  void (*deleter)(DlManagedTensor*);
};

// Whether rows of a matrix may lie apart: the op is then told by how much (ld).
enum class Rows { kDense, kApart };

enum class DlType : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4 };

// Holds on to the tensor for its lifetime. The work that uses it must be on the stream on which the
// tensor is used next, as torch's allocator asks.
class DeviceTensor {
 public:
  DeviceTensor(const py::handle& object, const std::string& name, int dimensions, int device,
               Rows rows)
      : name_(name) {
    if (!py::hasattr(object, "__dlpack__")) {
      throw InvalidArgument(cat(name, ": expected a tensor with __dlpack__, got ",
                                std::string(py::str(py::type::of(object)))));
    }
    const auto place = object.attr("__dlpack_device__")().cast<std::pair<int, int>>();
    const int type = cuda::dlpack_device_type();
    require(place.first == type, name, ": expected a tensor of DLPack device ", type,
            ", got one of device ", place.first, "; call .cuda() first");
    require(place.second == device, name, ": expected a tensor of the current device ", device,
            ", got one of device ", place.second);
    // -1: no synchronisation, the caller names the stream.
    capsule_ = object.attr("__dlpack__")(py::arg("stream") = -1);
    managed_ = static_cast<DlManagedTensor*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"));
    if (managed_ == nullptr) throw py::error_already_set();
    require(tensor().dimensions == dimensions, name, ": expected ", dimensions, " dimensions, got ",
            tensor().dimensions);
    int64_t next = 1;
    for (int i = dimensions; --i >= 0;) {
      const bool apart = rows == Rows::kApart && i == 0 && dimensions == 2 && stride(0) > next;
      require(stride(i) == next || size(i) <= 1 || apart, name,
              ": expected contiguous memory; call .contiguous() first");
      next *= size(i);
    }
  }

  int64_t size(int i) const { return tensor().shape[i]; }
  // Distance of rows of a matrix.
  int64_t ld() const { return size(0) > 1 ? stride(0) : size(1); }
  DType dtype() const {
    if (is(DlType::kFloat, 32)) return DType::kF32;
    require(is(DlType::kBfloat, 16), name_, ": expected float32 or bfloat16, got ", type_text());
    return DType::kBF16;
  }
  void* data() const { return static_cast<char*>(tensor().data) + tensor().byte_offset; }
  template <typename T>
  T* values(DlType type, int64_t count) const {
    require(is(type, 8 * sizeof(T)), name_, ": expected type code ", static_cast<int>(type), " of ",
            8 * sizeof(T), " bits, got ", type_text());
    int64_t have = 1;
    for (int i = 0; i < tensor().dimensions; ++i) have *= size(i);
    require(have >= count, name_, ": expected ", count, " values, got ", have);
    return static_cast<T*>(data());
  }

 private:
  const DlTensor& tensor() const { return managed_->tensor; }
  int64_t stride(int i) const {
    if (tensor().strides != nullptr) return tensor().strides[i];
    int64_t stride = 1;
    for (int k = i + 1; k < tensor().dimensions; ++k) stride *= size(k);
    return stride;
  }
  bool is(DlType type, size_t bits) const {
    return tensor().type_code == static_cast<uint8_t>(type) && tensor().type_bits == bits &&
           tensor().type_lanes == 1;
  }
  std::string type_text() const {
    return cat("type code ", int{tensor().type_code}, " of ", int{tensor().type_bits}, " bits");
  }

  std::string name_;
  py::object capsule_;  // unused capsules call the deleter themselves
  DlManagedTensor* managed_ = nullptr;
};

}  // namespace alignpro::bindings
