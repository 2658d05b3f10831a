#pragma once

// A batch as the kernels read it, in one piece of device memory, and the graphs of the steps that
// came before. A step in which every sequence decodes, under the base weights or one adapter, is a
// graph from its second time on, one for every power of two of rows of either kind and of chunks of
// positions.

#include <compare>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "alignpro/ops/ops.h"
#include "runtime.h"

namespace alignpro::cuda {

struct CudaRope final : ops::Rope {
  const float *cos = nullptr, *sin = nullptr;  // [positions, rotary_dim / 2]
};

class CudaPlan final : public ops::Plan {
 public:
  // Consecutive rows, a sequence each; their blocks in rows of block_table from table_row on.
  struct DecodeRun {
    int64_t begin, rows, table_row;
  };
  struct Tables {
    int32_t *tokens, *positions, *write_blocks;  // [rows]
    int32_t *output_rows, *targets;              // [outputs]; targets of a score alone
    int32_t *sum_begins, *sum_rows;              // of output rows, by sum_weights
    float* sum_weights;
    KvCopy* copies;        // of blocks that others go on with
    Segment* segments;     // of several rows each; of a score, all
    int32_t* block_table;  // sequences of one row, then the segments'
    // Of a score: who sees a segment's keys, the outputs of each row, the rows of each soft row.
    int32_t *child_begins, *children, *output_begins, *row_outputs, *soft_begins, *soft_places;
    int64_t bytes;
  };

  CudaPlan(std::vector<ops::AttentionKind> kinds, ops::Ops& ops, Stream stream)
      : Plan(std::move(kinds)), ops_(ops), stream_(stream), staged_(ops) {}

  void prepare(const ops::PlanRequest& request) override;
  int64_t bytes() const override { return cut(nullptr).bytes; }
  void place(void* memory) override;
  void run(std::span<void* const> memory, uint64_t adapter_version,
           std::shared_ptr<const void> adapter, const std::function<void()>& launch) override;

  int64_t copies() const { return static_cast<int64_t>(copies_.size()); }
  int64_t segments() const { return static_cast<int64_t>(segments_.size()); }

  Tables tables = {};
  int64_t table_ld = 1;  // blocks of a sequence
  std::vector<DecodeRun> decode;
  int64_t most_decode_rows = 0, most_segment_rows = 0, first_segment_row = 0;

 private:
  // What a decode step's launches depend on.
  struct StepShape {
    int64_t rows, adapted, table_ld;  // adapted: the last so many rows are the adapter's
    uint64_t adapter;                 // its version; 0: base weights
    std::vector<void*> memory;
    auto operator<=>(const StepShape&) const = default;
  };
  struct Step {
    std::shared_ptr<const void> adapter;
    std::optional<OwnedGraph> graph;
  };

  bool pad_decode_step(const ops::PlanRequest& request);
  void prepare_attention(bool is_score);
  void prepare_score(const ops::PlanRequest& request);
  template <typename Fn>
  void for_tables(Tables& tables, const Fn& fn) const;
  Tables cut(void* base) const;

  ops::Ops& ops_;
  const Stream stream_;
  ops::HostBuffer staged_;
  bool decodes_ = false;
  std::vector<int32_t> tokens_, positions_, output_rows_, targets_, write_blocks_;
  std::vector<ops::Segment> all_segments_;
  std::vector<ops::KvWrite> kv_writes_;
  std::vector<KvCopy> copies_;
  std::vector<Segment> segments_;
  std::vector<std::span<const int32_t>> sequences_;  // as in block_table
  std::vector<int32_t> child_begins_, children_, output_begins_, row_outputs_;
  std::vector<int32_t> soft_begins_, soft_places_;
  std::vector<int32_t> sum_begins_, sum_rows_;
  std::vector<float> sum_weights_;
  std::map<StepShape, Step> steps_;
};

}  // namespace alignpro::cuda
