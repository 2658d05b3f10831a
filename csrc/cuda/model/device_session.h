#pragma once

// What one engine holds of a model on a GPU: the pool of KV blocks, the buffers of a step, a stream
// of its own. A step copies its tokens and tables in one piece and brings back tokens and
// log-probabilities, for which collect() waits; hidden rows stay on the device. A step in which
// every sequence decodes, under the base weights or one adapter, is a graph from its second time
// on, one for every power of two of rows of either kind and of chunks of positions.

#include <compare>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "../fast_linear.h"
#include "../runtime.h"
#include "alignpro/engine/language_model.h"
#include "device_adapter.h"
#include "device_layer.h"
#include "device_weights.h"

namespace alignpro::cuda {

class DeviceSession final : public engine::Session {
 public:
  DeviceSession(std::shared_ptr<const DeviceWeights> weights,
                std::shared_ptr<DeviceAdapters> adapters, int64_t kv_blocks);
  ~DeviceSession() override;

  void copy_slots(int64_t from, int64_t to, int64_t slots) override;
  void forward(const model::Batch& batch) override;
  void draw(std::span<const ops::SampleRow> rows) override;
  bool ready() const override;
  void collect(std::span<ops::SampledToken> out) override;

 private:
  // Consecutive rows, a sequence each; their blocks in rows of block_table from table_row on.
  struct DecodeRun {
    int64_t begin, rows, table_row;
  };
  // What a decode step's launches depend on.
  struct StepShape {
    int64_t rows, adapted, table_ld;  // adapted: the last so many rows are the adapter's
    uint64_t adapter;                 // its version; 0: base weights
    auto operator<=>(const StepShape&) const = default;
  };
  struct Step {
    std::shared_ptr<const DeviceAdapter> adapter;
    std::optional<OwnedGraph> graph;
  };
  // A batch as the kernels read it, in one piece of device memory.
  struct Tables {
    int64_t rows = 0, outputs = 0;
    int64_t table_ld = 0;  // blocks of a sequence
    const int32_t *tokens, *positions, *write_blocks, *output_rows;
    const int32_t* block_table;  // sequences of one row, then those of several
    std::vector<DecodeRun> decode;
    int64_t most_decode_rows = 0, prefill_table_row = 0;
    const Segment* prefill = nullptr;  // [prefill_count], of several rows each
    int64_t prefill_count = 0, most_prefill_rows = 0;
    std::vector<AdapterRows> ranges;  // cover all rows, in order
    int64_t most_ranks = 0;
  };
  // [rows, ...] each, in one arena.
  struct Buffers {
    Matrix stream;
    LayerActivations layer;  // its middle is the stream, one low serves all sites
    void* attention = nullptr;
  };

  // Where a draw's tokens arrive: [rows] of ids, log-probabilities and, where truncated, masses.
  struct Drawn {
    int64_t rows = 0;
    bool truncated = false;
    const int32_t* tokens = nullptr;
  };

  Stream stream() const { return stream_.get(); }
  void wait();
  void grow(DeviceBuffer& buffer, int64_t bytes);
  // decodes: table_ld is to be one of few, as the rows are.
  Tables upload(const model::Batch& batch, bool decodes);
  Buffers carve(const Tables& tables);
  void compute(const Tables& tables, const Buffers& buffers);
  void compute_as_graph(const Tables& tables, const Buffers& buffers);
  void attend(const Tables& tables, void* workspace, const Matrix& qkv, const PagedKv& kv,
              const Matrix& out);

  const std::shared_ptr<const DeviceWeights> weights_;
  const std::shared_ptr<DeviceAdapters> adapters_;
  OwnedStream stream_;
  std::optional<FastLinear> fast_;  // none in the strict mode
  DeviceBuffer kv_, tables_, arena_, hidden_rows_, draws_;
  PinnedBuffer staged_tables_, staged_draws_;
  Matrix hidden_;
  Drawn drawn_;
  bool under_way_ = false;  // the stream may still read what is staged and what is held
  std::vector<std::shared_ptr<const DeviceAdapter>> held_;
  std::map<StepShape, Step> steps_;  // they know the buffers' addresses
};

}  // namespace alignpro::cuda
