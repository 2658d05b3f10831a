#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "alignpro/engine/sampling_params.h"
#include "alignpro/model/mixture.h"
#include "alignpro/ops/head_sample.h"

namespace alignpro::engine {

class Client;

using Clock = std::chrono::steady_clock;

// kFailed: error() says why; no token could be drawn, or a step threw.
enum class FinishReason { kNone, kStop, kLength, kCancelled, kDeadline, kFailed };

// "stop", "length", "cancelled", "deadline", "failed"; empty for kNone.
std::string_view finish_reason_name(FinishReason reason);

// Everything that decides what a sequence is, resolved against its model by Engine::submit().
struct Request {
  std::vector<int32_t> prompt;  // below 0: soft rows, which every lane's adapter has
  SamplingParams params;
  std::vector<model::Lane> lanes;  // one, or those whose states are summed at every token
  std::vector<int32_t> stop_ids;   // EOS (unless ignored) and stop_token_ids, ascending
  std::shared_ptr<const std::vector<std::string>> token_bytes;  // [vocab]; set if params.stop is
  int64_t max_positions = 0;     // prompt and new tokens together, bounded by the context
  std::weak_ptr<Client> client;  // to be told of the end; empty: nobody
};

// What a sequence has written: one entry a generated token, EOS included.
struct Output {
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;   // of the untruncated distribution, at the sampling temperature
  std::vector<float> kept_mass;  // probability that truncation and bans left
};

// The handle of one submitted request. Any thread may read and cancel it; the engine alone appends.
// It outlives its engine and may be dropped at any time.
class Sequence {
 public:
  explicit Sequence(Request request);
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;

  const Request& request() const { return request_; }
  std::span<const int32_t> prompt() const { return request_.prompt; }

  bool finished() const { return finish_reason() != FinishReason::kNone; }
  FinishReason finish_reason() const { return reason_.load(std::memory_order_acquire); }
  std::exception_ptr error() const;

  // Entries [begin, as far as written).
  Output read(size_t begin) const;
  // Which of params.stop ended it, and the byte of the generated text at which it begins.
  struct StopMatch {
    size_t index;
    int64_t begin;
  };
  std::optional<StopMatch> stop_match() const;

  // Honoured at the start of the next step, in the queue and in prefill too.
  void cancel() { cancelled_.store(true, std::memory_order_relaxed); }

  // --- for the engine ---

  // kCancelled or kDeadline if it must end now; else kNone.
  FinishReason interrupted(Clock::time_point now) const;

  // How the next token, at absolute `position`, is to be drawn. What it points to lives until
  // append().
  ops::SampleRow sample_row(int64_t position) const;

  // Takes the next token; returns whether, and why, the sequence ends with it.
  FinishReason append(const ops::SampledToken& token);

  // The first call wins, and tells the client.
  void finish(FinishReason reason, std::exception_ptr error = nullptr);

 private:
  std::optional<StopMatch> find_stop(int32_t token);
  void penalise(int32_t token);  // which has been written

  const Request request_;
  const Clock::time_point deadline_;
  std::vector<ops::Penalty> penalties_;  // of the next draw; the engine's alone
  std::atomic<bool> cancelled_{false};
  std::atomic<FinishReason> reason_{FinishReason::kNone};

  mutable std::mutex mutex_;  // guards what follows
  Output output_;
  std::string tail_;        // the last bytes of the text, one fewer than the longest stop string
  int64_t text_bytes_ = 0;  // length of the text so far
  size_t longest_stop_ = 0;
  std::optional<StopMatch> stop_match_;
  std::exception_ptr error_;
};

}  // namespace alignpro::engine
