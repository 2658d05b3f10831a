#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "alignpro/engine/scheduler.h"
#include "alignpro/engine/sequence.h"
#include "alignpro/model/language_model.h"

namespace alignpro::engine {

using model::LanguageModel;
using model::Session;

struct EngineOptions {
  int64_t kv_cache_bytes = 0;    // 0: a quarter of the memory that is available now
  int64_t max_batch_rows = 256;  // tokens in one forward, decoding and prefill together
  bool prefix_cache = true;      // share the KV of common prefixes
};

struct EngineStats {
  int64_t prefill_tokens = 0;  // prompt positions computed
  int64_t cached_tokens = 0;   // prompt positions found computed
  int64_t decode_tokens = 0;   // tokens drawn
  int64_t steps = 0;           // forward passes
  int64_t kv_blocks_in_use = 0;
  int64_t kv_blocks_cached = 0;  // held by nobody, kept for the next prompt
  int64_t kv_blocks_capacity = 0;
};

// Continuous batching over one model: sequences of any adapter are admitted and retired at every
// step. All methods may be called from any thread; one thread at a time drives the steps, for
// everybody. A sequence's tokens depend on its request alone (contracts 2 and 3).
class Engine {
 public:
  Engine(std::shared_ptr<const LanguageModel> model, EngineOptions options);
  ~Engine();  // finishes what is unfinished as cancelled
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // The bytes of every token id, for stop strings.
  void set_token_bytes(std::vector<std::string> pieces);

  // Queues a request; never waits for a step. Throws InvalidArgument for a request that can never
  // run, naming the argument. max_new_tokens 0 is finished on return ("length").
  std::shared_ptr<Sequence> submit(std::vector<int32_t> tokens, SamplingParams params,
                                   std::shared_ptr<const model::Adapter> adapter);

  // One forward for everything that can run; returns what finished in it. If it throws (a NaN,
  // say), every sequence in the engine is finished with that error and the engine is empty and
  // usable.
  std::vector<std::shared_ptr<Sequence>> step();

  // The first part of a step, for who drives several engines: it is put under way, and a model that
  // computes elsewhere than on this thread is left to it. step() then waits for it and returns what
  // it ended. A second launch() before that does nothing. Throws as step().
  void launch();
  bool ready() const;  // step() would not wait for the model

  // Returns when all of these are finished, driving steps or waiting for a thread that does.
  // Rethrows the error of the first that failed. `poll` is called between steps, at least every
  // 50 ms; when it throws, these sequences are cancelled and its exception goes to the caller.
  void run(std::span<const std::shared_ptr<Sequence>> sequences,
           const std::function<void()>& poll = {});

  bool idle() const;
  EngineStats stats() const;

 private:
  using Sequences = std::vector<std::shared_ptr<Sequence>>;

  Sequences in_turn(std::unique_lock<std::mutex>& lock,
                    const std::function<void(Sequences&)>& work);
  void step_once(Sequences& finished);
  void begin_step(Sequences& finished);
  void end_step(Sequences& finished);
  void end_launched(Sequences& finished);
  Sequences take_incoming();
  void admit();
  std::vector<Task*> forward(std::span<const Chunk> chunks);
  void draw(std::span<Task* const> tasks);
  void publish_state();

  const std::shared_ptr<const LanguageModel> model_;
  const EngineOptions options_;
  const int64_t kv_blocks_;

  // Touched only by the thread that drives.
  const std::unique_ptr<Session> session_;
  Scheduler scheduler_;
  EngineStats counts_;
  std::optional<std::vector<Task*>> drawing_;  // of a step under way, in the order of its rows

  // Guards what follows. Whoever sets driving_ owns what is above until it is false again.
  mutable std::mutex mutex_;
  std::condition_variable turn_;
  bool driving_ = false;
  Sequences incoming_;
  Sequences unreported_;   // finished between steps; the next step returns them
  int64_t in_flight_ = 0;  // sequences inside scheduler_
  std::shared_ptr<const std::vector<std::string>> token_bytes_;
  EngineStats stats_;
};

}  // namespace alignpro::engine
