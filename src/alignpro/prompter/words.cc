#include "alignpro/prompter/words.h"

#include <algorithm>
#include <array>
#include <cstddef>

#include "alignpro/core/utf8.h"
#include "alignpro/prompter/unicode.h"

namespace alignpro::prompter {
namespace {

constexpr WordRule kGpt2{};
constexpr WordRule kSmolLm{.single_digits = true};
constexpr WordRule kQwen2{.most_digits = 1, .nfc = true};
constexpr WordRule kLlama3{.most_digits = 3, .ignore_merges = true};
constexpr WordRule kDbrx{.most_digits = 3};
constexpr WordRule kTekken{.most_digits = 1, .ignore_merges = true, .cased = true};
constexpr WordRule kGpt4o{.most_digits = 3, .cased = true, .contracted = true};

enum class Kind { kLetter, kNumber, kSpace, kOther };

Kind kind_of(char32_t code) {
  if (is_letter(code)) return Kind::kLetter;
  if (is_number(code)) return Kind::kNumber;
  return is_space(code) ? Kind::kSpace : Kind::kOther;
}

struct Char {
  char32_t code;
  Kind kind;
  size_t begin;  // in the text, in bytes
};

using Chars = std::vector<Char>;

bool is_line_end(const Char& c) { return c.code == '\r' || c.code == '\n'; }

// Characters [begin, end) of a text, cut by an expression's alternatives: each returns the end of
// its match at `at`, or `at` where there is none.
class Cutter {
 public:
  Cutter(const Chars& chars, size_t end, const WordRule& rule)
      : chars_(chars), end_(end), rule_(rule) {}

  size_t word_end(size_t at) const {
    return rule_.most_digits == 0 ? gpt2_end(at) : llama3_end(at);
  }

 private:
  // 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
  size_t gpt2_end(size_t at) const {
    if (const size_t end = contraction_end(at, false); end > at) return end;
    const size_t first = is(at, ' ') && at + 1 < end_ ? at + 1 : at;
    if (chars_[first].kind != Kind::kSpace) return run_end(first, chars_[first].kind);
    return spaces_end(at);
  }

  // (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*
  // |\s*[\r\n]+|\s+(?!\S)|\s+, with as many digits as the rule has. With case, `cased_end` is in
  // the place of the first two, and the last but three ends in [\r\n/]*.
  size_t llama3_end(size_t at) const {
    if (const size_t end = rule_.cased ? cased_end(at) : letters_end(at); end > at) return end;
    const Kind kind = chars_[at].kind;
    if (kind == Kind::kNumber) {
      return std::min(run_end(at, kind), at + static_cast<size_t>(rule_.most_digits));
    }
    const size_t first = is(at, ' ') ? at + 1 : at;
    if (is_kind(first, Kind::kOther)) {
      size_t end = run_end(first, Kind::kOther);
      while (end < end_ && (is_line_end(chars_[end]) || (rule_.cased && is(end, '/')))) ++end;
      return end;
    }
    for (size_t end = run_end(at, Kind::kSpace); end > at; --end) {
      if (is_line_end(chars_[end - 1])) return end;
    }
    return spaces_end(at);
  }

  size_t letters_end(size_t at) const {
    if (const size_t end = contraction_end(at, true); end > at) return end;
    const size_t first = may_precede(at) ? at + 1 : at;
    const size_t end = run_end(first, Kind::kLetter);
    return end > first ? end : at;
  }

  // [^\r\n\p{L}\p{N}]?U*L+C|[^\r\n\p{L}\p{N}]?U+L*C: U is [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}], L
  // [\p{Ll}\p{Lm}\p{Lo}\p{M}], and C a contraction or nothing.
  size_t cased_end(size_t at) const {
    for (const bool needs_lower : {true, false}) {
      for (size_t first = may_precede(at) ? at + 1 : at;; first = at) {
        size_t upper = first;
        while (is_upper(upper)) ++upper;
        size_t lower = upper;
        while (needs_lower && lower > first && !is_lower(lower)) --lower;  // U* gives back
        size_t end = lower;
        while (is_lower(end)) ++end;
        if (needs_lower ? end > lower : upper > first) {
          return rule_.contracted ? contraction_end(end, true) : end;
        }
        if (first == at) break;
      }
    }
    return at;
  }

  // Without the last one where a word follows, which takes it along.
  size_t spaces_end(size_t at) const {
    const size_t end = run_end(at, Kind::kSpace);
    return end == end_ || end == at + 1 ? end : end - 1;
  }

