#include "alignpro/engine/client.h"

#include <utility>

#include "alignpro/core/error.h"
#include "alignpro/engine/engine.h"

namespace alignpro::engine {

Client::Client(std::shared_ptr<Engine> engine) : engine_(std::move(engine)) {
  require(engine_ != nullptr, "client: expected an engine, got none");
}

std::shared_ptr<Sequence> Client::submit(std::vector<int32_t> tokens, SamplingParams params,
                                         model::Mixture of) {
  return engine_->submit(std::move(tokens), std::move(params), std::move(of), shared_from_this());
}

std::vector<std::shared_ptr<Sequence>> Client::step() {
  if (!has_finished() && has_open()) engine_->step(this);
  const std::lock_guard lock(mutex_);
  finished_count_ = 0;
  return std::exchange(finished_, {});
}

void Client::run(const std::function<void()>& poll) { engine_->run(*this, poll); }

void Client::launch() {
  if (has_open()) engine_->launch();
}

void Client::cancel() {
  const std::lock_guard lock(mutex_);
  for (const auto& [sequence, _] : open_) sequence->cancel();
}

bool Client::idle() const { return !has_open() && !has_finished(); }

void Client::opened(const std::shared_ptr<Sequence>& sequence) {
  const std::lock_guard lock(mutex_);
  open_.emplace(sequence.get(), sequence);
  ++open_count_;
}

void Client::finished(Sequence* sequence) {
  const std::lock_guard lock(mutex_);
  auto entry = open_.extract(sequence);
  if (entry.empty()) return;
  finished_.push_back(std::move(entry.mapped()));
  ++finished_count_;  // before it stops being open: idle() must not see it in neither
  --open_count_;
}

}  // namespace alignpro::engine
