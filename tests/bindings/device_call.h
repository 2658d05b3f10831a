#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <deque>
#include <string>

#include "cuda/ops.h"
#include "device_tensor.h"

// What a call of an op on device memory takes from Python.

namespace alignpro::bindings {

// One call's tensors, kept until its work is on the stream.
class Call {
 public:
  // Before anything is looked at: without a GPU the answer is that.
  explicit Call(const char* op) {
    const std::string reason = cuda::unavailable_reason();
    if (!reason.empty()) throw Unavailable(cat("cuda: ", op, ": ", reason));
    device_ = cuda::current_device();
  }

  const DeviceTensor& tensor(const py::handle& object, const char* name, int dimensions,
                             Rows rows = Rows::kDense) {
    return tensors_.emplace_back(object, name, dimensions, device_, rows);
  }
  cuda::Matrix matrix(const py::handle& object, const char* name) {
    const DeviceTensor& t = tensor(object, name, 2, Rows::kApart);
    return {t.data(), t.size(0), t.size(1), t.ld(), t.dtype()};
  }
  // None is a matrix of nothing.
  cuda::Matrix optional_matrix(const py::handle& object, const char* name) {
    return object.is_none() ? cuda::Matrix() : matrix(object, name);
  }
  const int32_t* ints(const py::handle& object, const char* name, int64_t count) {
    return tensor(object, name, 1).values<int32_t>(DlType::kInt, count);
  }
  template <typename T>
  T* floats(const py::handle& object, const char* name, int64_t count, int dimensions = 1) {
    return object.is_none() ? nullptr
                            : tensor(object, name, dimensions).values<T>(DlType::kFloat, count);
  }
  // Values of a matrix's dtype, one a column.
  const void* vector(const py::handle& object, const char* name, int64_t count, DType dtype) {
    const DeviceTensor& t = tensor(object, name, 1);
    require(t.dtype() == dtype && t.size(0) == count, name, ": expected ", count, " values of ",
            dtype_name(dtype), ", got ", t.size(0), " of ", dtype_name(t.dtype()));
    return t.data();
  }
  void* workspace(const py::handle& object, int64_t bytes) {
    return tensor(object, "workspace", 1).values<uint8_t>(DlType::kUInt, bytes);
  }
  // (row_begin, row_count, position) each, int32 [count, 3].
  const cuda::Segment* segments(const py::handle& object, int64_t count) {
    static_assert(sizeof(cuda::Segment) == 12);
    return reinterpret_cast<const cuda::Segment*>(
        tensor(object, "segments", 2).values<int32_t>(DlType::kInt, 3 * count));
  }
  // [blocks, kv heads, 2, 16, head_dim] in the dtype of qkv.
  cuda::PagedKv paged_kv(const py::handle& object, const cuda::AttentionShape& shape, DType dtype) {
    const DeviceTensor& t = tensor(object, "kv", 5);
    require(t.dtype() == dtype && t.size(1) == shape.num_kv_heads && t.size(2) == 2 &&
                t.size(3) == 16 && t.size(4) == shape.head_dim,
            "kv: expected [blocks, ", shape.num_kv_heads, ", 2, 16, ", shape.head_dim, "] of ",
            dtype_name(dtype), ", got [", t.size(0), ", ", t.size(1), ", ", t.size(2), ", ",
            t.size(3), ", ", t.size(4), "] of ", dtype_name(t.dtype()));
    const int64_t half = 16 * shape.head_dim;
    return {t.data(), 2 * half * shape.num_kv_heads, 2 * half, half};
  }

 private:
  int device_ = 0;
  std::deque<DeviceTensor> tensors_;
};

inline cuda::Stream stream_of(uintptr_t stream) { return reinterpret_cast<cuda::Stream>(stream); }

}  // namespace alignpro::bindings
