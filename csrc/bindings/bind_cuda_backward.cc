#include "bind_cuda_backward.h"

#include <cstdint>

#include "cuda/ops.h"
#include "device_call.h"
#include "gil.h"

namespace py = pybind11;
using namespace alignpro;
using namespace alignpro::bindings;

namespace {

void rms_norm_backward(const py::object& x, const py::object& weight, float eps,
                       const py::object& dy, const py::object& dx, uintptr_t stream) {
  Call call("rms_norm_backward");
  const cuda::Matrix from = call.matrix(x, "x"), up = call.matrix(dy, "dy");
  const cuda::Matrix to = call.matrix(dx, "dx");
  const void* w = call.vector(weight, "weight", from.cols, from.dtype);
  const GilRelease release;
  cuda::rms_norm_backward(from, w, eps, up, to, stream_of(stream));
}

void swiglu_backward(const py::object& gate_up, const py::object& dh, const py::object& d_gate_up,
                     uintptr_t stream) {
  Call call("swiglu_backward");
  const cuda::Matrix from = call.matrix(gate_up, "gate_up"), up = call.matrix(dh, "dh");
  const cuda::Matrix to = call.matrix(d_gate_up, "d_gate_up");
  const GilRelease release;
  cuda::swiglu_backward(from, up, to, stream_of(stream));
}

void rope_backward(const py::object& d_qkv, const cuda::AttentionShape& shape,
                   const py::object& cos, const py::object& sin, const py::object& positions,
                   uintptr_t stream) {
  Call call("rope_backward");
  const cuda::Matrix rows = call.matrix(d_qkv, "d_qkv");
  const int64_t half = call.tensor(cos, "cos", 2).size(1);
  const float* c = call.floats<float>(cos, "cos", 0, 2);
  const float* s = call.floats<float>(sin, "sin", 0, 2);
  const int32_t* at = call.ints(positions, "positions", rows.rows);
  const GilRelease release;
  cuda::rope_backward(shape, rows, 2 * half, c, s, at, stream_of(stream));
}

// None for dx: d_low alone. None for d_low: no adapter.
void linear_backward(const py::object& dy, const py::object& weight, const py::object& residual,
                     const py::object& lora_down, const py::object& lora_up, float lora_scale,
                     const py::object& d_low, const py::object& dx, uintptr_t stream) {
  Call call("linear_backward");
  const cuda::Matrix up = call.matrix(dy, "dy");
  const cuda::Matrix w = call.optional_matrix(weight, "weight");
  const cuda::Matrix to = call.optional_matrix(dx, "dx");
  const cuda::LinearBackwardExtras extras{
      call.optional_matrix(residual, "residual"), call.optional_matrix(lora_down, "lora_down"),
      call.optional_matrix(lora_up, "lora_up"), call.optional_matrix(d_low, "d_low"), lora_scale};
  const GilRelease release;
  cuda::linear_backward(up, w, extras, to, stream_of(stream));
}

void lora_backward(const py::object& x, const py::object& lora_x, const py::object& dy,
                   const py::object& d_low, float lora_scale, const py::object& d_a,
                   const py::object& d_b, const py::object& workspace, uintptr_t stream) {
  Call call("lora_backward");
  const cuda::LoraBackwardInput in{call.matrix(x, "x"), call.matrix(lora_x, "lora_x"),
                                   call.matrix(dy, "dy"), call.matrix(d_low, "d_low"), lora_scale};
  const cuda::Matrix to_a = call.matrix(d_a, "d_a"), to_b = call.matrix(d_b, "d_b");
  void* memory = call.workspace(
      workspace, cuda::lora_backward_bytes(in.x.rows, in.x.cols, in.dy.cols, in.d_low.cols));
  const GilRelease release;
  cuda::lora_backward(in, to_a, to_b, memory, stream_of(stream));
}

}  // namespace

void bind_cuda_backward(py::module_& m) {
  m.def("rms_norm_backward", &rms_norm_backward, py::arg("x"), py::arg("weight"), py::arg("eps"),
        py::arg("dy"), py::arg("dx"), py::arg("stream"));
  m.def("swiglu_backward", &swiglu_backward, py::arg("gate_up"), py::arg("dh"),
        py::arg("d_gate_up"), py::arg("stream"));
  m.def("rope_backward", &rope_backward, py::arg("d_qkv"), py::arg("shape"), py::arg("cos"),
        py::arg("sin"), py::arg("positions"), py::arg("stream"));
  m.def("linear_backward", &linear_backward, py::arg("dy"), py::arg("weight"), py::arg("residual"),
        py::arg("lora_down"), py::arg("lora_up"), py::arg("lora_scale"), py::arg("d_low"),
        py::arg("dx"), py::arg("stream"));
  m.def("lora_backward", &lora_backward, py::arg("x"), py::arg("lora_x"), py::arg("dy"),
        py::arg("d_low"), py::arg("lora_scale"), py::arg("d_a"), py::arg("d_b"),
        py::arg("workspace"), py::arg("stream"));
  m.def("lora_backward_bytes", &cuda::lora_backward_bytes, py::arg("rows"), py::arg("inputs"),
        py::arg("outputs"), py::arg("rank"));
}
