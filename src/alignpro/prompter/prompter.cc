#include "alignpro/prompter/prompter.h"

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <random>
#include <ranges>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "alignpro/engine/client.h"
#include "alignpro/engine/engine.h"
#include "alignpro/model/model.h"
#include "alignpro/model/model_files.h"
#include "alignpro/model/peft_adapter.h"
#include "alignpro/ops/cpu_ops.h"
#include "alignpro/prompter/reasoning.h"
#include "alignpro/prompter/tokenizer.h"
#include "alignpro/prompter/unicode.h"

namespace alignpro {
namespace {

using engine::FinishReason;
using engine::SamplingParams;

// The output function of splitmix64 (Steele, Lea, Flood 2014).
uint64_t splitmix64(uint64_t value) {
  value += 0x9E3779B97F4A7C15u;
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9u;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EBu;
  return value ^ (value >> 31);
}

// The seed of a call's only rewrite, from the call's: derive_seed(seed, REWRITE_STREAM, 0) of
// pipeline.py.
uint64_t rewrite_seed(uint64_t seed) {
  for (const uint64_t key : {uint64_t{1}, uint64_t{0}}) seed = splitmix64(seed ^ splitmix64(key));
  return seed;
}

uint64_t fresh_seed() {
  std::random_device source;
  return uint64_t{source()} << 32 | source();
}

}  // namespace

struct Prompter::State {
  State(const std::filesystem::path& path, const std::filesystem::path& adapter_folder,
        PromptFormat prompt_format, const PrompterOptions& options)
      : format(std::move(prompt_format)), guards(options.guards), files(path), tokenizer(files) {
    const auto arithmetic = options.int8 ? ops::Arithmetic::kInt8 : ops::Arithmetic::kFloat32;
    model = model::Model::load(files, ops::make_cpu_device(options.threads, arithmetic),
                               options.context_length);
    engine = std::make_shared<engine::Engine>(
        model, engine::EngineOptions{.kv_cache_bytes = options.kv_cache_bytes});
    std::vector<std::string> pieces = tokenizer.token_bytes();
    pieces.resize(static_cast<size_t>(model->config().vocab_size));
    engine->set_token_bytes(std::move(pieces));
    if (!adapter_folder.empty()) {
      adapter = model::load_peft_adapter(model->config(), adapter_folder);
    }
    check(format.sampling);
    client = std::make_shared<engine::Client>(engine);
    driver = std::thread([this] { drive(); });
  }

  ~State() {
    {
      const std::lock_guard lock(mutex);
      closing = true;
    }
    work.notify_one();
    driver.join();
  }

  // What no prompt could be rewritten with.
  void check(const SamplingParams& params) const {
    engine::validate(params);
    const int64_t context = model->context_length(), vocabulary = model->config().vocab_size;
    require(params.max_new_tokens < context, "max_new_tokens: expected fewer than the context of ",
            context, ", got ", params.max_new_tokens);
    for (const int32_t id : params.stop_token_ids) {
      require(id >= 0 && id < vocabulary, "stop_token_ids: expected ids below ", vocabulary,
              ", got ", id);
    }
  }

  // Steps while there is something to do. What a step throws has ended its sequences, each of which
  // has the error.
  void drive() {
    std::unique_lock lock(mutex);
    while (true) {
      work.wait(lock, [this] { return closing || client->has_open(); });
      if (closing) return;
      lock.unlock();
      try {
        client->step();
      } catch (const std::exception&) {
      }
      lock.lock();
      stepped.notify_all();
    }
  }

  // With as much of the history as fits; nothing where it is late in between.
  template <typename IsLate>
  std::vector<int32_t> read(const Conversation& conversation, const IsLate& is_late) const {
    const int64_t context = model->context_length();
    const int64_t most = context - format.sampling.max_new_tokens;
    const auto encode = [&](size_t cut) {
      if (is_late()) return std::vector<int32_t>();
      const std::string turn = format.prompter_turn(conversation, cut);
      const std::string_view kept = format.chat_strips ? prompter::strip(turn) : turn;
      return tokenizer.encode(format.chat_before, kept, format.chat_after,
                              static_cast<size_t>(context));
    };
    const auto exceeds = [&](const auto& read) { return static_cast<int64_t>(read.size()) > most; };
    std::vector<int32_t> tokens = encode(0);
    if (const size_t last = format.most_cut(conversation); last > 0 && exceeds(tokens)) {
      const auto cuts = std::views::iota(size_t{1}, last + 1);
      const auto fits =
          std::ranges::partition_point(cuts, [&](size_t cut) { return exceeds(encode(cut)); });
      tokens = encode(fits == cuts.end() ? last : *fits);
    }
    const auto count = static_cast<int64_t>(tokens.size());
    require(count <= most, "prompt: ", count > 2 * context ? "more than " : "",
            std::min(count, 2 * context), " tokens and ", format.sampling.max_new_tokens,
            " new ones exceed the context of ", context,
            " tokens; shorten it or lower max_new_tokens");
    return tokens;
  }

