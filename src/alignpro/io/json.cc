#include "alignpro/io/json.h"

#include <algorithm>
#include <charconv>
#include <utility>

#include "alignpro/core/error.h"
#include "alignpro/core/utf8.h"
#include "alignpro/io/mapped_file.h"

namespace alignpro::io {
namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }

class Parser {
 public:
  Parser(std::string_view text, const std::string& source, const JsonLimits& limits)
      : text_(text), source_(source), limits_(limits) {}

  Json document() {
    require<FileError>(text_.size() <= limits_.max_bytes, source_, ": JSON of ", text_.size(),
                       " bytes is over the limit of ", limits_.max_bytes);
    take_word("\xef\xbb\xbf");  // a byte order mark, which editors write and no value begins with
    Json root = value(0);
    skip_space();
    if (at_ != text_.size()) fail("unexpected text after the JSON value");
    return root;
  }

 private:
  [[noreturn]] void fail(std::string_view what) const {
    const std::string_view before = text_.substr(0, at_);
    const auto line = 1 + std::count(before.begin(), before.end(), '\n');
    const size_t newline = before.rfind('\n');
    const size_t column = newline == std::string_view::npos ? at_ + 1 : at_ - newline;
    throw FileError(cat(source_, ": JSON line ", line, ", column ", column, ": ", what));
  }

  void skip_space() {
    while (at_ < text_.size()) {
      const char c = text_[at_];
      if (c != ' ' && c != '\n' && c != '\r' && c != '\t') return;
      ++at_;
    }
  }

  // The next character, or '\0' at the end; a NUL in the text is no JSON either.
  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  bool take(char c) {
    if (peek() != c || at_ >= text_.size()) return false;
    ++at_;
    return true;
  }

  bool take_word(std::string_view word) {
    if (!text_.substr(at_).starts_with(word)) return false;
    at_ += word.size();
    return true;
  }

  Json value(int depth) {
    if (depth >= limits_.max_depth) fail("nested too deeply");
    if (++values_ > limits_.max_values) fail("too many values");
    skip_space();
    switch (peek()) {
      case '{':
        return Json(Json::Value(object(depth)));
      case '[':
        return Json(Json::Value(array(depth)));
      case '"':
        return Json(Json::Value(string()));
      case 't':
        if (take_word("true")) return Json(Json::Value(true));
        break;
      case 'f':
        if (take_word("false")) return Json(Json::Value(false));
        break;
      case 'n':
        if (take_word("null")) return Json();
        break;
      default:
        if (peek() == '-' || is_digit(peek())) return Json(Json::Value(number()));
    }
    fail(at_ == text_.size() ? "the text ends where a value is due" : "expected a value");
  }

  Json::Object object(int depth) {
    Json::Object members;
    ++at_;
    skip_space();
    if (take('}')) return members;
    do {
      skip_space();
      if (peek() != '"') fail("expected a key in double quotes");
      std::string key = string();
      skip_space();
      if (!take(':')) fail("expected ':' after a key");
      Json member = value(depth + 1);
      members.push_back({std::move(key), std::move(member)});
      skip_space();
    } while (take(','));
    if (!take('}')) fail("expected ',' or '}'");
    std::ranges::sort(members, {}, &Json::Member::key);
    const auto twin = std::ranges::adjacent_find(members, {}, &Json::Member::key);
    if (twin != members.end()) fail(cat("duplicate key '", printable(twin->key), "'"));
    return members;
  }

  Json::Array array(int depth) {
    Json::Array items;
    ++at_;
    skip_space();
    if (take(']')) return items;
    do {
      items.push_back(value(depth + 1));
      skip_space();
    } while (take(','));
    if (!take(']')) fail("expected ',' or ']'");
    return items;
  }

  uint32_t hex4() {
    const std::string_view four = text_.substr(at_, 4);
    uint32_t code = 0;
    const char* end = std::from_chars(four.data(), four.data() + four.size(), code, 16).ptr;
    at_ += static_cast<size_t>(end - four.data());
    if (end != four.data() + 4) fail("expected four hexadecimal digits after \\u");
    return code;
  }

  void escape(std::string* out) {
    constexpr std::string_view kNames = "\"\\/bfnrt", kMeant = "\"\\/\b\f\n\r\t";
    const char c = peek();
    if (const size_t known = kNames.find(c); known != std::string_view::npos) {
      ++at_;
      return out->push_back(kMeant[known]);
    }
    if (!take('u')) fail("unknown escape in a string");
    uint32_t code = hex4();
    if (code >= 0xdc00 && code < 0xe000) fail("lone low surrogate in a string");
    if (code >= 0xd800 && code < 0xdc00) {
      if (!take_word("\\u")) fail("lone high surrogate in a string");
      const uint32_t low = hex4();
      if (low < 0xdc00 || low >= 0xe000) fail("lone high surrogate in a string");
      code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    }
    append_utf8(code, out);
  }

  std::string string() {
    std::string out;
    ++at_;
    while (at_ < text_.size()) {
      const char c = text_[at_];
      if (c == '"') {
        ++at_;
        return out;
      }
      if (static_cast<unsigned char>(c) < 0x20) fail("control character in a string");
      if (c == '\\') {
        ++at_;
        escape(&out);
        continue;
      }
      const Decoded next = decode_utf8(text_.substr(at_));
      if (!next.well_formed) fail("the text is not UTF-8");
      out.append(text_.substr(at_, next.bytes));
      at_ += next.bytes;
    }
    fail("unterminated string");
  }

  void digits() {
    if (!is_digit(peek())) fail("malformed number");
    while (is_digit(peek())) ++at_;
  }

  Json::Number number() {
    const size_t begin = at_;
    take('-');
    if (!take('0')) digits();
    const size_t integer_end = at_;
    if (take('.')) digits();
    if (peek() == 'e' || peek() == 'E') {
      ++at_;
      if (!take('+')) take('-');
      digits();
    }
    const char* first = text_.data() + begin;
    const char* last = text_.data() + at_;
    Json::Number out;
    if (std::from_chars(first, last, out.value).ec != std::errc()) fail("number out of range");
    if (at_ == integer_end) {
      out.is_integer = std::from_chars(first, last, out.integer).ec == std::errc();
    }
    return out;
  }

  std::string_view text_;
  const std::string& source_;
  const JsonLimits& limits_;
  size_t at_ = 0;
  size_t values_ = 0;
};

}  // namespace

Json Json::parse(std::string_view text, const std::string& source, const JsonLimits& limits) {
  return Parser(text, source, limits).document();
}

std::string_view Json::kind() const {
  constexpr std::string_view kKinds[] = {"null", "boolean", "number", "string", "array", "object"};
  return kKinds[value_.index()];
}

const double* Json::number() const {
  const auto* n = std::get_if<Number>(&value_);
  return n == nullptr ? nullptr : &n->value;
}

const int64_t* Json::integer() const {
  const auto* n = std::get_if<Number>(&value_);
  return n != nullptr && n->is_integer ? &n->integer : nullptr;
}

const Json* Json::find(std::string_view key) const {
  const Object* members = object();
  if (members == nullptr) return nullptr;
  const auto at = std::ranges::lower_bound(*members, key, {}, &Member::key);
  return at != members->end() && at->key == key ? &at->value : nullptr;
}

}  // namespace alignpro::io
