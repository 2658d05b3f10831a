#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "alignpro/engine/sequence.h"

namespace alignpro::engine {

class Engine;

// What one caller has in an engine. A request that ends, in whichever thread's step, goes to its
// own client's queue, with its own error if it failed: nobody has to ask each request whether it is
// finished. Any thread may call any method. Made by std::make_shared.
class Client : public std::enable_shared_from_this<Client> {
 public:
  explicit Client(std::shared_ptr<Engine> engine);

  // As Engine::submit.
  std::shared_ptr<Sequence> submit(std::vector<int32_t> tokens, SamplingParams params,
                                   model::Mixture of);

  // One step of the engine for everybody, unless a request of this client has finished already or
  // none is open. Returns what has finished since the last call, oldest first.
  std::vector<std::shared_ptr<Sequence>> step();

  // Steps until no request of this client is open. `poll` is called between steps, at least every
  // 50 ms; when it throws, this client's requests are cancelled and its exception goes to the
  // caller.
  void run(const std::function<void()>& poll = {});

  // As Engine::launch, where a request of this client is open.
  void launch();

  void cancel();      // every open request
  bool idle() const;  // no request is open, or finished and not yet returned by step()

  // --- for the engine ---

  void opened(const std::shared_ptr<Sequence>& sequence);
  void finished(Sequence* sequence);
  bool has_open() const { return open_count_.load(std::memory_order_acquire) > 0; }
  bool has_finished() const { return finished_count_.load(std::memory_order_acquire) > 0; }

 private:
  const std::shared_ptr<Engine> engine_;
  std::atomic<int64_t> open_count_{0}, finished_count_{0};  // of what follows

  mutable std::mutex mutex_;  // guards what follows; taken last
  std::unordered_map<Sequence*, std::shared_ptr<Sequence>> open_;
  std::vector<std::shared_ptr<Sequence>> finished_;
};

}  // namespace alignpro::engine
