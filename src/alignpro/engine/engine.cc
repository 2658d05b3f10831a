#include "alignpro/engine/engine.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <utility>

#include "alignpro/core/error.h"
#include "alignpro/core/fork.h"
#include "alignpro/core/trace.h"
#include "alignpro/engine/client.h"
#include "alignpro/model/adapter.h"
#include "alignpro/model/kv_pool.h"

namespace alignpro::engine {
namespace {

using model::kKvBlock;

std::shared_ptr<const LanguageModel> given(std::shared_ptr<const LanguageModel> model) {
  require(model != nullptr, "model: expected a Model, got none");
  return model;
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

// What a chunk is under one of its sequence's weights.
struct Part {
  const Chunk* chunk;
  size_t lane;
  int32_t first_output = 0;

  const model::Lane& weights() const { return chunk->task->sequence->request().lanes[lane]; }
};

// For each token that is drawn, chunk by chunk, the sum over its lanes, in their order.
model::OutputSums sums_of(std::vector<Part> parts) {
  std::ranges::sort(parts, {}, [](const Part& part) { return std::pair(part.chunk, part.lane); });
  model::OutputSums sums{{0}, {}, {}};
  for (auto begin = parts.begin(); begin != parts.end();) {
    const auto end = begin + begin->chunk->task->lanes();
    for (int64_t drawn = 0; drawn < begin->chunk->drawn(); ++drawn) {
      for (auto part = begin; part != end; ++part) {
        sums.rows.push_back(part->first_output + static_cast<int32_t>(drawn));
        sums.weights.push_back(part->weights().weight);
      }
      sums.begins.push_back(static_cast<int32_t>(sums.rows.size()));
    }
    begin = end;
  }
  return sums;
}

// Rows of one adapter are adjacent, base weights first.
model::Batch make_batch(std::span<const Chunk> chunks) {
  std::vector<Part> parts;
  for (const Chunk& chunk : chunks) {
    for (size_t lane = 0; lane < chunk.task->block_tables.size(); ++lane) {
      parts.push_back({&chunk, lane});
    }
  }
  std::ranges::stable_sort(parts, {}, [](const Part& part) { return part.weights().version; });
  model::Batch batch;
  for (Part& part : parts) {
    const Chunk& chunk = *part.chunk;
    const Task& task = *chunk.task;
    part.first_output = static_cast<int32_t>(batch.output_rows.size());
    const int64_t row_begin = batch.rows();
    const int64_t end = task.computed + chunk.count;
    const std::span<const int32_t> blocks(task.block_tables[part.lane].blocks);
    for (int64_t position = task.computed; position < end; ++position) {
      batch.kv_writes.push_back({static_cast<int32_t>(batch.rows()),
                                 blocks[static_cast<size_t>(position / kKvBlock)],
                                 static_cast<int32_t>(position % kKvBlock)});
      batch.tokens.push_back(task.tokens[static_cast<size_t>(position)]);
      batch.positions.push_back(static_cast<int32_t>(position));
    }
    const auto used = static_cast<size_t>((end + kKvBlock - 1) / kKvBlock);
    const int64_t drafts_begin = batch.rows() - task.drafted();
    batch.segments.push_back(
        {row_begin, drafts_begin - row_begin, task.computed, blocks.first(used)});
    // Drafts as sequences of one row each, for which a device has its fastest step.
    for (int64_t row = drafts_begin; row < batch.rows(); ++row) {
      batch.segments.push_back({row, 1, task.computed + row - row_begin, blocks.first(used)});
    }
    for (int64_t row = batch.rows() - chunk.drawn(); row < batch.rows(); ++row) {
      batch.output_rows.push_back(static_cast<int32_t>(row));
    }
    const model::Adapter* adapter = part.weights().adapter.get();
    if (adapter == nullptr) continue;
    if (!batch.adapters.empty() && batch.adapters.back().adapter == adapter) {
      batch.adapters.back().row_end = batch.rows();
    } else {
      batch.adapters.push_back({row_begin, batch.rows(), adapter});
    }
  }
  if (parts.size() > chunks.size()) batch.sums = sums_of(std::move(parts));
  return batch;
}

NumericError no_token(const Task& task) {
  const Request& request = task.sequence->request();
  return NumericError(
      cat("sampling: token ", task.tokens.size() - request.prompt.size(),
          " of the completion has no finite softmax (NaN or infinite logits) at temperature ",
          request.params.temperature,
          request.params.min_new_tokens == 0 ? "" : ", or min_new_tokens leaves none to draw",
          "; check the weights, the adapter and the temperature"));
}

// The rows of a step that draws a token behind each of them; 0 where some of a prompt is computed.
int64_t decoding_rows(std::span<const Chunk> chunks) {
  int64_t rows = 0;
  for (const Chunk& chunk : chunks) {
    if (chunk.count != chunk.drawn()) return 0;
    rows += chunk.count * chunk.task->lanes();
  }
  return rows;
}

// What a step consists of, for whoever records it: a request's rows bear its seed, which is its key
// (contract 3).
void mark_rows(std::span<const Chunk> chunks) {
  if (!trace::on(trace::Level::kSteps)) return;
  for (const Chunk& chunk : chunks) {
    const uint64_t key = chunk.task->sequence->request().params.seed;
    const bool prefill = chunk.task->in_prefill();
    trace::mark(trace::Level::kSteps, prefill ? "prefill.rows" : "decode.rows",
                {.rows = chunk.count * chunk.task->lanes(), .key = key});
    if (!chunk.reaches_end()) continue;
    trace::mark(trace::Level::kSteps, prefill ? "prefill.drawn" : "decode.drawn",
                {.rows = chunk.drawn(), .key = key});
  }
}

}  // namespace

Engine::Engine(std::shared_ptr<const LanguageModel> model, EngineOptions options)
    : model_(given(std::move(model))),
      options_(resolve(options, *model_)),
      kv_blocks_(options_.kv_cache_bytes / model_->kv_block_bytes()),
      session_(model_->make_session(kv_blocks_)),
      scheduler_(options_.max_batch_rows, kv_blocks_, options_.prefix_cache,
                 options_.lookup ? std::optional(Lookup(model_->row_cost())) : std::nullopt) {
  publish_state();
}

Engine::~Engine() {
  if (forked_in_call()) return;  // its locks may be held by threads that are not there
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
                                         model::Mixture of, const std::shared_ptr<Client>& client) {
  const model::ModelConfig& config = model_->config();
  validate(params);
  require(!tokens.empty(), "prompt: expected at least one token, got none");
  const auto check_id = [&](const char* what, int32_t id, size_t index) {
    require(id >= 0 && id < config.vocab_size, what, ": expected ids in [0, ", config.vocab_size,
            "), got ", id, " at index ", index);
  };
  for (size_t i = 0; i < params.stop_token_ids.size(); ++i) {
    check_id("stop_token_ids", params.stop_token_ids[i], i);
  }
  for (const model::Lane& lane : of.lanes()) {
    if (lane.adapter != nullptr) lane.adapter->require_fits(config);
  }
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] >= 0) {
      check_id("prompt", tokens[i], i);
      continue;
    }
    for (const model::Lane& lane : of.lanes()) {
      model::Adapter::require_row(lane.adapter.get(), tokens[i], cat("prompt: index ", i));
    }
  }
  const auto lanes = std::ssize(of.lanes());
  require(lanes <= options_.max_batch_rows, "adapter: a mixture of ", lanes,
          " takes as many rows a step, max_batch_rows is ", options_.max_batch_rows);
  const auto prompt_size = static_cast<int64_t>(tokens.size());
  const int64_t context = model_->context_length();
  require(prompt_size < context, "prompt: expected fewer tokens than the context of ", context,
          ", got ", prompt_size, "; shorten it or load the model with a larger context_length");

  Request request;
  request.lanes = of.lanes();
  request.max_positions = prompt_size + std::min(params.max_new_tokens, context - prompt_size);
  const int64_t blocks = Scheduler::blocks_needed(request);
  require(blocks <= kv_blocks_, "prompt of ", prompt_size, " tokens with max_new_tokens ",
          params.max_new_tokens, " needs ", blocks, " KV blocks",
          lanes == 1 ? std::string() : cat(" in ", lanes, " lanes"), ", the cache holds ",
          kv_blocks_, "; lower max_new_tokens or set kv_cache_bytes to at least ",
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
  request.params = std::move(params);
  request.client = client;

  const std::lock_guard lock(mutex_);
  request.token_bytes = token_bytes_;
  require(request.params.stop.empty() || request.token_bytes != nullptr,
          "stop: stop strings need the bytes of every token; call set_token_bytes() first");
  auto sequence = std::make_shared<Sequence>(std::move(request));
  if (client != nullptr) client->opened(sequence);
  if (sequence->request().params.max_new_tokens == 0) {
    sequence->finish(FinishReason::kLength);
  } else {
    incoming_.push_back(sequence);
  }
  return sequence;
}

