#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "alignpro/engine/lookup.h"
#include "alignpro/engine/prefix_cache.h"
#include "alignpro/engine/sequence.h"

namespace alignpro::engine {

// An admitted sequence: what it holds inside the engine.
struct Task {
  std::shared_ptr<Sequence> sequence;
  std::vector<int32_t> tokens;  // the prompt, then what was generated, then the draft
  Draft draft;                  // of the step that is under way, to be verified by it
  DraftRecord record;           // of the drafts before
  std::vector<PrefixCache::BlockTable> block_tables;  // one a lane
  int64_t computed = 0;      // leading positions whose KV is written, of all lanes
  int64_t last_prefill = 0;  // the scheduler's last step with rows of its prompt
  int64_t picked = 0;        // positions of its prompt in the step that is being picked

  int64_t lanes() const { return static_cast<int64_t>(block_tables.size()); }
  int64_t drafted() const { return static_cast<int64_t>(draft.tokens.size()); }
  int64_t certain() const { return static_cast<int64_t>(tokens.size()) - drafted(); }
  void drop_draft();
  int64_t remaining() const { return static_cast<int64_t>(tokens.size()) - computed; }
  bool in_prefill() const { return computed < static_cast<int64_t>(sequence->prompt().size()); }
};

// Part of a step: positions [task->computed, task->computed + count), a row each and lane. Those of
// a draft come last, and tokens are drawn behind each and behind the one before them.
struct Chunk {
  Task* task;
  int64_t count;

  bool reaches_end() const { return count == task->remaining(); }  // its next token is drawn now
  int64_t drawn() const { return reaches_end() ? 1 + task->drafted() : 0; }
};

// Which sequences run, and which of their tokens are computed in a step. First come, first served;
// blocks for the longest a sequence can become are reserved when it is admitted, so nothing is ever
// preempted. A sequence's lanes are one task: they are admitted, advance and end together, each
// with blocks under its own weights' version. Knows sequences, never a tensor. One thread at a
// time.
class Scheduler {
 public:
  // `max_rows` >= 1: tokens in one step, decoding and prefill together. `lookup`: none, and nothing
  // is drafted.
  Scheduler(int64_t max_rows, int64_t kv_blocks, bool prefix_cache, std::optional<Lookup> lookup);

  // Blocks reserved for a request, those of all its lanes.
  static int64_t blocks_needed(const Request& request);

  void add(std::shared_ptr<Sequence> sequence);

  // Finishes what was cancelled or is out of time, in the queue and in flight, and takes it out.
  void drop_interrupted(Clock::time_point now);

  // Moves sequences from the queue into flight while there is room for their rows and blocks;
  // returns the new tasks, whose copies (block_tables' copy_*) are due before anything is computed,
  // in order.
  std::vector<Task*> admit();

  // The next step: a row a lane for everything that decodes, then prefills in equal shares, then
  // drafts where few sequences run; those with several lanes have none. Chunks of one adapter
  // are adjacent, base weights first.
  std::vector<Chunk> pick();

  // The chunk's KV has been written. That of a draft does not count before it is accepted: nobody
  // else can find it, and what is rejected is written over.
  void complete(const Chunk& chunk);

  // What came of the task's draft, which the caller has dropped: what was accepted stands in
  // task.tokens as it was drawn.
  void accept(Task& task, const Draft& draft, const DraftRecord& result);

  // What a step that drew a token behind each of its rows took.
  void took(int64_t rows, double seconds) {
    if (lookup_) lookup_->took(rows, seconds);
  }

  // Takes a task out and frees its blocks; the pointer is dead afterwards.
  std::shared_ptr<Sequence> retire(Task* task);

  // Takes everything out.
  std::vector<std::shared_ptr<Sequence>> clear();

  int64_t size() const { return static_cast<int64_t>(waiting_.size() + running_.size()); }
  const PrefixCache& cache() const { return cache_; }

 private:
  int64_t rows_of_running() const;
  int64_t cached_tokens(const Request& request, std::span<const int32_t> tokens) const;
  std::vector<PrefixCache::BlockTable> acquire(const Sequence& sequence);
  bool awaits_prefix(const Sequence& sequence) const;
  void add_drafts(std::vector<Chunk>& chunks, int64_t rows);
  void advance(Task& task, int64_t count);

  const int64_t max_rows_;
  PrefixCache cache_;
  const bool prefix_cache_;
  std::optional<Lookup> lookup_;
  int64_t steps_ = 0;
  std::deque<std::shared_ptr<Sequence>> waiting_;
  std::vector<std::unique_ptr<Task>> running_;  // by admission, oldest first
};

}  // namespace alignpro::engine
