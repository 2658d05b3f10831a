#include "alignpro/core/utf8.h"

namespace alignpro {

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

void append_utf8(uint32_t code, std::string* out) {
  const auto push = [out](uint32_t byte) { out->push_back(static_cast<char>(byte)); };
  if (code < 0x80) return push(code);
  const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;  // bytes of six bits
  constexpr uint32_t kLead[] = {0xc0, 0xe0, 0xf0};
  push(kLead[more - 1] | code >> 6 * more);
  for (int i = more; i-- > 0;) push(0x80 | (code >> 6 * i & 0x3f));
}

}  // namespace alignpro
