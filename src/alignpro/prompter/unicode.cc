#include "alignpro/prompter/unicode.h"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <utility>

#include "alignpro/core/utf8.h"
#include "alignpro/prompter/unicode_tables.h"

namespace alignpro::prompter {
namespace {

// The row whose range holds a character; null for none.
template <typename Row, size_t Size>
const Row* find_range(const Row (&rows)[Size], char32_t code) {
  const Row* after = std::ranges::upper_bound(rows, code, {}, &Row::first);
  return after != rows && code <= std::prev(after)->last ? std::prev(after) : nullptr;
}

// Hangul syllables are composed by arithmetic (The Unicode Standard, 3.12).
constexpr char32_t kSyllables = 0xac00, kLeads = 0x1100, kVowels = 0x1161, kTails = 0x11a7;
constexpr char32_t kLeadCount = 19, kVowelCount = 21, kTailCount = 28;
constexpr char32_t kSyllableCount = kLeadCount * kVowelCount * kTailCount;

int class_of(char32_t code) {
  const ClassRange* range = find_range(kClasses, code);
  return range == nullptr ? 0 : range->combining_class;
}

void decompose(char32_t code, std::u32string* out) {
  if (code >= kSyllables && code < kSyllables + kSyllableCount) {
    const char32_t index = code - kSyllables;
    *out += kLeads + index / (kVowelCount * kTailCount);
    *out += kVowels + index / kTailCount % kVowelCount;
    if (index % kTailCount != 0) *out += kTails + index % kTailCount;
  } else if (const auto pair = std::ranges::lower_bound(kPairs, code, {}, &CodePair::composed);
             pair != std::end(kPairs) && pair->composed == code) {
    decompose(pair->first, out);
    *out += pair->second;
  } else if (const auto row =
                 std::ranges::lower_bound(kDecompositions, code, {}, &Decomposition::code);
             row != std::end(kDecompositions) && row->code == code) {
    for (const char32_t part : row->parts) {
      if (part != 0) *out += part;
    }
  } else {
    *out += code;
  }
}

// What two characters are together; 0 where they stay two.
char32_t compose(char32_t first, char32_t second) {
  if (first >= kLeads && first < kLeads + kLeadCount && second >= kVowels &&
      second < kVowels + kVowelCount) {
    return kSyllables + ((first - kLeads) * kVowelCount + second - kVowels) * kTailCount;
  }
  if (first >= kSyllables && first < kSyllables + kSyllableCount &&
      (first - kSyllables) % kTailCount == 0 && second > kTails && second < kTails + kTailCount) {
    return first + second - kTails;
  }
  static const auto composed = [] {
    std::map<std::pair<char32_t, char32_t>, char32_t> made;
    for (const CodePair& pair : kPairs) made[{pair.first, pair.second}] = pair.composed;
    return made;
  }();
  const auto found = composed.find({first, second});
  return found == composed.end() ? 0 : found->second;
}

}  // namespace

bool is_letter(char32_t code) { return find_range(kLetters, code) != nullptr; }

bool is_uppercase(char32_t code) { return find_range(kUppercase, code) != nullptr; }

bool is_lowercase(char32_t code) { return find_range(kLowercase, code) != nullptr; }

bool is_mark(char32_t code) { return find_range(kMarks, code) != nullptr; }

bool is_number(char32_t code) { return find_range(kNumbers, code) != nullptr; }

bool is_space(char32_t code) {
  return (code >= 0x9 && code <= 0xd) || code == 0x20 || code == 0x85 || code == 0xa0 ||
         code == 0x1680 || (code >= 0x2000 && code <= 0x200a) || code == 0x2028 || code == 0x2029 ||
         code == 0x202f || code == 0x205f || code == 0x3000;
}

// Python counts the separators of files, groups, records and units as well.
bool is_stripped(char32_t code) { return is_space(code) || (code >= 0x1c && code <= 0x1f); }

bool is_digit(char32_t code) { return find_range(kDigits, code) != nullptr; }

std::u32string code_points(std::string_view text) {
  std::u32string out;
  while (!text.empty()) {
    const Decoded next = decode_utf8(text);
    out += next.code;
    text.remove_prefix(next.bytes);
  }
  return out;
}

std::u32string casefold(std::u32string_view text) {
  std::u32string out;
  for (const char32_t code : text) {
    if (const auto row = std::ranges::lower_bound(kLongFolds, code, {}, &LongFold::code);
        row != std::end(kLongFolds) && row->code == code) {
      for (const char32_t part : row->parts) {
        if (part != 0) out += part;
      }
      continue;
    }
    const FoldRange* range = find_range(kFolds, code);
    const bool folds = range != nullptr && (code - range->first) % range->step == 0;
    out += folds ? static_cast<char32_t>(static_cast<int64_t>(code) + range->shift) : code;
  }
  return out;
}

std::string replace_invalid_utf8(std::string_view text) {
  std::string out;
  while (!text.empty()) {
    const Decoded next = decode_utf8(text);
    out += next.well_formed ? text.substr(0, next.bytes) : std::string_view("\xef\xbf\xbd");
    text.remove_prefix(next.bytes);
  }
  return out;
}

std::string to_nfc(std::string_view text) {
  // All below U+0300 is in the form.
  const auto is_below = [](char byte) { return static_cast<unsigned char>(byte) < 0xcc; };
  if (std::ranges::all_of(text, is_below)) return std::string(text);
  std::u32string apart;
  for (const char32_t code : code_points(text)) decompose(code, &apart);
  for (auto begin = apart.begin(); begin != apart.end();) {
    const auto end = std::find_if(begin, apart.end(), [](char32_t c) { return class_of(c) == 0; });
    std::ranges::stable_sort(begin, end, {}, class_of);
    begin = end == apart.end() ? end : std::next(end);
  }
  std::u32string out;
  size_t starter = 0;    // of `out`, to which what follows may be joined
  int last_class = 256;  // of what stands between; 0: another starter, 256: there is no starter yet
  for (const char32_t code : apart) {
    const int own = class_of(code);
    const bool adjacent = !out.empty() && starter + 1 == out.size();
    const bool reaches = last_class != 256 && (adjacent || (last_class != 0 && last_class < own));
    if (const char32_t joined = reaches ? compose(out[starter], code) : 0; joined != 0) {
      out[starter] = joined;
      continue;
    }
    if (own == 0) starter = out.size();
    last_class = own == 0 || last_class != 256 ? own : 256;
    out += code;
  }
  std::string bytes;
  for (const char32_t code : out) append_utf8(code, &bytes);
  return bytes;
}

std::string_view strip(std::string_view text) {
  size_t end = 0;
  text = strip_left(text);
  for (size_t at = 0; at < text.size();) {
    const Decoded next = decode_utf8(text.substr(at));
    at += next.bytes;
    if (!is_stripped(next.code)) end = at;
  }
  return text.substr(0, end);
}

std::string_view strip_left(std::string_view text) {
  while (!text.empty()) {
    const Decoded next = decode_utf8(text);
    if (!is_stripped(next.code)) break;
    text.remove_prefix(next.bytes);
  }
  return text;
}

}  // namespace alignpro::prompter
