#include "alignpro/engine/engine.h"

#include <algorithm>
#include <chrono>
#include <iterator>
#include <limits>
#include <utility>

#include "alignpro/core/error.h"
#include "alignpro/core/trace.h"
#include "alignpro/model/adapter.h"
#include "alignpro/model/kv_pool.h"

namespace alignpro::engine {
namespace {

using model::kKvBlock;

std::shared_ptr<const LanguageModel> given(std::shared_ptr<const LanguageModel> model) {
  require(model != nullptr, "model: expected a Model, got none");
  return model;
}

void extend(std::vector<std::shared_ptr<Sequence>>& all,
            std::vector<std::shared_ptr<Sequence>> more) {
  all.insert(all.end(), std::make_move_iterator(more.begin()), std::make_move_iterator(more.end()));
}

// Checks the options and settles the size of the cache.
EngineOptions resolve(EngineOptions options, const LanguageModel& model) {
  require(options.max_batch_rows >= 1, "max_batch_rows: expected >= 1, got ",
          options.max_batch_rows);
  require(options.kv_cache_bytes >= 0, "kv_cache_bytes: expected >= 0 (0: automatic), got ",
          options.kv_cache_bytes);
  const int64_t block = model.kv_block_bytes();
  if (options.kv_cache_bytes == 0) {
    // Never more than a full step of full contexts can hold, and a third of it for the idle
    // quarter.
    const double most = 4.0 / 3 * static_cast<double>(options.max_batch_rows) *
                        static_cast<double>(model.context_length() + kKvBlock) / kKvBlock;
    const auto share = static_cast<double>(model.kv_share_bytes() / block);
    options.kv_cache_bytes = block * static_cast<int64_t>(std::max(1.0, std::min(most, share)));
  }
  require(options.kv_cache_bytes / block <= std::numeric_limits<int32_t>::max(),
          "kv_cache_bytes: expected at most 2^31 - 1 blocks of ", block, " bytes, got ",
          options.kv_cache_bytes);
  require(options.kv_cache_bytes >= block, "kv_cache_bytes: expected at least one block of ",
          kKvBlock, " positions (", block, " bytes), got ", options.kv_cache_bytes);
  return options;
}

model::Batch make_batch(std::span<const Chunk> chunks) {
  model::Batch batch;
  for (const Chunk& chunk : chunks) {
    const Task& task = *chunk.task;
    const int64_t row_begin = batch.rows();
    const int64_t end = task.computed + chunk.count;
    const std::span<const int32_t> blocks(task.block_table.blocks);
    for (int64_t position = task.computed; position < end; ++position) {
      batch.kv_writes.push_back({static_cast<int32_t>(batch.rows()),
                                 blocks[static_cast<size_t>(position / kKvBlock)],
                                 static_cast<int32_t>(position % kKvBlock)});
      batch.tokens.push_back(task.tokens[static_cast<size_t>(position)]);
      batch.positions.push_back(static_cast<int32_t>(position));
    }
    const auto used = static_cast<size_t>((end + kKvBlock - 1) / kKvBlock);
    batch.segments.push_back({row_begin, chunk.count, task.computed, blocks.first(used)});
    if (chunk.reaches_end()) batch.output_rows.push_back(static_cast<int32_t>(batch.rows() - 1));
    const model::Adapter* adapter = task.sequence->request().adapter.get();
    if (adapter == nullptr) continue;
    if (!batch.adapters.empty() && batch.adapters.back().adapter == adapter) {
      batch.adapters.back().row_end = batch.rows();
    } else {
      batch.adapters.push_back({row_begin, batch.rows(), adapter});
    }
  }
  return batch;
}

// What a step consists of, for whoever records it: a request's rows bear its seed, which is its key
// (contract 3).
void mark_rows(std::span<const Chunk> chunks) {
  if (!trace::on(trace::Level::kSteps)) return;
  for (const Chunk& chunk : chunks) {
    const uint64_t key = chunk.task->sequence->request().params.seed;
    const bool prefill = chunk.task->in_prefill();
    trace::mark(trace::Level::kSteps, prefill ? "prefill.rows" : "decode.rows",
                {.rows = chunk.count, .key = key});
    if (!chunk.reaches_end()) continue;
    trace::mark(trace::Level::kSteps, prefill ? "prefill.drawn" : "decode.drawn",
                {.rows = 1, .key = key});
  }
}

}  // namespace

Engine::Engine(std::shared_ptr<const LanguageModel> model, EngineOptions options)
    : model_(given(std::move(model))),
      options_(resolve(options, *model_)),
      kv_blocks_(options_.kv_cache_bytes / model_->kv_block_bytes()),
      session_(model_->make_session(kv_blocks_)),
      scheduler_(options_.max_batch_rows, kv_blocks_, options_.prefix_cache) {
  publish_state();
}

Engine::~Engine() {
  for (const auto& sequence : incoming_) sequence->finish(FinishReason::kCancelled);
  for (const auto& sequence : scheduler_.clear()) sequence->finish(FinishReason::kCancelled);
}

void Engine::set_token_bytes(std::vector<std::string> pieces) {
  const auto vocab = static_cast<size_t>(model_->config().vocab_size);
  require(!pieces.empty() && pieces.size() <= vocab, "token bytes: expected 1 to ", vocab,
          " pieces (the model's vocabulary), got ", pieces.size());
  auto table = std::make_shared<const std::vector<std::string>>(std::move(pieces));
  const std::lock_guard lock(mutex_);
  token_bytes_ = std::move(table);
}

std::shared_ptr<Sequence> Engine::submit(std::vector<int32_t> tokens, SamplingParams params,
                                         std::shared_ptr<const model::Adapter> adapter) {
  const model::ModelConfig& config = model_->config();
  validate(params);
  require(!tokens.empty(), "prompt: expected at least one token, got none");
  const auto check_ids = [&](const char* what, const std::vector<int32_t>& ids) {
    for (size_t i = 0; i < ids.size(); ++i) {
      require(ids[i] >= 0 && ids[i] < config.vocab_size, what, ": expected ids in [0, ",
              config.vocab_size, "), got ", ids[i], " at index ", i);
    }
  };
  check_ids("prompt", tokens);
  check_ids("stop_token_ids", params.stop_token_ids);
  if (adapter != nullptr) adapter->require_fits(config);
  const auto prompt_size = static_cast<int64_t>(tokens.size());
  const int64_t context = model_->context_length();
  require(prompt_size < context, "prompt: expected fewer tokens than the context of ", context,
          ", got ", prompt_size, "; shorten it or load the model with a larger context_length");

  Request request;
  request.max_positions = prompt_size + std::min(params.max_new_tokens, context - prompt_size);
  const int64_t blocks = Scheduler::blocks_needed(request);
  require(blocks <= kv_blocks_, "prompt of ", prompt_size, " tokens with max_new_tokens ",
          params.max_new_tokens, " needs ", blocks, " KV blocks, the cache holds ", kv_blocks_,
          "; lower max_new_tokens or set kv_cache_bytes to at least ",
          blocks * model_->kv_block_bytes());
  std::vector<int32_t>& stops = request.stop_ids;
  stops = params.stop_token_ids;
  if (!params.ignore_eos) stops.insert(stops.end(), config.eos_ids.begin(), config.eos_ids.end());
  std::sort(stops.begin(), stops.end());
  stops.erase(std::unique(stops.begin(), stops.end()), stops.end());
  require(params.min_new_tokens == 0 || static_cast<int64_t>(stops.size()) < config.vocab_size,
          "min_new_tokens: expected 0 where every token of the vocabulary is a stop id, got ",
          params.min_new_tokens);
  request.prompt = std::move(tokens);
  request.adapter_version = adapter == nullptr ? 0 : adapter->version();
  request.adapter = std::move(adapter);
  request.params = std::move(params);
  request.owner = this;

  const std::lock_guard lock(mutex_);
  request.token_bytes = token_bytes_;
  require(request.params.stop.empty() || request.token_bytes != nullptr,
          "stop: stop strings need the bytes of every token; call set_token_bytes() first");
  auto sequence = std::make_shared<Sequence>(std::move(request));
  if (sequence->request().params.max_new_tokens == 0) sequence->finish(FinishReason::kLength);
  incoming_.push_back(sequence);
  return sequence;
}

std::vector<std::shared_ptr<Sequence>> Engine::step() {
  std::unique_lock lock(mutex_);
  turn_.wait(lock, [this] { return !driving_; });
  return in_turn(lock, [this](Sequences& finished) { step_once(finished); });
}

void Engine::launch() {
  std::unique_lock lock(mutex_);
  turn_.wait(lock, [this] { return !driving_; });
  if (drawing_) return;
  unreported_ = in_turn(lock, [this](Sequences& finished) {
    const trace::Span span(trace::Level::kSteps, "step");
    begin_step(finished);
  });
}

bool Engine::ready() const {
  const std::lock_guard lock(mutex_);
  return !driving_ && (!drawing_ || session_->ready());
}

void Engine::run(std::span<const std::shared_ptr<Sequence>> sequences,
                 const std::function<void()>& poll) {
  for (const auto& sequence : sequences) {
    require(sequence != nullptr && sequence->request().owner == this,
            "run: expected sequences submitted to this engine");
  }
  const auto unfinished = [&] {
    return std::any_of(sequences.begin(), sequences.end(),
                       [](const auto& sequence) { return !sequence->finished(); });
  };
  std::unique_lock lock(mutex_);
  while (unfinished()) {
    if (driving_) {
      turn_.wait_for(lock, std::chrono::milliseconds(50));
    } else {
      try {
        in_turn(lock, [this](Sequences& finished) { step_once(finished); });
      } catch (...) {  // each sequence that it ended carries it; rethrown below if one is ours
      }
    }
    if (!poll) continue;
    lock.unlock();
    try {
      poll();
      lock.lock();
    } catch (...) {
      for (const auto& sequence : sequences) sequence->cancel();
      lock.lock();
      turn_.wait(lock, [this] { return !driving_; });
      try {
        unreported_ = in_turn(lock, [this](Sequences& finished) { end_launched(finished); });
      } catch (...) {  // of a step that another thread launched; its sequences carry it
      }
      throw;
    }
  }
  lock.unlock();
  for (const auto& sequence : sequences) {
    if (const std::exception_ptr error = sequence->error()) std::rethrow_exception(error);
  }
}

bool Engine::idle() const {
  const std::lock_guard lock(mutex_);
  return incoming_.empty() && in_flight_ == 0 && unreported_.empty();
}

EngineStats Engine::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

// Work of the calling thread, whose turn it is: `lock` is held at entry and exit, not between.
// Returns what finished, in it and before.
Engine::Sequences Engine::in_turn(std::unique_lock<std::mutex>& lock,
                                  const std::function<void(Sequences&)>& work) {
  Sequences finished = take_incoming();
  driving_ = true;
  lock.unlock();
  std::exception_ptr error;
  try {
    work(finished);
  } catch (...) {
    error = std::current_exception();
    drawing_.reset();
    for (const auto& sequence : scheduler_.clear()) sequence->finish(FinishReason::kFailed, error);
  }
  lock.lock();
  publish_state();
  driving_ = false;
  turn_.notify_all();
  if (error) std::rethrow_exception(error);
  return finished;
}

void Engine::step_once(Sequences& finished) {
  if (drawing_) return end_launched(finished);
  const trace::Span span(trace::Level::kSteps, "step");
  begin_step(finished);
  end_step(finished);
}

// What was cancelled since the launch does not wait for another step.
void Engine::end_launched(Sequences& finished) {
  end_step(finished);
  extend(finished, scheduler_.drop_interrupted(Clock::now()));
}

void Engine::begin_step(Sequences& finished) {
  extend(finished, scheduler_.drop_interrupted(Clock::now()));
  admit();
  const std::vector<Chunk> chunks = scheduler_.pick();
  if (chunks.empty()) return;
  drawing_ = forward(chunks);
  draw(*drawing_);
}

void Engine::end_step(Sequences& finished) {
  if (!drawing_) return;
  const std::vector<Task*> drawing = *std::exchange(drawing_, std::nullopt);
  std::vector<ops::SampledToken> drawn(drawing.size());
  if (!drawn.empty()) session_->collect(drawn);
  for (size_t row = 0; row < drawn.size(); ++row) {
    if (drawn[row].token >= 0) continue;
    throw NumericError(cat("sampling: row ", row,
                           " has no finite softmax (NaN or infinite logits); check the weights and "
                           "the adapter"));
  }
  counts_.decode_tokens += static_cast<int64_t>(drawn.size());
  for (size_t i = 0; i < drawing.size(); ++i) {
    Task* task = drawing[i];
    task->tokens.push_back(drawn[i].token);
    const FinishReason reason = task->sequence->append(drawn[i]);
    if (reason == FinishReason::kNone) continue;
    task->sequence->finish(reason);
    finished.push_back(scheduler_.retire(task));
  }
}

// Hands what was submitted to the scheduler; returns what is finished already, or was between
// steps.
Engine::Sequences Engine::take_incoming() {
  Sequences finished = std::exchange(unreported_, {});
  for (auto& sequence : std::exchange(incoming_, {})) {
    if (sequence->finished()) {
      finished.push_back(std::move(sequence));
    } else {
      scheduler_.add(std::move(sequence));
    }
  }
  in_flight_ = scheduler_.size();
  return finished;
}

void Engine::admit() {
  for (const Task* task : scheduler_.admit()) {
    counts_.cached_tokens += task->computed;
    const PrefixCache::BlockTable& block_table = task->block_table;
    if (block_table.copy_slots == 0) continue;
    session_->copy_slots(block_table.copy_from, block_table.copy_to, block_table.copy_slots);
  }
}

// Computes the chunks; returns the tasks that draw a token, in the order of the session's hidden
// rows.
std::vector<Task*> Engine::forward(std::span<const Chunk> chunks) {
  const model::Batch batch = make_batch(chunks);
  mark_rows(chunks);
  trace::Span span(trace::Level::kSteps, "forward",
                   [&] { return trace::Counts{.rows = batch.rows()}; });
  session_->forward(batch);
  span.end();
  ++counts_.steps;
  std::vector<Task*> drawing;
  for (const Chunk& chunk : chunks) {
    if (chunk.reaches_end()) drawing.push_back(chunk.task);
    if (chunk.task->in_prefill()) counts_.prefill_tokens += chunk.count;
    scheduler_.complete(chunk);
  }
  return drawing;
}

void Engine::draw(std::span<Task* const> tasks) {
  std::vector<ops::SampleRow> rows;
  for (const Task* task : tasks) {
    rows.push_back(task->sequence->sample_row(static_cast<int64_t>(task->tokens.size())));
  }
  const trace::Span span(trace::Level::kSteps, "sample",
                         [&] { return trace::Counts{.rows = static_cast<int64_t>(rows.size())}; });
  if (!rows.empty()) session_->draw(rows);
}

void Engine::publish_state() {
  in_flight_ = scheduler_.size();
  stats_ = counts_;
  stats_.kv_blocks_in_use = scheduler_.cache().blocks_in_use();
  stats_.kv_blocks_cached = scheduler_.cache().blocks_cached();
  stats_.kv_blocks_capacity = scheduler_.cache().capacity();
}

}  // namespace alignpro::engine
