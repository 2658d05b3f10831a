#include "alignpro/engine/sequence.h"

#include <algorithm>
#include <utility>

#include "alignpro/core/rng.h"
#include "alignpro/engine/client.h"

namespace alignpro::engine {
namespace {

Clock::time_point deadline_of(const SamplingParams& params) {
  // A year stands for "none": later instants would overflow the clock's ticks.
  constexpr double kYear = 365.0 * 24 * 3600;
  if (params.deadline_seconds == 0.0 || params.deadline_seconds > kYear) {
    return Clock::time_point::max();
  }
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(
                            std::chrono::duration<double>(params.deadline_seconds));
}

}  // namespace

std::string_view finish_reason_name(FinishReason reason) {
  constexpr std::string_view kNames[] = {"", "stop", "length", "cancelled", "deadline", "failed"};
  return kNames[static_cast<size_t>(reason)];
}

Sequence::Sequence(Request request)
    : request_(std::move(request)), deadline_(deadline_of(request_.params)) {
  for (const std::string& stop : request_.params.stop) {
    longest_stop_ = std::max(longest_stop_, stop.size());
  }
  const float repetition = request_.params.repetition_penalty;
  if (repetition != 1.0f) {
    std::vector<int32_t> read = request_.prompt;
    std::erase_if(read, [](int32_t token) { return token < 0; });  // soft rows are no tokens
    std::sort(read.begin(), read.end());
    read.erase(std::unique(read.begin(), read.end()), read.end());
    for (const int32_t token : read) penalties_.push_back({token, repetition, 0.0f});
  }
}

std::exception_ptr Sequence::error() const {
  const std::lock_guard lock(mutex_);
  return error_;
}

Output Sequence::read(size_t begin) const {
  const std::lock_guard lock(mutex_);
  const auto from = static_cast<std::ptrdiff_t>(std::min(begin, output_.tokens.size()));
  return {{output_.tokens.begin() + from, output_.tokens.end()},
          {output_.logprobs.begin() + from, output_.logprobs.end()},
          {output_.kept_mass.begin() + from, output_.kept_mass.end()}};
}

std::optional<Sequence::StopMatch> Sequence::stop_match() const {
  const std::lock_guard lock(mutex_);
  return stop_match_;
}

FinishReason Sequence::interrupted(Clock::time_point now) const {
  if (cancelled_.load(std::memory_order_relaxed)) return FinishReason::kCancelled;
  return now >= deadline_ ? FinishReason::kDeadline : FinishReason::kNone;
}

ops::SampleRow Sequence::sample_row(int64_t position) const {
  const SamplingParams& params = request_.params;
  ops::SampleRow row;
  static_cast<ops::DrawOptions&>(row) = params;
  row.uniform = keyed_uniform(params.seed, params.sample, static_cast<uint32_t>(position));
  const int64_t written = position - static_cast<int64_t>(request_.prompt.size());
  if (written < params.min_new_tokens) row.banned = request_.stop_ids;
  row.penalties = penalties_;
  return row;
}

void Sequence::penalise(int32_t token) {
  const SamplingParams& params = request_.params;
  auto at = std::lower_bound(penalties_.begin(), penalties_.end(), token,
                             [](const ops::Penalty& p, int32_t id) { return p.token < id; });
  if (at == penalties_.end() || at->token != token) {
    at = penalties_.insert(at, {token, params.repetition_penalty, 0.0f});
  }
  if (at->times++ == 0) at->minus += params.presence_penalty;
  at->minus += params.frequency_penalty;
}

FinishReason Sequence::append(const ops::SampledToken& token) {
  if (penalises(request_.params)) penalise(token.token);
  const std::lock_guard lock(mutex_);
  output_.tokens.push_back(token.token);
  output_.logprobs.push_back(token.logprob);
  output_.kept_mass.push_back(token.kept_mass);
  const auto& ids = request_.stop_ids;
  const auto written = static_cast<int64_t>(output_.tokens.size());
  if (std::binary_search(ids.begin(), ids.end(), token.token)) return FinishReason::kStop;
  if (longest_stop_ > 0) {
    const auto match = find_stop(token.token);
    if (match && written >= request_.params.min_new_tokens) {
      stop_match_ = match;
      return FinishReason::kStop;
    }
  }
  const auto positions = static_cast<int64_t>(request_.prompt.size()) + written;
  return positions >= request_.max_positions ? FinishReason::kLength : FinishReason::kNone;
}

// The earliest match that ends inside the new token's bytes (the first listed on a tie): what the
// tail holds is one byte too short for a match of its own.
std::optional<Sequence::StopMatch> Sequence::find_stop(int32_t token) {
  const auto& table = *request_.token_bytes;
  const auto index = static_cast<size_t>(token);
  const size_t before = tail_.size();
  if (index < table.size()) tail_ += table[index];
  const int64_t origin = text_bytes_ - static_cast<int64_t>(before);  // of tail_ in the text
  text_bytes_ += static_cast<int64_t>(tail_.size() - before);

  std::optional<StopMatch> best;
  const auto& stops = request_.params.stop;
  for (size_t i = 0; i < stops.size(); ++i) {
    // Shorter strings may lie whole inside the tail, where they were seen before.
    const size_t first = before >= stops[i].size() ? before - stops[i].size() + 1 : 0;
    const size_t at = tail_.find(stops[i], first);
    if (at == std::string::npos) continue;
    const int64_t begin = origin + static_cast<int64_t>(at);
    if (!best || begin < best->begin) best = StopMatch{i, begin};
  }
  if (tail_.size() >= longest_stop_) tail_.erase(0, tail_.size() - (longest_stop_ - 1));
  return best;
}

void Sequence::finish(FinishReason reason, std::exception_ptr error) {
  {
    const std::lock_guard lock(mutex_);
    if (reason_.load(std::memory_order_relaxed) != FinishReason::kNone) return;
    error_ = std::move(error);
    reason_.store(reason, std::memory_order_release);
  }
  if (const auto client = request_.client.lock()) client->finished(this);
}

}  // namespace alignpro::engine
