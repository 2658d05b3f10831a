#include "alignpro/prompter/unicode.h"

#include <algorithm>
#include <iterator>
#include <span>

#include "alignpro/prompter/unicode_ranges.h"

namespace alignpro::prompter {
namespace {

bool contains(std::span<const CodeRange> ranges, char32_t code) {
  const auto after = std::ranges::upper_bound(ranges, code, {}, &CodeRange::first);
  return after != ranges.begin() && code <= std::prev(after)->last;
}

// Python counts the separators of files, groups, records and units as white space; \s does not.
bool is_stripped(char32_t code) { return is_space(code) || (code >= 0x1c && code <= 0x1f); }

}  // namespace

bool is_letter(char32_t code) { return contains(kLetters, code); }

bool is_number(char32_t code) { return contains(kNumbers, code); }

bool is_space(char32_t code) {
  return (code >= 0x9 && code <= 0xd) || code == 0x20 || code == 0x85 || code == 0xa0 ||
         code == 0x1680 || (code >= 0x2000 && code <= 0x200a) || code == 0x2028 || code == 0x2029 ||
         code == 0x202f || code == 0x205f || code == 0x3000;
}

Decoded decode_utf8(std::string_view text) {
  constexpr char32_t kReplacement = 0xfffd;
  const auto byte = [text](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = byte(0);
  if (lead < 0x80) return {lead, 1, true};
  const size_t length = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
  if (lead < 0xc2 || lead > 0xf4) return {kReplacement, 1, false};
  char32_t code = lead & (0x7fu >> length);
  for (size_t i = 1; i < length; ++i) {
    // The second byte excludes what is longer than needed, surrogates, and what lies past U+10FFFF.
    const unsigned char least = i > 1 ? 0x80 : lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
    const unsigned char most = i > 1 ? 0xbf : lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    if (i >= text.size() || byte(i) < least || byte(i) > most) return {kReplacement, i, false};
    code = code << 6 | (byte(i) & 0x3fu);
  }
  return {code, length, true};
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

std::string_view strip(std::string_view text) {
  size_t begin = text.size(), end = 0;
  for (size_t at = 0; at < text.size();) {
    const Decoded next = decode_utf8(text.substr(at));
    if (!is_stripped(next.code)) {
      begin = std::min(begin, at);
      end = at + next.bytes;
    }
    at += next.bytes;
  }
  return begin < end ? text.substr(begin, end - begin) : std::string_view();
}

}  // namespace alignpro::prompter
