#include "bind.h"

#include <pybind11/numpy.h>

#include <cmath>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "alignpro/core/dtype.h"
#include "alignpro/core/parallel.h"
#include "alignpro/io/gguf.h"
#include "alignpro/ops/linear_logprob.h"
#include "array.h"
#include "gil.h"

namespace py = pybind11;
using namespace alignpro;
using namespace alignpro::bindings;

namespace {

// The pool of the stand-alone ops: made anew of so many threads where they are given, and when it
// is first needed. Never destroyed: a daemon thread may still compute while the interpreter goes
// away.
std::shared_ptr<ThreadPool> ops_pool(int threads = 0) {
  static auto* mutex = new std::mutex;
  static auto* pool = new std::shared_ptr<ThreadPool>;
  auto fresh = threads > 0 ? std::make_shared<ThreadPool>(threads) : nullptr;
  const std::lock_guard lock(*mutex);
  if (fresh != nullptr) *pool = std::move(fresh);
  if (*pool == nullptr) *pool = std::make_shared<ThreadPool>(0);
  return *pool;
}

// A matrix of a GGUF file, mapped and read where it is used.
struct QuantizedWeight {
  std::shared_ptr<const io::GgufFile> file;
  ops::QuantizedMatrix matrix;

  static QuantizedWeight from_gguf(const std::string& path, const std::string& name) {
    auto file = std::make_shared<const io::GgufFile>(path);
    const auto found = file->tensors().find(name);
    require(found != file->tensors().end(), path, ": holds no tensor ", io::printable(name),
            "; it has ", file->tensors().size(), " others");
    const io::FileTensor& tensor = found->second;
    require(tensor.shape.size() == 2, path, ": ", name, ": expected a matrix, got shape ",
            io::shape_text(tensor.shape));
    const ops::QuantizedMatrix matrix{tensor.data.data(), tensor.dtype, tensor.shape[0],
                                      tensor.shape[1]};
    return {std::move(file), matrix};
  }
};

// What a weight argument points to, and what keeps it alive.
struct Weight {
  ops::VocabularyWeight view;
  py::object owner = py::none();
};

// float32 and float16 arrays; bfloat16, which numpy does not have, as its uint16 bits.
Weight weight_from(const py::handle& object, const std::string& name) {
  if (object.is_none()) return {};
  if (py::isinstance<QuantizedWeight>(object)) {
    return {object.cast<const QuantizedWeight&>().matrix,
            py::reinterpret_borrow<py::object>(object)};
  }
  const py::array array = contiguous_array(object, name, 2);
  DType dtype = DType::kF32;
  if (array.dtype().is(py::dtype::of<float>())) {
    dtype = DType::kF32;
  } else if (array.dtype().kind() == 'f' && array.itemsize() == 2) {
    dtype = DType::kF16;
  } else if (array.dtype().kind() == 'u' && array.itemsize() == 2) {
    dtype = DType::kBF16;
  } else {
    throw InvalidArgument(cat(name, ": expected float32, float16 or bfloat16, got ",
                              std::string(py::str(array.dtype()))));
  }
  return {ops::QuantizedMatrix{static_cast<const std::byte*>(array.data()), dtype, array.shape(0),
                               array.shape(1)},
          array};
}

// One call's arguments, checked, with what keeps them alive.
class Call {
 public:
  Call(const py::object& hidden, const py::object& weight, const py::object& tokens,
       float temperature, const py::object& reference_hidden, const py::object& reference_weight)
      : hidden_(float_array(hidden, "hidden", 2)),
        tokens_(contiguous_array(tokens, "tokens", 1)),
        weight_(weight_from(weight, "weight")),
        reference_weight_(weight_from(reference_weight, "reference_weight")) {
    require(!weight.is_none(), "weight: expected a matrix, got None");
    require(tokens_.dtype().is(py::dtype::of<int32_t>()), "tokens: expected int32, got ",
            std::string(py::str(tokens_.dtype())));
    rows = hidden_.shape(0);
    cols = hidden_.shape(1);
    vocab = weight_.view.rows();
    require(vocab >= 1, "weight: expected at least one row, got none");
    require(cols == weight_.view.cols(), "weight: expected ", cols, " columns as hidden, got ",
            weight_.view.cols());
    require(tokens_.shape(0) == rows, "tokens: expected ", rows, " as hidden, got ",
            tokens_.shape(0));
    require(std::isfinite(temperature) && temperature > 0.0f,
            "temperature: expected a finite number above 0, got ", temperature);
    input = {.rows = rows,
             .hidden = static_cast<const float*>(hidden_.data()),
             .weight = weight_.view,
             .tokens = {static_cast<const int32_t*>(tokens_.data()), static_cast<size_t>(rows)},
             .temperature = temperature};
    for (int64_t i = 0; i < rows; ++i) {
      const int32_t token = input.tokens[static_cast<size_t>(i)];
      require(token >= 0 && token < vocab, "tokens: expected ids in [0, ", vocab, "), got ", token);
    }
    if (reference_hidden.is_none()) {
      require(reference_weight.is_none(),
              "reference_weight: given without reference_hidden; pass both or neither");
      return;
    }
    reference_hidden_ = float_array(reference_hidden, "reference_hidden", 2);
    const ops::VocabularyWeight& reference =
        reference_weight.is_none() ? weight_.view : reference_weight_.view;
    require(reference.rows() == vocab, "reference_weight: expected the vocabulary of weight, ",
            vocab, " rows, got ", reference.rows());
    require(reference_hidden_.shape(0) == rows && reference_hidden_.shape(1) == reference.cols(),
            "reference_hidden: expected shape [", rows, ", ", reference.cols(), "], got [",
            reference_hidden_.shape(0), ", ", reference_hidden_.shape(1), "]");
    input.ref_hidden = static_cast<const float*>(reference_hidden_.data());
    input.ref_weight = reference_weight_.view;
  }

