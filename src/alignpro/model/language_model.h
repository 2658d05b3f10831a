#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "alignpro/model/batch.h"
#include "alignpro/model/config.h"
#include "alignpro/ops/head_sample.h"
#include "alignpro/ops/ops.h"

namespace alignpro::model {

// What one engine holds of a model: KV blocks by integer id, and the hidden rows between a forward
// and their draw. One thread at a time.
class Session {
 public:
  virtual ~Session() = default;

  // Copies the first `slots` positions of block `from` to block `to`, all layers and heads.
  virtual void copy_slots(int64_t from, int64_t to, int64_t slots) = 0;

  // Writes the batch's KV and keeps the final (normed) hidden states of batch.output_rows, or their
  // batch.sums. A row's bits depend on its own sequence alone (contract 2).
  virtual void forward(const Batch& batch) = 0;

  // Draws one token for each hidden row that the last forward kept; see ops::head_sample. A device
  // may still be at it, and at the forward, when this returns; collect() waits for the tokens.
  virtual void draw(std::span<const ops::SampleRow> rows) = 0;
  virtual bool ready() const = 0;  // collect() and the next forward() would not wait
  virtual void collect(std::span<ops::SampledToken> out) = 0;
};

// What the engine asks of a model: Model, or one that a reader can compute by hand in the engine's
// tests.
class LanguageModel {
 public:
  virtual ~LanguageModel() = default;

  virtual const ModelConfig& config() const = 0;
  virtual int64_t context_length() const = 0;
  virtual int64_t kv_block_bytes() const = 0;  // of kKvBlock positions, all layers
  // What a cache may take now of the memory it would lie in, where nobody says how much.
  virtual int64_t kv_share_bytes() const = 0;
  // What one more row adds to a step of one; all of it where a row's bits are not its own, and more
  // rows must not be verified together than were asked for.
  virtual ops::RowCost row_cost() const = 0;
  virtual std::unique_ptr<Session> make_session(int64_t kv_blocks) const = 0;
};

}  // namespace alignpro::model
