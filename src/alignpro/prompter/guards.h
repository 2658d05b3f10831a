#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "alignpro/prompter/prompt_format.h"

namespace alignpro {

// What a rewrite must keep to be used: GuardConfig of Python.
struct Guards {
  bool spans = true;     // numbers, quotations, code, addresses, [protected] text, as they were
  bool language = true;  // that it is in the prompt's script and language, where both are known
  std::optional<double> max_growth = 4.0;  // most characters, as a multiple of the prompt's
  int64_t free_characters = 400;           // may be written whatever the prompt's length
  bool cut = true;       // with mode rewrite, that it does not end at its token limit
  bool answered = true;  // that it does not read as an answer
  bool echo = true;      // that it repeats neither the template nor a chat's markers
};

namespace prompter {

// A rewrite before it is used; all of it UTF-8.
struct Candidate {
  std::string_view prompt;  // the last user turn
  std::string_view turn;    // what would stand in its place
  std::string_view text;    // what the prompter wrote
  bool was_cut = false;     // by its token limit
};

// "guard_" and the name of the first guard that is broken, in the order of
// python/alignpro/guards.py; empty where all that are on are kept.
std::string_view broken_guard(const Candidate& candidate, const PromptFormat& format,
                              const Guards& guards);

}  // namespace prompter
}  // namespace alignpro
