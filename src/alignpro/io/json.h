#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace alignpro::io {

struct JsonLimits {
  size_t max_bytes = size_t{64} << 20;
  size_t max_values =
      size_t{1} << 22;  // a value costs some 50 bytes here and may cost 2 in the file
  int max_depth = 64;   // the parser recurses
};

// One JSON value (RFC 8259). A parser of our own: src/ must build with nothing downloaded, and
// model files come from strangers, so that limits, exact integers and duplicate keys matter.
class Json {
 public:
  struct Number {
    double value = 0.0;
    int64_t integer = 0;      // meaningful when is_integer
    bool is_integer = false;  // written without fraction or exponent, and fits
  };
  struct Member;
  using Array = std::vector<Json>;
  using Object = std::vector<Member>;  // sorted by key, keys unique
  using Value = std::variant<std::monostate, bool, Number, std::string, Array, Object>;

  Json() = default;
  explicit Json(Value value) : value_(std::move(value)) {}

  // Throws FileError beginning with `source`: malformed text (with line and column), a duplicate
  // key, text that is not UTF-8, a number out of range, or a limit exceeded.
  static Json parse(std::string_view text, const std::string& source,
                    const JsonLimits& limits = {});

  // "null", "boolean", "number", "string", "array" or "object".
  std::string_view kind() const;

  bool is_null() const { return std::holds_alternative<std::monostate>(value_); }

  // Null pointers where the value is of another kind: the caller knows what it wanted and says so.
  const bool* boolean() const { return std::get_if<bool>(&value_); }
  const double* number() const;
  const int64_t* integer() const;
  const std::string* string() const { return std::get_if<std::string>(&value_); }
  const Array* array() const { return std::get_if<Array>(&value_); }
  const Object* object() const { return std::get_if<Object>(&value_); }

  // The member of an object; null where there is none or this is no object.
  const Json* find(std::string_view key) const;

 private:
  Value value_;
};

struct Json::Member {
  std::string key;
  Json value;
};

}  // namespace alignpro::io