  size_t contraction_end(size_t at, bool any_case) const {
    if (!is(at, '\'')) return at;
    const auto letter = [&](size_t i) -> char32_t {
      if (i >= end_) return 0;
      const char32_t code = chars_[i].code;
      if (!any_case) return code;
      if (code == 0x17f) return 's';  // the long s, which folds to it
      return code >= 'A' && code <= 'Z' ? code + 32 : code;
    };
    const char32_t first = letter(at + 1), second = letter(at + 2);
    if (first == 's' || first == 't' || first == 'm' || first == 'd') return at + 2;
    const bool two =
        ((first == 'r' || first == 'v') && second == 'e') || (first == 'l' && second == 'l');
    return two ? at + 3 : at;
  }

  size_t run_end(size_t at, Kind kind) const {
    while (is_kind(at, kind)) ++at;
    return at;
  }

  bool is(size_t at, char32_t code) const { return at < end_ && chars_[at].code == code; }
  bool is_kind(size_t at, Kind kind) const { return at < end_ && chars_[at].kind == kind; }

  // [^\r\n\p{L}\p{N}]
  bool may_precede(size_t at) const {
    return !is_kind(at, Kind::kLetter) && !is_kind(at, Kind::kNumber) && !is_line_end(chars_[at]);
  }
  bool is_upper(size_t at) const {
    return at < end_ &&
           (is_kind(at, Kind::kLetter) ? !is_lowercase(chars_[at].code) : is_mark(chars_[at].code));
  }
  bool is_lower(size_t at) const {
    return at < end_ &&
           (is_kind(at, Kind::kLetter) ? !is_uppercase(chars_[at].code) : is_mark(chars_[at].code));
  }

  const Chars& chars_;
  const size_t end_;
  const WordRule& rule_;
};

struct Named {
  std::string_view name;
  const WordRule* rule;
};
// llama.cpp has many names for one rule.
constexpr std::array kNamed = {
    Named{"gpt-2", &kGpt2},     Named{"phi-2", &kGpt2},
    Named{"gigachat", &kGpt2},  Named{"exaone4", &kGpt2},
    Named{"a.x-4.0", &kGpt2},   Named{"mellum", &kGpt2},
    Named{"qwen2", &kQwen2},    Named{"deepseek-r1-qwen", &kQwen2},
    Named{"kormo", &kQwen2},    Named{"megrez", &kQwen2},
    Named{"smollm", &kSmolLm},  Named{"llama-bpe", &kLlama3},
    Named{"llama3", &kLlama3},  Named{"llama-v3", &kLlama3},
    Named{"falcon3", &kLlama3}, Named{"falcon-h1", &kLlama3},
    Named{"pixtral", &kLlama3}, Named{"midm-2.0", &kLlama3},
    Named{"dbrx", &kDbrx},      Named{"smaug-bpe", &kDbrx},
    Named{"tekken", &kTekken},  Named{"gpt-4o", &kGpt4o},
    Named{"llama4", &kGpt4o},
};

}  // namespace

const WordRule* find_word_rule(std::string_view name) {
  const auto found = std::ranges::find(kNamed, name, &Named::name);
  return found == kNamed.end() ? nullptr : found->rule;
}

std::vector<std::string_view> split_words(std::string_view text, const WordRule& rule) {
  Chars chars;
  for (size_t at = 0; at < text.size();) {
    const Decoded next = decode_utf8(text.substr(at));
    chars.push_back({next.code, kind_of(next.code), at});
    at += next.bytes;
  }
  std::vector<std::string_view> words;
  for (size_t begin = 0; begin < chars.size();) {
    size_t end = rule.single_digits ? begin : chars.size();
    if (rule.single_digits) {  // the expression sees what lies between two digits alone
      const auto is_digit = [&](size_t i) { return chars[i].kind == Kind::kNumber; };
      do ++end;
      while (end < chars.size() && !is_digit(begin) && !is_digit(end));
    }
    const Cutter cutter(chars, end, rule);
    while (begin < end) {
      const size_t after = cutter.word_end(begin);
      const size_t stop = after < chars.size() ? chars[after].begin : text.size();
      words.push_back(text.substr(chars[begin].begin, stop - chars[begin].begin));
      begin = after;
    }
  }
  return words;
}

}  // namespace alignpro::prompter