void Engine::step(const Client* client) {
  std::unique_lock lock(mutex_);
  turn_.wait(lock, [this] { return !driving_; });
  if (client == nullptr || !client->has_finished()) in_turn(lock, &Engine::whole_step);
}

void Engine::launch() {
  std::unique_lock lock(mutex_);
  turn_.wait(lock, [this] { return !driving_; });
  if (!drawing_) in_turn(lock, &Engine::begin_launched);
}

bool Engine::ready() const {
  const std::lock_guard lock(mutex_);
  return !driving_ && (!drawing_ || session_->ready());
}

void Engine::run(Client& client, const std::function<void()>& poll) {
  std::unique_lock lock(mutex_);
  while (client.has_open()) {
    if (driving_) {
      turn_.wait_for(lock, std::chrono::milliseconds(50));
    } else {
      in_turn(lock, &Engine::whole_step);
    }
    if (!poll) continue;
    lock.unlock();
    try {
      poll();
      lock.lock();
    } catch (...) {
      client.cancel();
      lock.lock();
      turn_.wait(lock, [this] { return !driving_; });
      in_turn(lock, &Engine::end_launched);
      throw;
    }
  }
}

bool Engine::idle() const {
  const std::lock_guard lock(mutex_);
  return incoming_.empty() && in_flight_ == 0;
}