  bool with_reference() const { return input.ref_hidden != nullptr; }

  ops::LogprobInput input;
  int64_t rows, cols, vocab;

 private:
  py::array hidden_, tokens_, reference_hidden_;
  Weight weight_, reference_weight_;
};

py::array_t<float> make(int64_t rows) { return py::array_t<float>(rows); }
py::array_t<float> make(int64_t rows, int64_t cols) { return py::array_t<float>({rows, cols}); }

// What a forward leaves for a backward: float32, but for the normalisers.
constexpr const char* kForward[] = {"logprob", "entropy", "kl", "reverse_kl", "reference_logprob"};

template <typename T>
T* out_data(const py::object& array) {
  return array.is_none() ? nullptr : static_cast<T*>(py::array(array).mutable_data());
}

ops::LogprobOutput output_views(const py::dict& forward) {
  float* views[5];
  for (size_t i = 0; i < 5; ++i) views[i] = out_data<float>(forward[kForward[i]]);
  return {views[0],
          views[1],
          views[2],
          views[3],
          views[4],
          out_data<double>(forward["lse"]),
          out_data<double>(forward["reference_lse"])};
}

py::dict forward(const py::object& hidden, const py::object& weight, const py::object& tokens,
                 float temperature, const py::object& reference_hidden,
                 const py::object& reference_weight, bool with_jacobian) {
  const Call call(hidden, weight, tokens, temperature, reference_hidden, reference_weight);
  py::dict result;
  for (const char* name : kForward) {
    const std::string text(name);
    const bool needs_reference =
        text == "kl" || text == "reverse_kl" || text.compare(0, 9, "reference") == 0;
    result[name] = needs_reference && !call.with_reference() ? py::object(py::none())
                                                             : py::object(make(call.rows));
  }
  result["lse"] = py::array_t<double>(call.rows);
  result["reference_lse"] = py::none();
  if (call.with_reference()) result["reference_lse"] = py::array_t<double>(call.rows);
  result["d_logprob"] = py::none();
  result["d_kl"] = py::none();
  if (with_jacobian) {
    result["d_logprob"] = make(call.rows, call.cols);
    if (call.with_reference()) result["d_kl"] = make(call.rows, call.cols);
  }
  const ops::LogprobOutput out = output_views(result);
  const ops::LogprobJacobian jacobian{out_data<float>(result["d_logprob"]),
                                      out_data<float>(result["d_kl"])};
  const GilRelease release;
  ops::linear_logprob(call.input, out, with_jacobian ? &jacobian : nullptr, *ops_pool());
  return result;
}

py::tuple total_variation(const py::object& hidden, const py::object& weight,
                          const py::object& tokens, float temperature,
                          const py::object& reference_hidden, const py::object& reference_weight,
                          const py::dict& saved) {
  const Call call(hidden, weight, tokens, temperature, reference_hidden, reference_weight);
  py::array_t<float> tv = make(call.rows), mass = make(call.rows);
  float* tv_data = tv.mutable_data();
  float* mass_data = mass.mutable_data();
  const ops::LogprobOutput out = output_views(saved);
  {
    const GilRelease release;
    ops::total_variation(call.input, out, tv_data, mass_data, *ops_pool());
  }
  return py::make_tuple(tv, mass);
}

py::tuple backward(const py::object& hidden, const py::object& weight, const py::object& tokens,
                   float temperature, const py::object& reference_hidden,
                   const py::object& reference_weight, const py::dict& saved,
                   const py::object& mass_above, const py::dict& upstream, bool want_hidden,
                   bool want_weight) {
  const Call call(hidden, weight, tokens, temperature, reference_hidden, reference_weight);
  std::vector<py::array> alive;
  const auto given = [&](const char* name) -> const float* {
    if (!upstream.contains(name) || py::object(upstream[name]).is_none()) return nullptr;
    alive.push_back(float_array(upstream[name], std::string("gradient of ") + name, 1));
    require(alive.back().shape(0) == call.rows, "gradient of ", name, ": expected ", call.rows,
            " values, got ", alive.back().shape(0));
    return static_cast<const float*>(alive.back().data());
  };
  const ops::LogprobUpstream d{
      given("logprob"),    given("entropy"),         given("kl"),
      given("reverse_kl"), given("total_variation"), out_data<float>(mass_above)};
  py::object d_hidden = py::none(), d_weight = py::none();
  if (want_hidden) d_hidden = make(call.rows, call.cols);
  if (want_weight) d_weight = make(call.vocab, call.cols);
  const ops::LogprobOutput out = output_views(saved);
  const ops::LogprobJacobian jacobian{out_data<float>(saved["d_logprob"]),
                                      out_data<float>(saved["d_kl"])};
  float* to_hidden = out_data<float>(d_hidden);
  float* to_weight = out_data<float>(d_weight);
  {
    const GilRelease release;
    ops::linear_logprob_backward(call.input, out, jacobian.logprob != nullptr ? &jacobian : nullptr,
                                 d, to_hidden, to_weight, *ops_pool());
  }
  return py::make_tuple(d_hidden, d_weight);
}

int64_t peak_bytes(int64_t num_tokens, int64_t hidden_size, int64_t vocab_size,
                   const std::string& dtype, bool reference, bool gradient) {
  require(num_tokens >= 0 && hidden_size >= 1 && vocab_size >= 1,
          "peak_bytes: expected num_tokens >= 0 and sizes of 1 or more, got ", num_tokens, ", ",
          hidden_size, ", ", vocab_size);
  const std::optional<DType> stored = dtype_from_name(dtype);
  require(stored.has_value(),
          "peak_bytes: dtype: expected a storage format as F32, BF16 or Q8_0, got ", dtype);
  const ops::QuantizedMatrix weight{nullptr, *stored, vocab_size, hidden_size};
  const float something = 0.0f;  // only whether there is a reference counts
  const ops::LogprobInput input{.rows = num_tokens,
                                .hidden = &something,
                                .weight = weight,
                                .tokens = {},
                                .ref_hidden = reference ? &something : nullptr};
  const int64_t jacobian = gradient ? (reference ? 2 : 1) * num_tokens * hidden_size * 4 : 0;
  return jacobian + ops::linear_logprob_bytes(input, gradient, ops_pool()->size());
}

}  // namespace

