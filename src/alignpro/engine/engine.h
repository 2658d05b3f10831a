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

class Client;
using model::LanguageModel;
using model::Session;

struct EngineOptions {
  int64_t kv_cache_bytes = 0;    // 0: a quarter of the memory that is available now
  int64_t max_batch_rows = 256;  // tokens in one forward, decoding and prefill together
  bool prefix_cache = true;      // share the KV of common prefixes
  bool lookup = true;            // verify drafts of a few sequences, where that is faster
};

struct EngineStats {
  int64_t prefill_tokens = 0;   // prompt positions computed, of every lane
  int64_t cached_tokens = 0;    // prompt positions found computed, of every lane
  int64_t decode_tokens = 0;    // tokens drawn, those of drafts included
  int64_t drafted_tokens = 0;   // tokens that were looked up and verified
  int64_t accepted_tokens = 0;  // of them, those that were drawn
  int64_t steps = 0;            // forward passes
  int64_t kv_blocks_in_use = 0;
  int64_t kv_blocks_cached = 0;  // held by nobody, kept for the next prompt
  int64_t kv_blocks_capacity = 0;
};

// Continuous batching over one model: sequences of any adapter, or of several (lanes, which go
// through every step together), are admitted and retired at every step. All methods may be called
// from any thread; one thread at a time drives the steps, for everybody. A sequence's tokens depend
// on its request alone (contracts 2 and 3).
class Engine {
 public:
  Engine(std::shared_ptr<const LanguageModel> model, EngineOptions options);
  ~Engine();  // finishes what is unfinished as cancelled
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // The bytes of every token id, for stop strings.
  void set_token_bytes(std::vector<std::string> pieces);

  // Queues a request; never waits for a step. Throws InvalidArgument for a request that can never
  // run, naming the argument. max_new_tokens 0 is finished on return ("length"). `of`: an adapter,
  // null for the base weights, or several. `client`, if any, is told when it ends.
  std::shared_ptr<Sequence> submit(std::vector<int32_t> tokens, SamplingParams params,
                                   model::Mixture of,
                                   const std::shared_ptr<Client>& client = nullptr);

  // One forward for everything that can run. A request that cannot be drawn (NaN, say) fails alone;
  // what throws here, a defect or lack of memory, ends everything in the engine, each with that
  // error, and the engine is empty and usable. Does nothing where, its turn come, `client` has
  // something finished.
  void step(const Client* client = nullptr);

  // The first part of a step, for who drives several engines: it is put under way, and a model that
  // computes elsewhere than on this thread is left to it. step() then waits for it. A second
  // launch() before that does nothing.
  void launch();
  bool ready() const;  // step() would not wait for the model

  // See Client::run.
  void run(Client& client, const std::function<void()>& poll);

  bool idle() const;
  EngineStats stats() const;

 private:
  void in_turn(std::unique_lock<std::mutex>& lock, void (Engine::*work)());
  void whole_step();
  void begin_launched();
  void begin_step();
  void end_step();
  void end_launched();
  void admit();
  std::vector<Task*> forward(std::span<const Chunk> chunks);
  void drop_failing(std::vector<Chunk>& chunks);
  void draw(std::span<Task* const> tasks);
  void take(Task& task, std::span<const ops::SampledToken> drawn);
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
  std::vector<std::shared_ptr<Sequence>> incoming_;
  int64_t in_flight_ = 0;  // sequences inside scheduler_
  std::shared_ptr<const std::vector<std::string>> token_bytes_;
  EngineStats stats_;
};

}  // namespace alignpro::engine
