#pragma once

#include <string_view>
#include <vector>

namespace alignpro::prompter {

// How a byte-level tokenizer cuts text into words before merging.
struct WordRule {
  int most_digits = 0;         // in a word; 0: GPT-2's expression, where any number may be
  bool single_digits = false;  // cut out before GPT-2's expression sees the text
  bool nfc = false;            // of text in Unicode's form NFC
  bool ignore_merges = false;  // a word that is a token is taken, wherever merges lead
  bool cased = false;          // words end where capitals begin
  bool contracted = false;     // and have a contraction at their end; else it is a word
};

// The rules by their own names, for messages.
inline constexpr std::string_view kWordRules =
    "gpt-2, smollm, qwen2, llama-bpe, dbrx, tekken or gpt-4o";

// Null for a name that is not known.
const WordRule* find_word_rule(std::string_view name);

// Views of a well-formed text that join up to it.
std::vector<std::string_view> split_words(std::string_view text, const WordRule& rule);

}  // namespace alignpro::prompter
