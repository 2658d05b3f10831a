#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace alignpro {

// The well-formed sequence at the front of a text that is not empty, or what stands for it: U+FFFD
// for the longest beginning of one, or for the byte that begins none.
struct Decoded {
  char32_t code;
  size_t bytes;
  bool well_formed;
};
Decoded decode_utf8(std::string_view text);

void append_utf8(uint32_t code, std::string* out);

}  // namespace alignpro
