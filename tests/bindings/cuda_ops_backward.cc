#include <cstdint>

#include "bindings/gil.h"
#include "cuda/ops.h"
#include "cuda_ops.h"
#include "device_call.h"

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

// begins [rows + 1] and places: int32.
void embedding_backward(const py::object& d_out, const py::object& begins, const py::object& places,
                        const py::object& d_table, uintptr_t stream) {
  Call call("embedding_backward");
  const cuda::Matrix up = call.matrix(d_out, "d_out"), to = call.matrix(d_table, "d_table");
  const int32_t* first = call.ints(begins, "begins", to.rows + 1);
  const int32_t* from = call.ints(places, "places", 0);
  const GilRelease release;
  cuda::embedding_backward(up, first, from, to, stream_of(stream));
}

void qk_norm_backward(const py::object& qkv, const cuda::AttentionShape& shape,
                      const py::object& q_weight, const py::object& k_weight, float eps,
                      const py::object& d_qkv, uintptr_t stream) {
  Call call("qk_norm_backward");
  const cuda::Matrix from = call.matrix(qkv, "qkv"), to = call.matrix(d_qkv, "d_qkv");
  const void* q = call.vector(q_weight, "q_weight", shape.head_dim, from.dtype);
  const void* k = call.vector(k_weight, "k_weight", shape.head_dim, from.dtype);
  const GilRelease release;
  cuda::qk_norm_backward(shape, from, q, k, eps, to, stream_of(stream));
}

// swiglu_backward or geglu_backward.
using GluBackward = decltype(&cuda::swiglu_backward);
void bind_glu_backward(py::module_& m, const char* name, GluBackward op) {
  m.def(
      name,
      [name, op](const py::object& gate_up, const py::object& dh, const py::object& d_gate_up,
                 uintptr_t stream) {
        Call call(name);
        const cuda::Matrix from = call.matrix(gate_up, "gate_up"), up = call.matrix(dh, "dh");
        const cuda::Matrix to = call.matrix(d_gate_up, "d_gate_up");
        const GilRelease release;
        op(from, up, to, stream_of(stream));
      },
      py::arg("gate_up"), py::arg("dh"), py::arg("d_gate_up"), py::arg("stream"));
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

// segments, block_table and lse as attention_prefill's. child_begin, children: int32, or None.
void attention_backward(const py::object& qkv, const cuda::AttentionShape& shape,
                        const py::object& out, const py::object& dout, const py::object& lse,
                        const py::object& segments, int64_t max_rows, const py::object& child_begin,
                        const py::object& children, const py::object& block_table,
                        const py::object& kv, const py::object& d_qkv, const py::object& workspace,
                        uintptr_t stream) {
  Call call("attention_backward");
  cuda::AttentionBackwardInput in{};
  in.qkv = call.matrix(qkv, "qkv");
  in.out = call.matrix(out, "out");
  in.dout = call.matrix(dout, "dout");
  in.lse = call.tensor(lse, "lse", 2).values<float>(DlType::kFloat, in.qkv.rows * shape.num_heads);
  const DeviceTensor& table = call.tensor(block_table, "block_table", 2, Rows::kApart);
  in.segments = call.segments(segments, table.size(0));
  in.segment_count = table.size(0);
  in.max_rows = max_rows;
  if (!child_begin.is_none() || !children.is_none()) {
    in.child_begin = call.ints(child_begin, "child_begin", in.segment_count + 1);
    in.children = call.ints(children, "children", in.segment_count);
  }
  in.block_table = table.values<int32_t>(DlType::kInt, 0);
  in.table_ld = table.ld();
  in.kv = call.paged_kv(kv, shape, in.qkv.dtype);
  const cuda::Matrix to = call.matrix(d_qkv, "d_qkv");
  void* memory = call.workspace(workspace, cuda::attention_backward_bytes(shape, in.qkv.rows));
  const GilRelease release;
  cuda::attention_backward(shape, in, to, memory, stream_of(stream));
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
      workspace, cuda::lora_backward_bytes(in.x.rows, in.x.cols, in.dy.cols, in.d_lora_down.cols));
  const GilRelease release;
  cuda::lora_backward(in, to_a, to_b, memory, stream_of(stream));
}

}  // namespace

void bind_cuda_ops_backward(py::module_& m) {
  m.def("rms_norm_backward", &rms_norm_backward, py::arg("x"), py::arg("weight"), py::arg("eps"),
        py::arg("dy"), py::arg("dx"), py::arg("stream"));
  m.def("embedding_backward", &embedding_backward, py::arg("d_out"), py::arg("begins"),
        py::arg("places"), py::arg("d_table"), py::arg("stream"));
  m.def("qk_norm_backward", &qk_norm_backward, py::arg("qkv"), py::arg("shape"),
        py::arg("q_weight"), py::arg("k_weight"), py::arg("eps"), py::arg("d_qkv"),
        py::arg("stream"));
  bind_glu_backward(m, "swiglu_backward", &cuda::swiglu_backward);
  bind_glu_backward(m, "geglu_backward", &cuda::geglu_backward);
  m.def("rope_backward", &rope_backward, py::arg("d_qkv"), py::arg("shape"), py::arg("cos"),
        py::arg("sin"), py::arg("positions"), py::arg("stream"));
  m.def("attention_backward", &attention_backward, py::arg("qkv"), py::arg("shape"), py::arg("out"),
        py::arg("dout"), py::arg("lse"), py::arg("segments"), py::arg("max_rows"),
        py::arg("child_begin"), py::arg("children"), py::arg("block_table"), py::arg("kv"),
        py::arg("d_qkv"), py::arg("workspace"), py::arg("stream"));
  m.def("attention_backward_bytes", &cuda::attention_backward_bytes, py::arg("shape"),
        py::arg("rows"));
  m.def("linear_backward", &linear_backward, py::arg("dy"), py::arg("weight"), py::arg("residual"),
        py::arg("lora_down"), py::arg("lora_up"), py::arg("lora_scale"), py::arg("d_low"),
        py::arg("dx"), py::arg("stream"));
  m.def("lora_backward", &lora_backward, py::arg("x"), py::arg("lora_x"), py::arg("dy"),
        py::arg("d_low"), py::arg("lora_scale"), py::arg("d_a"), py::arg("d_b"),
        py::arg("workspace"), py::arg("stream"));
  m.def("lora_backward_bytes", &cuda::lora_backward_bytes, py::arg("rows"), py::arg("inputs"),
        py::arg("outputs"), py::arg("rank"));
}