void bind_ops(py::module_& m) {
  py::class_<QuantizedWeight>(m, "QuantizedWeight")
      .def_static(
          "from_gguf",
          [](const std::string& path, const std::string& name) {
            const GilRelease release;
            return QuantizedWeight::from_gguf(path, name);
          },
          py::arg("path"), py::arg("name"))
      .def_property_readonly("rows", [](const QuantizedWeight& w) { return w.matrix.rows; })
      .def_property_readonly("cols", [](const QuantizedWeight& w) { return w.matrix.cols; })
      .def_property_readonly(
          "dtype", [](const QuantizedWeight& w) { return std::string(dtype_name(w.matrix.dtype)); })
      .def_property_readonly("nbytes", [](const QuantizedWeight& w) {
        return w.matrix.rows * row_bytes(w.matrix.dtype, w.matrix.cols);
      });
  m.def("linear_logprob", &forward, py::arg("hidden"), py::arg("weight"), py::arg("tokens"),
        py::arg("temperature"), py::arg("reference_hidden"), py::arg("reference_weight"),
        py::arg("with_jacobian"));
  m.def("total_variation", &total_variation, py::arg("hidden"), py::arg("weight"),
        py::arg("tokens"), py::arg("temperature"), py::arg("reference_hidden"),
        py::arg("reference_weight"), py::arg("forward"));
  m.def("linear_logprob_backward", &backward, py::arg("hidden"), py::arg("weight"),
        py::arg("tokens"), py::arg("temperature"), py::arg("reference_hidden"),
        py::arg("reference_weight"), py::arg("forward"), py::arg("mass_above"), py::arg("upstream"),
        py::arg("want_hidden"), py::arg("want_weight"));
  m.def("linear_logprob_bytes", &peak_bytes, py::arg("num_tokens"), py::arg("hidden_size"),
        py::arg("vocab_size"), py::arg("dtype"), py::arg("reference"), py::arg("gradient"));
  m.def("ops_threads", [] { return ops_pool()->size(); });
  m.def(
      "set_ops_threads",
      [](int threads) {
        require(threads >= 1, "threads: expected 1 or more, got ", threads);
        ops_pool(threads);
      },
      py::arg("threads"));
}
