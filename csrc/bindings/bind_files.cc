#include "bind_files.h"

#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "alignpro/core/error.h"
#include "alignpro/model/end_of_text.h"
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
  if (const Json::Number* number = value.number()) return py::float_(number->value);
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

py::object json(const ModelFiles& files, const std::string& name) {
  const Json* root = [&] {
    const GilRelease unlocked;
    return files.json(name);
  }();
  if (root == nullptr) return py::none();
  return to_python(*root, (files.path() / name).string());
}

// The ids of metadata that is no file; what is not as GGUF has it is for the tokenizer to refuse.
std::vector<int32_t> metadata_eos_ids(const py::dict& metadata) {
  model::GgufVocabulary vocabulary{
      .find_id = [&metadata](std::string_view key) -> std::optional<int64_t> {
        const py::str name(key.data(), key.size());
        if (!metadata.contains(name) || !py::isinstance<py::int_>(metadata[name])) return {};
        const int64_t id = PyLong_AsLongLong(py::object(metadata[name]).ptr());
        if (PyErr_Occurred() != nullptr) PyErr_Clear();  // beyond 64 bits: -1, which is no id
        return id;
      },
      .tokens = {},
      .types = {}};
  const auto listed = [&metadata](const char* key) {
    const bool there = metadata.contains(key) && py::isinstance<py::list>(metadata[key]);
    return there ? py::list(metadata[key]) : py::list();
  };
  for (const py::handle token : listed("tokenizer.ggml.tokens")) {
    Py_ssize_t size = 0;
    const char* text =
        PyUnicode_Check(token.ptr()) ? PyUnicode_AsUTF8AndSize(token.ptr(), &size) : "";
    if (text == nullptr) PyErr_Clear();
    vocabulary.tokens.emplace_back(text == nullptr ? "" : text, static_cast<size_t>(size));
  }
  for (const py::handle type : listed("tokenizer.ggml.token_type")) {
    vocabulary.types.push_back(py::isinstance<py::int_>(type) ? type.cast<int64_t>() : 0);
  }
  vocabulary.size = static_cast<int64_t>(vocabulary.tokens.size());
  return model::end_of_text_ids(vocabulary);
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
      .def("eos_ids", [](const ModelFiles& files) { return model::end_of_text_ids(files); });
  m.def("metadata_eos_ids", &metadata_eos_ids, py::arg("metadata"));
}
