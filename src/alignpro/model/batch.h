#pragma once

#include <cstdint>
#include <vector>

#include "alignpro/ops/kv_view.h"
#include "alignpro/ops/mix_rows.h"

namespace alignpro::model {

class Adapter;

using ops::KvWrite;
using ops::Segment;

// Rows [row_begin, row_end) run with `adapter`; rows in no range run on the base weights.
struct AdapterRange {
  int64_t row_begin;
  int64_t row_end;
  const Adapter* adapter;
};

// What is drawn from, of sequences that several adapters write: see ops::RowSums.
struct OutputSums {
  std::vector<int32_t> begins, rows;
  std::vector<float> weights;

  ops::RowSums view() const { return {begins, rows, weights}; }
};

// One forward pass: rows packed, nothing padded. Ranges ascend and do not overlap; segments cover
// every row once, in order.
struct Batch {
  std::vector<int32_t> tokens;     // [rows]
  std::vector<int32_t> positions;  // [rows] absolute
  std::vector<Segment> segments;
  std::vector<KvWrite> kv_writes;
  std::vector<AdapterRange> adapters;
  std::vector<int32_t> output_rows;  // rows whose final hidden state is wanted, ascending
  OutputSums sums;                   // of these, to be drawn from; none: each is, by itself

  int64_t rows() const { return static_cast<int64_t>(tokens.size()); }
};

}  // namespace alignpro::model
