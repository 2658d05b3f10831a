#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "alignpro/core/error.h"
#include "alignpro/prompter/guards.h"
#include "alignpro/prompter/prompt_format.h"

namespace alignpro {

struct PrompterOptions {
  int threads = 0;               // 0: the CPU quota
  int64_t context_length = 0;    // 0: the model's own
  int64_t kv_cache_bytes = 0;    // 0: a quarter of the memory that is available
  bool int8 = false;             // products of 8-bit integers, faster and less exact
  std::optional<Guards> guards;  // none: whatever was written is used
};

// What the target is to be asked, and why.
struct Rewritten {
  std::string prompt;  // the last user turn; the original where the rewrite is not applied
  std::string text;    // what the prompter wrote; empty where it did not end
  bool applied = false;
  std::string_view reason;    // "rewritten"; else "deadline", "empty" (nothing was written),
                              // "unchanged", "guard_echo" and others (guards.h), or "error"
  std::string error;          // of the engine, where that is the reason
  double milliseconds = 0.0;  // since the call
  int64_t tokens = 0;         // that the prompter wrote
};

// A trained prompter: rewrites prompts for a target that may be anywhere. The same files, prompt
// and seed give the text that alignpro.Prompter gives in Python. Any thread may call it; calls from
// many threads decode in one batch. Its destructor waits for a step under way; no call may be.
class Prompter {
 public:
  // A GGUF file, and a PEFT folder, empty for the base model. Throws FileError, and Unavailable for
  // what this machine cannot do.
  Prompter(const std::filesystem::path& model, const std::filesystem::path& adapter,
           PromptFormat format, const PrompterOptions& options = {});
  // As a run wrote it: Prompter(model, adapter, PromptFormat::of_run(adapter)).
  Prompter(const std::filesystem::path& model, const std::filesystem::path& adapter,
           const PrompterOptions& options = {});
  ~Prompter();
  Prompter(const Prompter&) = delete;
  Prompter& operator=(const Prompter&) = delete;

  // What the target is to be asked instead. After the deadline the prompt goes out as it is, at
  // once where no time is left; without one the call waits. Without a seed the draw is a fresh one.
  // Throws InvalidArgument for a prompt that is empty, is not UTF-8 or does not fit the model's
  // context.
  Rewritten rewrite(std::string_view prompt,
                    std::optional<std::chrono::nanoseconds> deadline = std::nullopt,
                    std::optional<uint64_t> seed = std::nullopt);

  // The same of a conversation, of which the last turn alone is rewritten. The prompter reads as
  // much of the history as the format says and its context holds.
  Rewritten rewrite(const Conversation& conversation,
                    std::optional<std::chrono::nanoseconds> deadline = std::nullopt,
                    std::optional<uint64_t> seed = std::nullopt);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace alignpro
