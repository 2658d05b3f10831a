#include "bind_files.h"

#include <optional>
#include <string>
#include <string_view>

#include "alignpro/core/error.h"
#include "alignpro/io/gguf.h"
#include "gil.h"

namespace py = pybind11;
using alignpro::bindings::GilRelease;

namespace {

using alignpro::io::GgufType;
using alignpro::io::GgufValue;

// GGUF strings are UTF-8 by definition; a repaired one would be another token.
py::str to_str(std::string_view text, const std::string& where) {
  PyObject* decoded =
      PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "strict");
  if (decoded == nullptr) {
    if (!PyErr_ExceptionMatches(PyExc_UnicodeDecodeError)) throw py::error_already_set();
    PyErr_Clear();
    throw alignpro::FileError(
        alignpro::cat(where, " is not UTF-8: \"", alignpro::io::printable(text), "\""));
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

py::dict read_gguf_metadata(const std::string& path) {
  const alignpro::io::GgufFile file = [&path] {
    const GilRelease unlocked;
    return alignpro::io::GgufFile(path);
  }();
  py::dict out;
  for (const auto& [key, value] : file.metadata()) {
    const std::string where =
        alignpro::cat(path, ": metadata key '", alignpro::io::printable(key), "'");
    out[to_str(key, where)] = to_python(value, where);
  }
  return out;
}

}  // namespace

void bind_files(py::module_& m) {
  m.def("read_gguf_metadata", &read_gguf_metadata, py::arg("path"));
}