  // What it wrote behind a prompt, without a block of reasoning.
  std::string text_of(const engine::Sequence& sequence, std::string_view prompt) const {
    std::vector<int32_t> tokens = sequence.read(0).tokens;
    const auto stop = sequence.stop_match();
    const bool ended_by_id = sequence.finish_reason() == FinishReason::kStop && !stop;
    if (ended_by_id) tokens.pop_back();
    std::string bytes = tokenizer.join_bytes(tokens);
    if (stop) bytes.resize(static_cast<size_t>(stop->begin));
    const std::string text = prompter::replace_invalid_utf8(bytes);
    const std::string read = cat(prompt, format.template_after, format.chat_after);
    return std::string(prompter::strip(prompter::answer_of(text, read)));
  }

  const PromptFormat format;
  const std::optional<Guards> guards;
  const model::ModelFiles files;
  const prompter::Tokenizer tokenizer;
  std::shared_ptr<const model::Model> model;
  std::shared_ptr<engine::Engine> engine;
  std::shared_ptr<const model::Adapter> adapter;
  std::shared_ptr<engine::Client> client;
  std::mutex mutex;  // guards `closing`, and what the conditions wait for
  std::condition_variable work, stepped;
  bool closing = false;
  std::thread driver;
};

Prompter::Prompter(const std::filesystem::path& model, const std::filesystem::path& adapter,
                   PromptFormat format, const PrompterOptions& options)
    : state_(std::make_unique<State>(model, adapter, std::move(format), options)) {}

Prompter::Prompter(const std::filesystem::path& model, const std::filesystem::path& adapter,
                   const PrompterOptions& options)
    : Prompter(model, adapter, PromptFormat::of_run(adapter), options) {}

Prompter::~Prompter() = default;

Rewritten Prompter::rewrite(std::string_view prompt,
                            std::optional<std::chrono::nanoseconds> deadline,
                            std::optional<uint64_t> seed) {
  return rewrite(Conversation{{}, std::string(prompt)}, deadline, seed);
}

Rewritten Prompter::rewrite(const Conversation& conversation,
                            std::optional<std::chrono::nanoseconds> deadline,
                            std::optional<uint64_t> seed) {
  const std::string& prompt = conversation.last_turn;
  const auto begin = engine::Clock::now();
  if (deadline && *deadline > engine::Clock::time_point::max() - begin) deadline.reset();
  require(!prompter::strip(prompt).empty(), "prompt: expected text, got none");
  State& state = *state_;
  const auto result = [&](std::string_view reason, std::string text = "", size_t tokens = 0) {
    const std::chrono::duration<double, std::milli> taken = engine::Clock::now() - begin;
    return Rewritten{.prompt = prompt,
                     .text = std::move(text),
                     .applied = false,
                     .reason = reason,
                     .error = "",
                     .milliseconds = taken.count(),
                     .tokens = static_cast<int64_t>(tokens)};
  };
  SamplingParams params = state.format.sampling;
  params.seed = rewrite_seed(seed ? *seed : fresh_seed());
  params.sample = 0;
  const auto is_late = [&] { return deadline && engine::Clock::now() - begin >= *deadline; };
  std::vector<int32_t> read = state.read(conversation, is_late);
  if (is_late()) return result("deadline");
  const auto sequence = state.client->submit(std::move(read), std::move(params), state.adapter);
  {
    std::unique_lock lock(state.mutex);
    state.work.notify_one();
    const auto done = [&] { return sequence->finished(); };
    if (!deadline) {
      state.stepped.wait(lock, done);
    } else if (!state.stepped.wait_until(lock, begin + *deadline, done)) {
      sequence->cancel();
      return result("deadline");
    }
  }
  if (const std::exception_ptr failure = sequence->error()) {
    Rewritten out = result("error");
    try {
      std::rethrow_exception(failure);
    } catch (const std::exception& error) {
      out.error = error.what();
    }
    return out;
  }
  const size_t count = sequence->read(0).tokens.size();
  std::string text = state.text_of(*sequence, prompt);
  if (text.empty()) return result("empty", "", count);
  std::string asked = state.format.append ? cat(prompt, state.format.separator, text) : text;
  if (asked == prompt) return result("unchanged", std::move(text), count);
  const bool was_cut = sequence->finish_reason() == FinishReason::kLength;
  const std::string_view broken =
      state.guards
          ? prompter::broken_guard({prompt, asked, text, was_cut}, state.format, *state.guards)
          : "";
  if (!broken.empty()) return result(broken, std::move(text), count);
  Rewritten out = result("rewritten", std::move(text), count);
  out.prompt = std::move(asked);
  out.applied = true;
  return out;
}

}  // namespace alignpro
