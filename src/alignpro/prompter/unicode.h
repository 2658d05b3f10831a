#pragma once

#include <string>
#include <string_view>

namespace alignpro::prompter {

bool is_letter(char32_t code);     // \p{L}
bool is_uppercase(char32_t code);  // [\p{Lu}\p{Lt}]
bool is_lowercase(char32_t code);  // \p{Ll}
bool is_mark(char32_t code);       // \p{M}
bool is_number(char32_t code);     // \p{N}
bool is_digit(char32_t code);      // \p{Nd}
bool is_space(char32_t code);      // \s: White_Space
bool is_stripped(char32_t code);   // what Python takes for white space

// The characters of UTF-8; U+FFFD for what is none.
std::u32string code_points(std::string_view text);

// As Python's str.casefold, of characters that Unicode 3.2 has; others stay as they are.
std::u32string casefold(std::u32string_view text);

// In Unicode's form NFC, as the tokenizers package has it: of Unicode 8 or so.
std::string to_nfc(std::string_view text);

// With U+FFFD for what is not UTF-8, as Python's errors="replace".
std::string replace_invalid_utf8(std::string_view text);

// Without the white space at its ends, as Python's str.strip.
std::string_view strip(std::string_view text);
std::string_view strip_left(std::string_view text);  // at its beginning alone

}  // namespace alignpro::prompter