EngineStats Engine::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

// Work of the calling thread, whose turn it is: `lock` is held at entry and exit, not between. What
// throws is a defect of ours, or memory: it ends everything in the engine, which carries it.
void Engine::in_turn(std::unique_lock<std::mutex>& lock, void (Engine::*work)()) {
  for (auto& sequence : incoming_) scheduler_.add(std::move(sequence));
  incoming_.clear();
  in_flight_ = scheduler_.size();
  driving_ = true;
  lock.unlock();
  try {
    (this->*work)();
  } catch (...) {
    drawing_.reset();
    for (const auto& sequence : scheduler_.clear()) {
      sequence->finish(FinishReason::kFailed, std::current_exception());
    }
  }
  lock.lock();
  publish_state();
  driving_ = false;
  turn_.notify_all();
}

void Engine::whole_step() {
  if (drawing_) return end_launched();
  const trace::Span span(trace::Level::kSteps, "step");
  begin_step();
  end_step();
}

// What was cancelled since the launch does not wait for another step.
void Engine::end_launched() {
  end_step();
  scheduler_.drop_interrupted(Clock::now());
}

void Engine::begin_launched() {
  const trace::Span span(trace::Level::kSteps, "step");
  begin_step();
}

void Engine::begin_step() {
  scheduler_.drop_interrupted(Clock::now());
  admit();
  std::vector<Chunk> chunks = scheduler_.pick();
  if (chunks.empty()) return;
  const int64_t rows = decoding_rows(chunks);
  const Clock::time_point started = Clock::now();
  try {
    drawing_ = forward(chunks);
  } catch (const NumericError&) {  // a key that float16 cannot hold, say
    drop_failing(chunks);
    if (chunks.empty()) return;
    drawing_ = forward(chunks);
  }
  draw(*drawing_);
  if (rows > 0) {
    scheduler_.took(rows, std::chrono::duration<double>(Clock::now() - started).count());
  }
}

