#include "bind.h"

#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "alignpro/core/error.h"
#include "alignpro/io/safetensors.h"
#include "alignpro/model/checkpoint.h"
#include "alignpro/model/end_of_text.h"
#include "array.h"
#include "gil.h"

namespace py = pybind11;
using namespace alignpro;
using bindings::GilRelease;
using model::ModelFiles;

namespace {

using io::GgufType;
using io::GgufValue;
using io::Json;

// Strings of both formats are UTF-8 by definition; a repaired one would be another token.
py::str to_str(std::string_view text, const std::string& where) {
  PyObject* decoded =
      PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "strict");
  if (decoded == nullptr) {
    if (!PyErr_ExceptionMatches(PyExc_UnicodeDecodeError)) throw py::error_already_set();
    PyErr_Clear();
    throw FileError(cat(where, " is not UTF-8: \"", io::printable(text), "\""));
  }
  return py::reinterpret_steal<py::str>(decoded);
}

py::object to_python(const GgufValue& value, const std::string& where) {
  switch (value.type()) {
    case GgufType::kBool:
      return py::bool_(*value.boolean());
    case GgufType::kString:
      return to_str(*value.string(), where);
    case GgufType::kF32:
    case GgufType::kF64:
      return py::float_(*value.number());
    case GgufType::kArray: {
      py::list items;
      value.for_each([&](const GgufValue& item) { items.append(to_python(item, where)); });
      return items;
    }
    default:
      break;
  }
  if (const std::optional<int64_t> whole = value.integer()) return py::int_(*whole);
  return py::int_(*value.unsigned_integer());  // above 2^63
}

py::object to_python(const Json& value, const std::string& where) {
  if (const bool* boolean = value.boolean()) return py::bool_(*boolean);
  if (const std::string* text = value.string()) return to_str(*text, where);
  if (const int64_t* integer = value.integer()) return py::int_(*integer);
  if (const double* number = value.number()) return py::float_(*number);
  if (const Json::Array* array = value.array()) {
    py::list items(array->size());
    for (size_t i = 0; i < array->size(); ++i) items[i] = to_python((*array)[i], where);
    return items;
  }
  if (const Json::Object* object = value.object()) {
    py::dict members;
    for (const auto& [key, item] : *object) members[to_str(key, where)] = to_python(item, where);
    return members;
  }
  return py::none();
}

py::object metadata(const ModelFiles& files) {
  if (files.gguf() == nullptr) return py::none();
  py::dict out;
  for (const auto& [key, value] : files.gguf()->metadata()) {
    const std::string where =
        cat(files.gguf()->name(), ": metadata key '", io::printable(key), "'");
    out[to_str(key, where)] = to_python(value, where);
  }
  return out;
}

// The embedding or the output head, [vocab, hidden].
py::array_t<float> table(const ModelFiles& files, const std::string& name) {
  require(name == "embed_tokens" || name == "lm_head",
          "table: expected embed_tokens or lm_head, got ", name);
  std::vector<float> values;
  int64_t rows = 0, cols = 0;
  {
    const GilRelease unlocked;
    const auto checkpoint = model::Checkpoint::open(files);
    const auto stored = name == "lm_head" ? checkpoint->head_rows() : checkpoint->embedding_rows();
    rows = static_cast<int64_t>(stored.size());
    cols = checkpoint->config().hidden_size;
    values.resize(static_cast<size_t>(rows * cols));
    float* to = values.data();
    for (const ops::QuantizedRow& row : stored) {
      dequantize(row.dtype, row.data, cols, to);
      to += cols;
    }
  }
  return bindings::to_array(values, rows, cols);
}

py::object json(const ModelFiles& files, const std::string& name) {
  const Json* root = [&] {
    const GilRelease unlocked;
    return files.json(name);
  }();
  if (root == nullptr) return py::none();
  return to_python(*root, (files.path() / name).string());
}

}  // namespace

namespace alignpro::bindings {

ModelFiles files_from(const py::object& model) {
  if (py::isinstance<ModelFiles>(model)) return model.cast<ModelFiles>();
  const auto path = model.cast<std::string>();
  const GilRelease unlocked;
  return ModelFiles(path);
}

}  // namespace alignpro::bindings

void bind_files(py::module_& m) {
  py::class_<ModelFiles>(m, "ModelFiles")
      .def(py::init([](const std::string& path) {
             const GilRelease unlocked;
             return ModelFiles(path);
           }),
           py::arg("path"))
      .def_property_readonly("path", [](const ModelFiles& f) { return f.path().string(); })
      .def("metadata", &metadata)
      .def("json", &json, py::arg("name"))
      .def("table", &table, py::arg("name"))
      .def("eos_ids", [](const ModelFiles& files) { return model::end_of_text_ids(files); });
  m.def(
      "list_weight_files", [](const std::string& folder) { return io::list_weight_files(folder); },
      py::arg("folder"));
  m.attr("GGUF_END_KEYS") =
      std::vector<std::string>(std::begin(model::kGgufEndKeys), std::end(model::kGgufEndKeys));
  m.def(
      "end_of_text_ids",
      [](const std::vector<int64_t>& named, const std::vector<std::string>& tokens,
         const std::vector<int64_t>& types) {
        const std::vector<std::string_view> texts(tokens.begin(), tokens.end());
        return model::end_of_text_ids(named, texts, types, static_cast<int64_t>(texts.size()));
      },
      py::arg("named"), py::arg("tokens"), py::arg("types"));
}
