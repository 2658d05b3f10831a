// Scores by the passes that a session runs: whole sequences side by side, some hundred rows at a
// time, then linear_logprob over the hidden rows where they lie.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "alignpro/core/error.h"
#include "alignpro/ops/kv_view.h"
#include "device_model.h"
#include "device_session.h"

namespace alignpro::cuda {
namespace {

using ops::kKvBlock;

constexpr int64_t kPassRows = 512;
constexpr int64_t kGroupTokens = 2048;  // whose KV is held at once, or one longer sequence's

// A token that is scored: its place in the flat outputs.
struct Scored {
  int32_t token;
  int64_t to;
};

// One forward of a group, and what its output rows predict.
struct Pass {
  model::Batch batch;
  std::vector<Scored> scored;
};

int64_t rows_of(const std::vector<int32_t>& sequence) {
  return static_cast<int64_t>(sequence.size()) - 1;  // the last token predicts nothing
}
int64_t blocks_of(const std::vector<int32_t>& sequence) {
  return (rows_of(sequence) + kKvBlock - 1) / kKvBlock;
}

// Sequences [begin, end) that are scored together.
struct Group {
  size_t begin, end;
  int64_t blocks;
};

std::vector<Group> groups_of(const model::ScoreRequest& request) {
  std::vector<Group> groups;
  int64_t tokens = 0;
  for (size_t s = 0; s < request.sequences.size(); ++s) {
    const auto size = static_cast<int64_t>(request.sequences[s].size());
    if (groups.empty() || tokens + size > kGroupTokens) {
      groups.push_back({s, s, 0});
      tokens = 0;
    }
    tokens += size;
    groups.back().end = s + 1;
    groups.back().blocks += blocks_of(request.sequences[s]);
  }
  return groups;
}

// A group's rows in passes. Blocks of sequence after sequence lie in `blocks`, which outlives them.
std::vector<Pass> passes_of(const model::ScoreRequest& request, const Group& group,
                            std::span<const int32_t> blocks, int64_t first_value) {
  std::vector<Pass> passes;
  for (size_t s = group.begin; s < group.end; ++s) {
    const std::vector<int32_t>& sequence = request.sequences[s];
    const int64_t start = request.starts[s], rows = rows_of(sequence);
    for (int64_t position = 0; position < rows;) {
      if (passes.empty() || passes.back().batch.rows() >= kPassRows) passes.emplace_back();
      Pass& pass = passes.back();
      model::Batch& batch = pass.batch;
      const int64_t begin = batch.rows(), count = std::min(rows - position, kPassRows - begin);
      const int64_t used = (position + count + kKvBlock - 1) / kKvBlock;
      batch.segments.push_back({begin, count, position, blocks.first(static_cast<size_t>(used))});
      for (const int64_t end = position + count; position < end; ++position) {
        const auto row = static_cast<int32_t>(batch.rows());
        batch.kv_writes.push_back({row, blocks[static_cast<size_t>(position / kKvBlock)],
                                   static_cast<int32_t>(position % kKvBlock)});
        batch.tokens.push_back(sequence[static_cast<size_t>(position)]);
        batch.positions.push_back(static_cast<int32_t>(position));
        if (position + 1 < start) continue;
        batch.output_rows.push_back(row);
        pass.scored.push_back(
            {sequence[static_cast<size_t>(position + 1)], first_value + position + 1 - start});
      }
    }
    blocks = blocks.subspan(static_cast<size_t>(blocks_of(sequence)));
    first_value += static_cast<int64_t>(sequence.size()) - start;
  }
  return passes;
}

// All rows under one adapter, or none.
const Matrix& forward(DeviceSession& session, const model::Adapter* adapter, model::Batch& batch) {
  batch.adapters.clear();
  if (adapter != nullptr) batch.adapters.push_back({0, batch.rows(), adapter});
  session.forward(batch);
  return session.hidden();
}

// linear_logprob over one pass's rows, its values brought to their places.
class Values {
 public:
  explicit Values(Stream stream) : stream_(stream), memory_(stream) {}

