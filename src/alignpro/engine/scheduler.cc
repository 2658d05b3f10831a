#include "alignpro/engine/scheduler.h"

#include <algorithm>
#include <utility>

namespace alignpro::engine {
namespace {

using model::kKvBlock;

// Sequences that decode together and are drafted for: the rows of more share the weights as it is.
constexpr size_t kMostDrafting = 4;
// Rows of a draft. Beyond them a step costs what its rows do.
constexpr int64_t kMostDraft = 15;

// What a cached prefix may cover: the last prompt token is always computed, for its hidden state.
std::span<const int32_t> shareable(const Sequence& sequence) {
  return sequence.prompt().first(sequence.prompt().size() - 1);
}

}  // namespace

void Task::drop_draft() {
  tokens.resize(static_cast<size_t>(certain()));
  draft = {};
}

Scheduler::Scheduler(int64_t max_rows, int64_t kv_blocks, bool prefix_cache,
                     std::optional<Lookup> lookup)
    : max_rows_(max_rows),
      cache_(kv_blocks, prefix_cache),
      prefix_cache_(prefix_cache),
      lookup_(std::move(lookup)) {}

int64_t Scheduler::blocks_needed(const Request& request) {
  return (request.max_positions + kKvBlock - 1) / kKvBlock;
}

void Scheduler::add(std::shared_ptr<Sequence> sequence) { waiting_.push_back(std::move(sequence)); }

void Scheduler::drop_interrupted(Clock::time_point now) {
  const auto interrupt = [now](Sequence& sequence) {
    const FinishReason reason = sequence.interrupted(now);
    if (reason != FinishReason::kNone) sequence.finish(reason);
    return reason != FinishReason::kNone;
  };
  std::erase_if(waiting_, [&](const auto& sequence) { return interrupt(*sequence); });
  std::vector<Task*> ended;
  for (const auto& task : running_) {
    if (interrupt(*task->sequence)) ended.push_back(task.get());
  }
  for (Task* task : ended) retire(task);
}

std::vector<Task*> Scheduler::admit() {
  std::vector<Task*> admitted;
  // A row of each step for everything in flight: all of it always fits, and what decodes advances.
  int64_t rows = max_rows_ - static_cast<int64_t>(running_.size());
  int64_t passed_over = 0;
  auto next = waiting_.begin();
  // The limit on those passed over keeps a step's cost flat when thousands of samples of one prompt
  // wait for its first.
  while (next != waiting_.end() && rows > 0 && passed_over < max_rows_) {
    const Sequence& sequence = **next;
    if (awaits_prefix(sequence)) {
      ++passed_over;
      ++next;
      continue;
    }
    const Request& request = sequence.request();
    auto block_table =
        cache_.acquire(request.adapter_version, shareable(sequence), blocks_needed(request));
    if (!block_table) break;  // and nobody overtakes it: a large request must get its turn
    auto task = std::make_unique<Task>();
    task->sequence = std::move(*next);
    task->tokens = request.prompt;
    task->computed = block_table->cached;
    task->block_table = std::move(*block_table);
    --rows;
    admitted.push_back(task.get());
    running_.push_back(std::move(task));
    next = waiting_.erase(next);
  }
  return admitted;
}

// True while a sequence in prefill is computing a prefix that this one would share: n samples of a
// prompt then cost one prefill. Ends by itself: whatever is in prefill gets its share of the steps,
// or is retired; and each wait leaves more of the prompt cached than the last.
bool Scheduler::awaits_prefix(const Sequence& sequence) const {
  if (!prefix_cache_) return false;
  const auto tokens = shareable(sequence);
  int64_t cached = -1;
  for (const auto& task : running_) {
    if (!task->in_prefill()) continue;
    const Request& other = task->sequence->request();
    if (other.adapter_version != sequence.request().adapter_version) continue;
    const auto shared =
        std::mismatch(tokens.begin(), tokens.end(), other.prompt.begin(), other.prompt.end())
            .first -
        tokens.begin();
    if (shared == 0) continue;
    if (cached < 0) cached = cache_.cached_tokens(other.adapter_version, tokens);
    const int64_t gain = shared - cached;
    // A few common tokens (a BOS, say) are not worth a step's delay.
    const auto cost = static_cast<int64_t>(sequence.prompt().size()) - cached;
    if (gain >= kKvBlock || (gain > 0 && 2 * gain >= cost)) return true;
  }
  return false;
}

std::vector<Chunk> Scheduler::pick() {
  ++steps_;
  std::vector<Chunk> chunks;
  std::vector<Task*> prefill;
  int64_t rows = max_rows_;
  for (const auto& task : running_) {
    if (task->in_prefill()) {
      prefill.push_back(task.get());
    } else {
      chunks.push_back({task.get(), 1});
      --rows;
    }
  }
  // Equal shares, of a block at least, to those who have waited longest: a short prompt is not kept
  // behind long ones, and none starves. What the shares leave goes to the oldest.
  std::vector<Task*> turns = prefill;
  std::stable_sort(turns.begin(), turns.end(),
                   [](const Task* a, const Task* b) { return a->last_prefill < b->last_prefill; });
  const int64_t share =
      std::max(kKvBlock, rows / std::max<int64_t>(1, static_cast<int64_t>(prefill.size())));
  for (Task* task : prefill) task->rows = 0;
  for (const auto& [order, most] : {std::pair(&turns, share), std::pair(&prefill, max_rows_)}) {
    for (Task* task : *order) {
      const int64_t more = std::min({task->remaining() - task->rows, most, rows});
      task->rows += more;
      rows -= more;
    }
  }
  for (Task* task : prefill) {
    if (task->rows == 0) continue;
    task->last_prefill = steps_;
    chunks.push_back({task, task->rows});
  }
  add_drafts(chunks, rows);
  std::stable_sort(chunks.begin(), chunks.end(), [](const Chunk& a, const Chunk& b) {
    return a.task->sequence->request().adapter_version <
           b.task->sequence->request().adapter_version;
  });
  return chunks;
}

// Behind every token that this step draws, of a prompt's end too; `rows`: how many there may be. A
// token that is accepted spares a row of a later step, which has no prompts. Penalties make a draw
// depend on the drafted tokens before it.
void Scheduler::add_drafts(std::vector<Chunk>& chunks, int64_t rows) {
  if (!lookup_ || running_.size() > kMostDrafting) return;
  Lookup::Step step = lookup_->step_of(static_cast<int64_t>(running_.size()));
  for (Chunk& chunk : chunks) {
    Task& task = *chunk.task;
    const Request& request = task.sequence->request();
    if (!chunk.reaches_end() || penalises(request.params)) continue;
    // The last token that it may write is drawn, and read by nobody.
    const int64_t most = std::min({kMostDraft, rows, request.max_positions - task.certain() - 1});
    task.draft = lookup_->draft(request.adapter_version, task.tokens, request.stop_ids, most,
                                task.record, step);
    task.tokens.insert(task.tokens.end(), task.draft.tokens.begin(), task.draft.tokens.end());
    chunk.count += task.drafted();
    rows -= task.drafted();
  }
}

void Scheduler::complete(const Chunk& chunk) {
  advance(*chunk.task, chunk.count - chunk.task->drafted());
}

void Scheduler::accept(Task& task, const Draft& draft, const DraftRecord& result) {
  lookup_->learn(draft, result);
  task.record.verified += result.verified;
  task.record.accepted += result.accepted;
  if (result.accepted > 0) advance(task, result.accepted);
}

void Scheduler::advance(Task& task, int64_t count) {
  task.computed += count;
  const auto computed = static_cast<size_t>(task.computed);
  cache_.publish(task.block_table, std::span(task.tokens).first(computed),
                 computed == task.sequence->prompt().size());
}

std::shared_ptr<Sequence> Scheduler::retire(Task* task) {
  cache_.release(task->block_table);
  auto sequence = std::move(task->sequence);
  if (lookup_) {
    const auto size = sequence->prompt().size();
    lookup_->remember(sequence->request().adapter_version, sequence->prompt(),
                      std::span(task->tokens).subspan(size, task->certain() - size));
  }
  std::erase_if(running_, [task](const auto& running) { return running.get() == task; });
  return sequence;
}

std::vector<std::shared_ptr<Sequence>> Scheduler::clear() {
  std::vector<std::shared_ptr<Sequence>> all;
  while (!running_.empty()) all.push_back(retire(running_.back().get()));
  all.insert(all.end(), waiting_.begin(), waiting_.end());
  waiting_.clear();
  return all;
}

}  // namespace alignpro::engine
