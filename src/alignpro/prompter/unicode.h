#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace alignpro::prompter {

bool is_letter(char32_t code);  // \p{L}
bool is_number(char32_t code);  // \p{N}
bool is_space(char32_t code);   // \s: White_Space

// The well-formed sequence at the front of a text that is not empty, or what stands for it: U+FFFD
// for the longest beginning of one, or for the byte that begins none.
struct Decoded {
  char32_t code;
  size_t bytes;
  bool well_formed;
};
Decoded decode_utf8(std::string_view text);

// With U+FFFD for what is not UTF-8, as Python's errors="replace".
std::string replace_invalid_utf8(std::string_view text);

// Without the white space at its ends, as Python's str.strip.
std::string_view strip(std::string_view text);

}  // namespace alignpro::prompter
