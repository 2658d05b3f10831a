#include "cuda_ops.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "bindings/gil.h"
#include "cuda/ops.h"
#include "cuda/products.h"
#include "device_call.h"

namespace py = pybind11;
using namespace alignpro;
using namespace alignpro::bindings;

namespace {

void embedding(const py::object& table, const py::object& tokens, float scale,
               const py::object& out, uintptr_t stream) {
  Call call("embedding");
  const cuda::Matrix to = call.matrix(out, "out"), from = call.matrix(table, "table");
  const int32_t* ids = call.ints(tokens, "tokens", to.rows);
  const GilRelease release;
  cuda::embedding(from, ids, scale, to, stream_of(stream));
}

void soft_rows(const py::object& soft, const py::object& tokens, const py::object& out,
               uintptr_t stream) {
  Call call("soft_rows");
  const cuda::Matrix to = call.matrix(out, "out"), from = call.matrix(soft, "soft");
  const int32_t* ids = call.ints(tokens, "tokens", to.rows);
  const GilRelease release;
  cuda::soft_rows(from, ids, to, stream_of(stream));
}

// begins [rows of out + 1] and rows: int32; weights: float32.
void mix_rows(const py::object& x, const py::object& begins, const py::object& rows,
              const py::object& weights, const py::object& out, uintptr_t stream) {
  Call call("mix_rows");
  const cuda::Matrix from = call.matrix(x, "x"), to = call.matrix(out, "out");
  const int32_t* first = call.ints(begins, "begins", to.rows + 1);
  const int32_t* of = call.ints(rows, "rows", 0);
  const float* by = call.floats<float>(weights, "weights", 0);
  const GilRelease release;
  cuda::mix_rows(from, first, of, by, to, stream_of(stream));
}

void rms_norm(const py::object& x, const py::object& weight, float eps, const py::object& y,
              uintptr_t stream) {
  Call call("rms_norm");
  const cuda::Matrix from = call.matrix(x, "x"), to = call.matrix(y, "y");
  const void* w = call.vector(weight, "weight", from.cols, from.dtype);
  const GilRelease release;
  cuda::rms_norm(from, w, eps, to, stream_of(stream));
}

void rms_norm_add(const py::object& x, const py::object& weight, float eps,
                  const py::object& residual, const py::object& y, uintptr_t stream) {
  Call call("rms_norm_add");
  const cuda::Matrix from = call.matrix(x, "x"), to = call.matrix(y, "y");
  const cuda::Matrix before = call.matrix(residual, "residual");
  const void* w = call.vector(weight, "weight", from.cols, from.dtype);
  const GilRelease release;
  cuda::rms_norm_add(from, w, eps, before, to, stream_of(stream));
}

// swiglu or geglu.
using Glu = decltype(&cuda::swiglu);
void bind_glu(py::module_& m, const char* name, Glu op) {
  m.def(
      name,
      [name, op](const py::object& gate_up, const py::object& h, uintptr_t stream) {
        Call call(name);
        const cuda::Matrix from = call.matrix(gate_up, "gate_up"), to = call.matrix(h, "h");
        const GilRelease release;
        op(from, to, stream_of(stream));
      },
      py::arg("gate_up"), py::arg("h"), py::arg("stream"));
}

void linear(const py::object& x, const py::object& weight, const py::object& bias,
            const py::object& residual, const py::object& lora_x, const py::object& lora_up,
            float lora_scale, const py::object& out, uintptr_t stream) {
  Call call("linear");
  const cuda::Matrix from = call.matrix(x, "x"), w = call.matrix(weight, "weight");
  const cuda::Matrix to = call.matrix(out, "out");
  cuda::LinearExtras extras;
  if (!bias.is_none()) extras.bias = call.vector(bias, "bias", w.rows, w.dtype);
  require(lora_x.is_none() == lora_up.is_none(), "lora_x, lora_up: expected both or neither");
  extras.residual = call.optional_matrix(residual, "residual");
  extras.lora_x = call.optional_matrix(lora_x, "lora_x");
  extras.lora_up = call.optional_matrix(lora_up, "lora_up");
  extras.lora_scale = lora_scale;
  const GilRelease release;
  cuda::linear(from, w, extras, to, stream_of(stream));
}

cuda::AttentionShape attention_shape(int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                                     int64_t sliding_window, float scale) {
  return {num_heads, num_kv_heads, head_dim, sliding_window, scale};
}

void qk_norm(const py::object& qkv, const cuda::AttentionShape& shape, const py::object& q_weight,
             const py::object& k_weight, float eps, uintptr_t stream) {
  Call call("qk_norm");
  const cuda::Matrix rows = call.matrix(qkv, "qkv");
  const void* q = call.vector(q_weight, "q_weight", shape.head_dim, rows.dtype);
  const void* k = call.vector(k_weight, "k_weight", shape.head_dim, rows.dtype);
  const GilRelease release;
  cuda::qk_norm(shape, rows, q, k, eps, stream_of(stream));
}

void rope_kv_write(const py::object& qkv, const cuda::AttentionShape& shape, const py::object& cos,
                   const py::object& sin, const py::object& positions, const py::object& blocks,
                   const py::object& kv, uintptr_t stream) {
  Call call("rope_kv_write");
  const cuda::Matrix rows = call.matrix(qkv, "qkv");
  const int64_t half = call.tensor(cos, "cos", 2).size(1);
  const float* c = call.floats<float>(cos, "cos", 0, 2);
  const float* s = call.floats<float>(sin, "sin", 0, 2);
  const int32_t* at = call.ints(positions, "positions", rows.rows);
  const int32_t* to = call.ints(blocks, "blocks", rows.rows);
  const cuda::PagedKv pool = call.paged_kv(kv, shape, rows.dtype);
  const GilRelease release;
  cuda::rope_kv_write(shape, rows, 2 * half, c, s, at, to, pool, stream_of(stream));
}

// (from, to, slot) each, int32 [copies, 3].
void kv_copy(const py::object& copies, const cuda::AttentionShape& shape, const py::object& kv,
             uintptr_t stream) {
  Call call("kv_copy");
  static_assert(sizeof(cuda::KvCopy) == 12);
  const DeviceTensor& listed = call.tensor(copies, "copies", 2);
  const auto* list = reinterpret_cast<const cuda::KvCopy*>(
      listed.values<int32_t>(DlType::kInt, 3 * listed.size(0)));
  const DType dtype = call.tensor(kv, "kv", 5).dtype();
  const cuda::PagedKv pool = call.paged_kv(kv, shape, dtype);
  const GilRelease release;
  cuda::kv_copy(shape, dtype, list, listed.size(0), pool, stream_of(stream));
}

void attention_decode(const py::object& qkv, const cuda::AttentionShape& shape,
                      const py::object& positions, const py::object& block_table,
                      int64_t max_positions, const py::object& kv, const py::object& workspace,
                      const py::object& out, uintptr_t stream) {
  Call call("attention_decode");
  const cuda::Matrix rows = call.matrix(qkv, "qkv"), to = call.matrix(out, "out");
  const int32_t* at = call.ints(positions, "positions", rows.rows);
  const DeviceTensor& table = call.tensor(block_table, "block_table", 2, Rows::kApart);
  require(table.size(0) == rows.rows, "block_table: expected ", rows.rows, " rows as qkv, got ",
          table.size(0));
  const int32_t* blocks = table.values<int32_t>(DlType::kInt, 0);
  const cuda::PagedKv pool = call.paged_kv(kv, shape, rows.dtype);
  void* memory =
      call.workspace(workspace, cuda::attention_decode_bytes(shape, rows.rows, max_positions));
  const GilRelease release;
  cuda::attention_decode(shape, rows, at, blocks, table.ld(), max_positions, pool, memory, to,
                         stream_of(stream));
}

// lse: float32 [rows, num_heads], or None.
void attention_prefill(const py::object& qkv, const cuda::AttentionShape& shape,
                       const py::object& segments, int64_t max_rows, const py::object& block_table,
                       const py::object& kv, const py::object& out, const py::object& lse,
                       uintptr_t stream) {
  Call call("attention_prefill");
  const cuda::Matrix rows = call.matrix(qkv, "qkv"), to = call.matrix(out, "out");
  const DeviceTensor& table = call.tensor(block_table, "block_table", 2, Rows::kApart);
  const cuda::Segment* own = call.segments(segments, table.size(0));
  const int32_t* blocks = table.values<int32_t>(DlType::kInt, 0);
  const cuda::PagedKv pool = call.paged_kv(kv, shape, rows.dtype);
  float* sums = call.floats<float>(lse, "lse", rows.rows * shape.num_heads, 2);
  const GilRelease release;
  cuda::attention_prefill(shape, rows, own, table.size(0), max_rows, blocks, table.ld(), pool, to,
                          sums, stream_of(stream));
}

cuda::LogprobInput logprob_input(Call& call, const py::object& hidden, const py::object& weight,
                                 const py::object& tokens, float temperature,
                                 const py::object& reference_hidden,
                                 const py::object& reference_weight) {
  cuda::LogprobInput in;
  in.hidden = call.matrix(hidden, "hidden");
  in.weight = call.matrix(weight, "weight");
  in.tokens = call.ints(tokens, "tokens", in.hidden.rows);
  in.temperature = temperature;
  require(!reference_hidden.is_none() || reference_weight.is_none(),
          "reference_weight: given without reference_hidden; pass both or neither");
  in.ref_hidden = call.optional_matrix(reference_hidden, "reference_hidden");
  in.ref_weight =
      reference_weight.is_none() ? in.weight : call.matrix(reference_weight, "reference_weight");
  return in;
}

// The names of the CPU op: float32 [rows], but for the normalisers.
cuda::LogprobOutput logprob_output(Call& call, const py::dict& forward, int64_t rows,
                                   bool with_reference) {
  const auto of = [&](const char* name) -> py::object {
    return forward.contains(name) ? py::object(forward[name]) : py::none();
  };
  const auto floats = [&](const char* name) { return call.floats<float>(of(name), name, rows); };
  cuda::LogprobOutput out{floats("logprob"),
                          floats("entropy"),
                          floats("kl"),
                          floats("reverse_kl"),
                          floats("reference_logprob"),
                          call.floats<double>(of("lse"), "lse", rows),
                          call.floats<double>(of("reference_lse"), "reference_lse", rows)};
  require(out.logprob != nullptr && out.entropy != nullptr && out.lse != nullptr,
          "forward: expected logprob, entropy and lse");
  require(!with_reference || (out.kl != nullptr && out.reverse_kl != nullptr &&
                              out.ref_logprob != nullptr && out.ref_lse != nullptr),
          "forward: expected kl, reverse_kl, reference_logprob and reference_lse with a reference");
  return out;
}

void linear_logprob(const py::object& hidden, const py::object& weight, const py::object& tokens,
                    float temperature, const py::object& reference_hidden,
                    const py::object& reference_weight, const py::dict& forward,
                    const py::object& workspace, uintptr_t stream) {
  Call call("linear_logprob");
  const cuda::LogprobInput in =
      logprob_input(call, hidden, weight, tokens, temperature, reference_hidden, reference_weight);
  const cuda::LogprobOutput out =
      logprob_output(call, forward, in.hidden.rows, in.ref_hidden.rows > 0);
  void* memory = call.workspace(workspace, cuda::linear_logprob_bytes(in));
  const GilRelease release;
  cuda::linear_logprob(in, out, memory, stream_of(stream));
}

// Given what linear_logprob wrote; total_variation and mass_above: float32 [rows].
void total_variation(const py::object& hidden, const py::object& weight, const py::object& tokens,
                     float temperature, const py::object& reference_hidden,
                     const py::object& reference_weight, const py::dict& forward,
                     const py::object& total_variation, const py::object& mass_above,
                     const py::object& workspace, uintptr_t stream) {
  Call call("total_variation");
  const cuda::LogprobInput in =
      logprob_input(call, hidden, weight, tokens, temperature, reference_hidden, reference_weight);
  const cuda::LogprobOutput saved =
      logprob_output(call, forward, in.hidden.rows, in.ref_hidden.rows > 0);
  const auto to = [&](const py::object& object, const char* name) {
    return call.tensor(object, name, 1).values<float>(DlType::kFloat, in.hidden.rows);
  };
  float *tv = to(total_variation, "total_variation"), *above = to(mass_above, "mass_above");
  void* memory = call.workspace(workspace, cuda::total_variation_bytes(in));
  const GilRelease release;
  cuda::total_variation(in, saved, tv, above, memory, stream_of(stream));
}

void linear_logprob_backward(const py::object& hidden, const py::object& weight,
                             const py::object& tokens, float temperature,
                             const py::object& reference_hidden, const py::object& reference_weight,
                             const py::dict& forward, const py::dict& upstream,
                             const py::object& d_hidden, const py::object& d_weight,
                             const py::object& workspace, uintptr_t stream) {
  Call call("linear_logprob_backward");
  const cuda::LogprobInput in =
      logprob_input(call, hidden, weight, tokens, temperature, reference_hidden, reference_weight);
  const cuda::LogprobOutput saved =
      logprob_output(call, forward, in.hidden.rows, in.ref_hidden.rows > 0);
  const auto given = [&](const char* name) -> const float* {
    return upstream.contains(name)
               ? call.floats<float>(py::object(upstream[name]), name, in.hidden.rows)
               : nullptr;
  };
  const cuda::LogprobUpstream d{given("logprob"),    given("entropy"),         given("kl"),
                                given("reverse_kl"), given("total_variation"), given("mass_above")};
  const cuda::Matrix to_hidden = call.optional_matrix(d_hidden, "d_hidden");
  const cuda::Matrix to_weight = call.optional_matrix(d_weight, "d_weight");
  void* memory = call.workspace(workspace, cuda::linear_logprob_backward_bytes(in));
  const GilRelease release;
  cuda::linear_logprob_backward(in, saved, d, to_hidden, to_weight, memory, stream_of(stream));
}

// rows: the fields of cuda::SampleRow each, as bytes of the device: uint8 [rows, 32]. banned:
// int32, and kept_mass: float32 [rows], or None where no row is truncated.
void head_sample(const py::object& hidden, const py::object& head, const py::object& rows,
                 const py::object& tokens, const py::object& logprobs, const py::object& banned,
                 const py::object& kept_mass, const py::object& workspace, uintptr_t stream) {
  Call call("head_sample");
  const cuda::Matrix h = call.matrix(hidden, "hidden"), w = call.matrix(head, "head");
  static_assert(sizeof(cuda::SampleRow) == 32);
  const auto* draws = reinterpret_cast<const cuda::SampleRow*>(
      call.tensor(rows, "rows", 2).values<uint8_t>(DlType::kUInt, h.rows * 32));
  auto* ids = call.tensor(tokens, "tokens", 1).values<int32_t>(DlType::kInt, h.rows);
  auto* values = call.tensor(logprobs, "logprobs", 1).values<float>(DlType::kFloat, h.rows);
  require(banned.is_none() == kept_mass.is_none(), "banned, kept_mass: expected both or neither");
  const bool truncated = !kept_mass.is_none();
  cuda::Truncation truncation;
  if (truncated) {
    truncation.banned = call.ints(banned, "banned", 0);
    truncation.kept_mass = call.floats<float>(kept_mass, "kept_mass", h.rows);
  }
  void* memory = call.workspace(workspace, cuda::head_sample_bytes(h.rows, w.rows, truncated));
  const GilRelease release;
  cuda::head_sample(h, w, draws, ids, values, memory, stream_of(stream),
                    truncated ? &truncation : nullptr);
}

}  // namespace

