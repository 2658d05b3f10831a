#include "alignpro/engine/scheduler.h"

#include <algorithm>
#include <utility>

namespace alignpro::engine {
namespace {

using model::kKvBlock;

// Sequences that decode together and are drafted for: the rows of more share the weights as it is.
constexpr int64_t kMostDrafting = 4;
// Rows of a draft. Beyond them a step costs what its rows do.
constexpr int64_t kMostDraft = 15;

// What a cached prefix may cover: the last prompt token is always computed, for its hidden state.
std::span<const int32_t> shareable(const Sequence& sequence) {
  return sequence.prompt().first(sequence.prompt().size() - 1);
}

int64_t blocks_of_lane(const Request& request) {
  return (request.max_positions + kKvBlock - 1) / kKvBlock;
}

// Whether all weights that read the one's prompt read the other's, too.
bool covers(const Request& other, const Request& request) {
  return std::ranges::all_of(request.lanes, [&](const model::Lane& lane) {
    return std::ranges::find(other.lanes, lane.version, &model::Lane::version) != other.lanes.end();
  });
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
  return blocks_of_lane(request) * std::ssize(request.lanes);
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

int64_t Scheduler::rows_of_running() const {
  int64_t rows = 0;
  for (const auto& task : running_) rows += task->lanes();
  return rows;
}

// Positions that all lanes have computed.
int64_t Scheduler::cached_tokens(const Request& request, std::span<const int32_t> tokens) const {
  int64_t least = std::ssize(tokens);
  for (const model::Lane& lane : request.lanes) {
    least = std::min(least, cache_.cached_tokens(lane.version, tokens));
  }
  return least;
}

// A block table a lane, with what is cached of all of them alike, so that no lane writes what it
// shares; nothing where they do not fit.
std::vector<PrefixCache::BlockTable> Scheduler::acquire(const Sequence& sequence) {
  const Request& request = sequence.request();
  auto tokens = shareable(sequence);
  const bool alone = request.lanes.size() == 1;
  if (!alone) tokens = tokens.first(static_cast<size_t>(cached_tokens(request, tokens)));
  for (;;) {
    std::vector<PrefixCache::BlockTable> tables;
    int64_t least = std::ssize(tokens);
    for (const model::Lane& lane : request.lanes) {
      auto table = cache_.acquire(lane.version, tokens, blocks_of_lane(request));
      if (!table) break;
      least = std::min(least, table->cached);
      tables.push_back(std::move(*table));
    }
    const bool fit = tables.size() == request.lanes.size();
    if (fit && (alone || least == std::ssize(tokens))) return tables;
    for (PrefixCache::BlockTable& table : tables) cache_.release(table);
    if (!fit) return {};
    // A lane's blocks took the place of what was cached for the next.
    tokens = tokens.first(static_cast<size_t>(least));
  }
}

std::vector<Task*> Scheduler::admit() {
  std::vector<Task*> admitted;
  // A row of each step and lane for everything in flight: all of it always fits, and what decodes
  // advances.
  int64_t rows = max_rows_ - rows_of_running();
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
    if (std::ssize(request.lanes) > rows) break;
    auto block_tables = acquire(sequence);
    if (block_tables.empty()) break;  // and nobody overtakes it: a large request must get its turn
    auto task = std::make_unique<Task>();
    task->sequence = std::move(*next);
    task->tokens = request.prompt;
    task->computed = block_tables.front().cached;
    task->block_tables = std::move(block_tables);
    rows -= task->lanes();
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
    if (!covers(other, sequence.request())) continue;
    const auto shared =
        std::mismatch(tokens.begin(), tokens.end(), other.prompt.begin(), other.prompt.end())
            .first -
        tokens.begin();
    if (shared == 0) continue;
    if (cached < 0) cached = cached_tokens(sequence.request(), tokens);
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
      rows -= task->lanes();
    }
  }
  // Equal shares, of a block at least, to those who have waited longest: a short prompt is not kept
  // behind long ones, and none starves. What the shares leave goes to the oldest.
  std::vector<Task*> turns = prefill;
  std::stable_sort(turns.begin(), turns.end(),
                   [](const Task* a, const Task* b) { return a->last_prefill < b->last_prefill; });
  const int64_t share =
      std::max(kKvBlock, rows / std::max<int64_t>(1, static_cast<int64_t>(prefill.size())));
  for (Task* task : prefill) task->picked = 0;
  for (const auto& [order, most] : {std::pair(&turns, share), std::pair(&prefill, max_rows_)}) {
    for (Task* task : *order) {
      const int64_t lanes = task->lanes();
      const int64_t more = std::min(
          {task->remaining() - task->picked, std::max<int64_t>(1, most / lanes), rows / lanes});
      task->picked += more;
      rows -= more * lanes;
    }
  }
  for (Task* task : prefill) {
    if (task->picked == 0) continue;
    task->last_prefill = steps_;
    chunks.push_back({task, task->picked});
  }
  add_drafts(chunks, rows);
  std::stable_sort(chunks.begin(), chunks.end(), [](const Chunk& a, const Chunk& b) {
    return a.task->sequence->request().lanes.front().version <
           b.task->sequence->request().lanes.front().version;
  });
  return chunks;
}

// Behind every token that this step draws, of a prompt's end too; `rows`: how many there may be. A
// token that is accepted spares a row of a later step, which has no prompts. Penalties make a draw
// depend on the drafted tokens before it. A draft's token costs a row a lane, for which several
// lanes rarely pay.
void Scheduler::add_drafts(std::vector<Chunk>& chunks, int64_t rows) {
  const int64_t running = rows_of_running();
  if (!lookup_ || running > kMostDrafting) return;
  Lookup::Step step = Lookup::step_of(running);
  for (Chunk& chunk : chunks) {
    Task& task = *chunk.task;
    const Request& request = task.sequence->request();
    if (!chunk.reaches_end() || penalises(request.params) || task.lanes() > 1) continue;
    // The last token that it may write is drawn, and read by nobody.
    const int64_t most = std::min({kMostDraft, rows, request.max_positions - task.certain() - 1});
    task.draft = lookup_->draft(request.lanes.front().version, task.tokens, request.stop_ids, most,
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
  for (PrefixCache::BlockTable& table : task.block_tables) {
    cache_.publish(table, std::span(task.tokens).first(computed),
                   computed == task.sequence->prompt().size());
  }
}

std::shared_ptr<Sequence> Scheduler::retire(Task* task) {
  for (PrefixCache::BlockTable& table : task->block_tables) cache_.release(table);
  auto sequence = std::move(task->sequence);
  if (lookup_ && task->lanes() == 1) {
    const auto size = sequence->prompt().size();
    lookup_->remember(sequence->request().lanes.front().version, sequence->prompt(),
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
