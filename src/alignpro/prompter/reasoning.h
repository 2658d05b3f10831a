#pragma once

#include <string_view>

namespace alignpro::prompter {

// A tag that opens or closes a block of reasoning. Text shows it, whatever the vocabulary says.
bool is_reasoning_tag(std::string_view text);

// What of a text is no reasoning, where it may begin with a block of it, or go on with one that the
// end of `prompt` opened. Empty where the block is never closed. As
// python/alignpro/models/reasoning.py.
std::string_view answer_of(std::string_view text, std::string_view prompt);

}  // namespace alignpro::prompter