void bind_cuda_ops(py::module_& m) {
  // How its ops multiply bfloat16 matrices: by mma.sync, or by wgmma where this says so.
  const char* products = std::getenv("ALIGNPRO_TEST_PRODUCTS");
  if (products != nullptr && std::string_view(products) == "wgmma") {
    cuda::set_products(cuda::Products::kWgmma);
  }
  py::class_<cuda::AttentionShape>(m, "AttentionShape")
      .def(py::init(&attention_shape), py::arg("num_heads"), py::arg("num_kv_heads"),
           py::arg("head_dim"), py::arg("sliding_window"), py::arg("scale"));
  m.def("embedding", &embedding, py::arg("table"), py::arg("tokens"), py::arg("scale"),
        py::arg("out"), py::arg("stream"));
  m.def("soft_rows", &soft_rows, py::arg("soft"), py::arg("tokens"), py::arg("out"),
        py::arg("stream"));
  m.def("mix_rows", &mix_rows, py::arg("x"), py::arg("begins"), py::arg("rows"), py::arg("weights"),
        py::arg("out"), py::arg("stream"));
  m.def("rms_norm", &rms_norm, py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("y"),
        py::arg("stream"));
  m.def("rms_norm_add", &rms_norm_add, py::arg("x"), py::arg("weight"), py::arg("eps"),
        py::arg("residual"), py::arg("y"), py::arg("stream"));
  bind_glu(m, "swiglu", &cuda::swiglu);
  bind_glu(m, "geglu", &cuda::geglu);
  m.def("linear", &linear, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("residual"),
        py::arg("lora_x"), py::arg("lora_up"), py::arg("lora_scale"), py::arg("out"),
        py::arg("stream"));
  m.def("qk_norm", &qk_norm, py::arg("qkv"), py::arg("shape"), py::arg("q_weight"),
        py::arg("k_weight"), py::arg("eps"), py::arg("stream"));
  m.def("rope_kv_write", &rope_kv_write, py::arg("qkv"), py::arg("shape"), py::arg("cos"),
        py::arg("sin"), py::arg("positions"), py::arg("blocks"), py::arg("kv"), py::arg("stream"));
  m.def("kv_copy", &kv_copy, py::arg("copies"), py::arg("shape"), py::arg("kv"), py::arg("stream"));
  m.def("attention_decode", &attention_decode, py::arg("qkv"), py::arg("shape"),
        py::arg("positions"), py::arg("block_table"), py::arg("max_positions"), py::arg("kv"),
        py::arg("workspace"), py::arg("out"), py::arg("stream"));
  m.def("attention_decode_bytes", &cuda::attention_decode_bytes, py::arg("shape"), py::arg("rows"),
        py::arg("max_positions"));
  m.def("attention_prefill", &attention_prefill, py::arg("qkv"), py::arg("shape"),
        py::arg("segments"), py::arg("max_rows"), py::arg("block_table"), py::arg("kv"),
        py::arg("out"), py::arg("lse"), py::arg("stream"));
  m.def("linear_logprob", &linear_logprob, py::arg("hidden"), py::arg("weight"), py::arg("tokens"),
        py::arg("temperature"), py::arg("reference_hidden"), py::arg("reference_weight"),
        py::arg("forward"), py::arg("workspace"), py::arg("stream"));
  m.def("total_variation", &total_variation, py::arg("hidden"), py::arg("weight"),
        py::arg("tokens"), py::arg("temperature"), py::arg("reference_hidden"),
        py::arg("reference_weight"), py::arg("forward"), py::arg("total_variation"),
        py::arg("mass_above"), py::arg("workspace"), py::arg("stream"));
  m.def("linear_logprob_backward", &linear_logprob_backward, py::arg("hidden"), py::arg("weight"),
        py::arg("tokens"), py::arg("temperature"), py::arg("reference_hidden"),
        py::arg("reference_weight"), py::arg("forward"), py::arg("upstream"), py::arg("d_hidden"),
        py::arg("d_weight"), py::arg("workspace"), py::arg("stream"));
  const auto sized = [](int64_t rows, int64_t vocab, bool bfloat16) {
    cuda::LogprobInput in;
    in.hidden.rows = rows;
    in.hidden.dtype = bfloat16 ? DType::kBF16 : DType::kF32;
    in.weight.rows = vocab;
    return in;
  };
  m.def(
      "linear_logprob_bytes",
      [sized](int64_t rows, int64_t vocab) {
        return cuda::linear_logprob_bytes(sized(rows, vocab, false));
      },
      py::arg("rows"), py::arg("vocab"));
  m.def(
      "total_variation_bytes",
      [sized](int64_t rows, int64_t vocab) {
        return cuda::total_variation_bytes(sized(rows, vocab, false));
      },
      py::arg("rows"), py::arg("vocab"));
  m.def(
      "linear_logprob_backward_bytes",
      [sized](int64_t rows, int64_t vocab, bool bfloat16) {
        return cuda::linear_logprob_backward_bytes(sized(rows, vocab, bfloat16));
      },
      py::arg("rows"), py::arg("vocab"), py::arg("bfloat16"));
  m.def("head_sample", &head_sample, py::arg("hidden"), py::arg("head"), py::arg("rows"),
        py::arg("tokens"), py::arg("logprobs"), py::arg("banned"), py::arg("kept_mass"),
        py::arg("workspace"), py::arg("stream"));
  m.def("head_sample_bytes", &cuda::head_sample_bytes, py::arg("rows"), py::arg("vocab"),
        py::arg("with_truncation"));
  bind_cuda_ops_backward(m);
}