  void run(const Pass& pass, LogprobInput in, ScoreValues& out) {
    const auto count = static_cast<int64_t>(pass.scored.size());
    Layout layout;
    const int64_t tokens = layout.take(count * 4), results = layout.take(5 * count * 4);
    const int64_t normalisers = layout.take(2 * count * 8);
    const int64_t workspace = layout.take(linear_logprob_bytes(in));
    memory_.reserve(layout.bytes());
    void* memory = memory_.data();
    auto* lse = reinterpret_cast<double*>(at(memory, normalisers));
    auto* values = reinterpret_cast<float*>(at(memory, results));
    auto* staged = static_cast<int32_t*>(staged_.reserve(5 * count * 4));
    for (int64_t i = 0; i < count; ++i) staged[i] = pass.scored[static_cast<size_t>(i)].token;
    copy_to_device(at(memory, tokens), staged, count * 4, stream_);
    in.tokens = reinterpret_cast<const int32_t*>(at(memory, tokens));
    linear_logprob(in,
                   {values, values + count, values + 2 * count, values + 3 * count,
                    values + 4 * count, lse, lse + count},
                   at(memory, workspace), stream_);
    // On one stream: the tokens have left before the values come.
    copy_to_host(staged, values, 5 * count * 4, stream_);
    synchronize(stream_);
    const auto* got = reinterpret_cast<const float*>(staged);
    for (int64_t i = 0; i < count; ++i) {
      if (!std::isfinite(got[i])) {
        throw NumericError(cat("linear_logprob: row ", i,
                               " has no finite softmax (NaN or infinite logits); check the "
                               "weights and the adapter"));
      }
      const auto to = static_cast<size_t>(pass.scored[static_cast<size_t>(i)].to);
      out.logprob[to] = got[i];
      out.entropy[to] = got[count + i];
      if (!out.has_reference) continue;
      out.kl[to] = got[2 * count + i];
      out.reference_logprob[to] = got[4 * count + i];
    }
  }

 private:
  Stream stream_;
  DeviceBuffer memory_;
  PinnedBuffer staged_;
};

}  // namespace

ScoreValues DeviceModel::score(const model::ScoreRequest& request) const {
  require(!request.keep_graph,
          "gradients: not on device cuda yet; load the trained model with device=\"cpu\"");
  require(!request.with_hidden,
          "with_hidden: not on device cuda yet; load the model with device=\"cpu\"");
  model::require_scorable(request, config(), context_length());
  const DeviceScope scope(weights_->device);
  int64_t total = 0, most_blocks = 1;
  const std::vector<Group> groups = groups_of(request);
  for (const Group& group : groups) most_blocks = std::max(most_blocks, group.blocks);
  for (size_t s = 0; s < request.sequences.size(); ++s) {
    total += static_cast<int64_t>(request.sequences[s].size()) - request.starts[s];
  }
  ScoreValues out;
  out.has_reference = request.with_reference;
  for (auto* values : {&out.logprob, &out.entropy}) values->resize(static_cast<size_t>(total));
  if (request.with_reference) {
    for (auto* v : {&out.kl, &out.reference_logprob}) v->resize(static_cast<size_t>(total));
  }
  if (total == 0) return out;

  std::vector<int32_t> blocks(static_cast<size_t>(most_blocks));
  for (size_t b = 0; b < blocks.size(); ++b) blocks[b] = static_cast<int32_t>(b);
  DeviceSession session(weights_, adapters_, most_blocks);
  std::optional<DeviceSession> other;
  if (request.with_reference) other.emplace(weights_, adapters_, most_blocks);
  Values values(session.stream());
  int64_t first_value = 0;
  for (const Group& group : groups) {
    for (Pass& pass : passes_of(request, group, blocks, first_value)) {
      LogprobInput in;
      in.hidden = forward(session, request.adapter.get(), pass.batch);
      in.weight = weights_->head;
      in.temperature = request.temperature;
      if (other) {
        in.ref_hidden = forward(*other, request.reference.get(), pass.batch);
        in.ref_weight = weights_->head;
        synchronize(other->stream());
      }
      if (!pass.scored.empty()) values.run(pass, in, out);
    }
    for (size_t s = group.begin; s < group.end; ++s) {
      first_value += static_cast<int64_t>(request.sequences[s].size()) - request.starts[s];
    }
  }
  return out;
}

}  // namespace alignpro::cuda
