#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <vector>

#include "alignpro/engine/sampling_params.h"

namespace alignpro {

struct Message {
  std::string role;  // system, developer, user or assistant
  std::string content;
};

// A prompt with what was said before it.
struct Conversation {
  std::vector<Message> history;
  std::string last_turn;  // of the user
};

// What a prompter is shown of a history: nothing, the turns of user and assistant, or all.
enum class ShownHistory { kNone, kTurns, kAll };

// How a prompter reads and writes prompts: what stands around the prompt, what is made of the
// rewrite, and how that is drawn.
struct PromptFormat {
  std::string chat_before, chat_after;          // of a user turn, by the model's chat template
  bool chat_strips = false;                     // the white space at the turn's ends
  std::string template_before, template_after;  // of the prompt, within the turn
  ShownHistory history = ShownHistory::kAll;
  std::string history_before = "Conversation so far:\n\n";  // before the template, if any is shown
  std::string history_after = "\n\n";
  bool cut_history = true;  // to what the context holds; else a longer one is an error
  bool append = true;       // prompt + separator + rewrite; else rewrite alone
  std::string separator = "\n\n";
  engine::SamplingParams sampling;  // `seed` and `sample` are set for each rewrite

  // From the adapter folder of a run, whose prompter.json says all of it. Throws FileError.
  static PromptFormat of_run(const std::filesystem::path& adapter);

  // The user turn that the prompter reads, without `cut` messages of the history that it is shown:
  // the oldest first, system messages last. Throws InvalidArgument for an unknown role.
  std::string prompter_turn(const Conversation& conversation, size_t cut = 0) const;
  // The most messages that may be cut so.
  size_t most_cut(const Conversation& conversation) const;
};

}  // namespace alignpro