void Engine::end_step() {
  if (!drawing_) return;
  const std::vector<Task*> drawing = *std::exchange(drawing_, std::nullopt);
  size_t rows = 0;
  for (const Task* task : drawing) rows += static_cast<size_t>(1 + task->drafted());
  std::vector<ops::SampledToken> drawn(rows);
  if (!drawn.empty()) session_->collect(drawn);
  std::span<const ops::SampledToken> left(drawn);
  for (Task* task : drawing) {
    const auto own = left.first(static_cast<size_t>(1 + task->drafted()));
    left = left.subspan(own.size());
    take(*task, own);
  }
}

// The token drawn behind the last one that is certain, and, for as long as a draft's token is what
// was drawn in its place, the one behind that: each was drawn by its own key from what it would
// have followed without a draft.
void Engine::take(Task& task, std::span<const ops::SampledToken> drawn) {
  const Draft draft = task.draft;
  const int64_t drafted = task.drafted();
  task.drop_draft();
  FinishReason reason = FinishReason::kNone;
  std::exception_ptr error;
  int64_t taken = 0, accepted = 0;
  while (reason == FinishReason::kNone && taken == accepted && taken <= drafted) {
    const ops::SampledToken& token = drawn[static_cast<size_t>(taken)];
    if (token.token < 0) {
      error = std::make_exception_ptr(no_token(task));
      reason = FinishReason::kFailed;
      break;
    }
    task.tokens.push_back(token.token);
    reason = task.sequence->append(token);
    if (taken < drafted && draft.tokens[static_cast<size_t>(taken)] == token.token) ++accepted;
    ++taken;
  }
  counts_.decode_tokens += taken;
  counts_.drafted_tokens += drafted;
  counts_.accepted_tokens += accepted;
  if (drafted > 0) scheduler_.accept(task, draft, {std::min(taken, drafted), accepted});
  if (reason != FinishReason::kNone) scheduler_.retire(&task)->finish(reason, error);
}

void Engine::admit() {
  for (const Task* task : scheduler_.admit()) {
    counts_.cached_tokens += task->computed * task->lanes();
    for (const PrefixCache::BlockTable& table : task->block_tables) {
      if (table.copy_slots == 0) continue;
      session_->copy_slots(table.copy_from, table.copy_to, table.copy_slots);
    }
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
    if (chunk.task->in_prefill()) {
      counts_.prefill_tokens += (chunk.count - chunk.task->drafted()) * chunk.task->lanes();
    }
    scheduler_.complete(chunk);
  }
  return drawing;
}

// Of chunks whose forward failed, ends those that fail by themselves, with their own errors. The
// others are computed again: their bits do not depend on who shares the batch (contract 2).
void Engine::drop_failing(std::vector<Chunk>& chunks) {
  std::erase_if(chunks, [this](Chunk& chunk) {
    chunk.count -= chunk.task->drafted();  // which need not have come to be
    chunk.task->drop_draft();
    try {
      session_->forward(make_batch({&chunk, 1}));
      return false;
    } catch (const NumericError&) {
      scheduler_.retire(chunk.task)->finish(FinishReason::kFailed, std::current_exception());
      return true;
    }
  });
}

void Engine::draw(std::span<Task* const> tasks) {
  std::vector<ops::SampleRow> rows;
  for (const Task* task : tasks) {
    for (int64_t position = task->certain(); position <= std::ssize(task->tokens); ++position) {
      rows.push_back(task->sequence->sample_row(position));
    }
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
