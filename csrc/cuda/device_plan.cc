#include "device_plan.h"

#include <algorithm>
#include <bit>
#include <numeric>

namespace alignpro::cuda {
namespace {

// Attention's grid and workspace are made for so many blocks of positions, or multiples.
constexpr int64_t kTableStep = 32;
// Graphs held before they are all made anew: new adapters leave old ones behind.
constexpr size_t kMostSteps = 48;

int64_t power_of_two(int64_t at_least) {
  return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(at_least)));
}

// The places of each key in [0, keys), ascending, key after key; not those of others.
void group(std::span<const int32_t> key_of, int64_t keys, std::vector<int32_t>& begins,
           std::vector<int32_t>& places) {
  begins.assign(static_cast<size_t>(keys) + 1, 0);
  const auto counts = [&](int32_t key) { return key >= 0 && key < keys; };
  for (const int32_t key : key_of) {
    if (counts(key)) ++begins[static_cast<size_t>(key) + 1];
  }
  std::partial_sum(begins.begin(), begins.end(), begins.begin());
  std::vector<int32_t> next(begins.begin(), begins.end() - 1);
  places.resize(static_cast<size_t>(begins.back()));
  for (size_t place = 0; place < key_of.size(); ++place) {
    if (!counts(key_of[place])) continue;
    places[static_cast<size_t>(next[static_cast<size_t>(key_of[place])]++)] =
        static_cast<int32_t>(place);
  }
}

template <typename T>
void assign(std::vector<T>& to, std::span<const T> from) {
  to.assign(from.begin(), from.end());
}

}  // namespace

// A batch in which each row is a sequence that draws, those of at most one adapter last: with rows
// that nobody reads, token 0 at position 0 of block 0 and written nowhere, behind both kinds, so
// that there are powers of two of each. False for another batch.
bool CudaPlan::pad_decode_step(const ops::PlanRequest& request) {
  const size_t count = request.tokens.size();
  const auto rows = static_cast<int64_t>(count);
  if (request.output_rows.size() != count || request.segments.size() != count) return false;
  const auto adapted = request.adapter_rows;
  if (adapted.size() > 1 || (!adapted.empty() && adapted[0].end != rows)) return false;
  const int64_t plain = adapted.empty() ? rows : adapted[0].begin;
  const int64_t first = plain == 0 ? 0 : power_of_two(plain);  // of the adapter
  const int64_t padded = first + (plain == rows ? 0 : power_of_two(rows - plain));
  const auto place = [&](int64_t row) { return row < plain ? row : row - plain + first; };
  for (auto* values : {&tokens_, &positions_, &output_rows_}) {
    values->assign(static_cast<size_t>(padded), 0);
  }
  all_segments_.clear();
  for (int64_t row = 0; row < padded; ++row) all_segments_.push_back({row, 1, 0, {}});
  for (size_t row = 0; row < count; ++row) {
    const int64_t to = place(static_cast<int64_t>(row));
    tokens_[static_cast<size_t>(to)] = request.tokens[row];
    positions_[static_cast<size_t>(to)] = request.positions[row];
    output_rows_[row] = static_cast<int32_t>(place(request.output_rows[row]));
    all_segments_[static_cast<size_t>(to)] = request.segments[row];
    all_segments_[static_cast<size_t>(to)].row_begin = to;
  }
  for (ops::KvWrite& write : kv_writes_) write.row = static_cast<int32_t>(place(write.row));
  if (!adapted.empty()) adapter_rows_ = {{first, padded}};
  return true;
}

void CudaPlan::prepare(const ops::PlanRequest& request) {
  const bool is_score = !request.segment_rows.empty();
  assign(kv_writes_, request.kv_writes);
  assign(adapter_rows_, request.adapter_rows);
  assign(targets_, request.targets);
  assign(sum_begins_, request.sums.begins);
  assign(sum_rows_, request.sums.rows);
  assign(sum_weights_, request.sums.weights);
  decodes_ = !is_score && pad_decode_step(request);
  if (!decodes_) {
    assign(tokens_, request.tokens);
    assign(positions_, request.positions);
    assign(output_rows_, request.output_rows);
    assign(all_segments_, request.segments);
  }
  rows_ = static_cast<int64_t>(tokens_.size());
  outputs_ = static_cast<int64_t>(output_rows_.size());
  // A row's first block is its segment's own; the others begin with what that one ends with.
  write_blocks_.assign(tokens_.size(), -1);
  copies_.clear();
  for (const ops::KvWrite& write : kv_writes_) {
    int32_t& block = write_blocks_[static_cast<size_t>(write.row)];
    if (block < 0) {
      block = write.block;
    } else {
      copies_.push_back({block, write.block, write.slot});
    }
  }
  prepare_attention(is_score);
  for (auto* values :
       {&child_begins_, &children_, &output_begins_, &row_outputs_, &soft_begins_, &soft_places_}) {
    values->clear();
  }
  if (is_score) prepare_score(request);
}

// Sequences of one row attend by attention_decode, which leaves nothing for a backward; a score's
// segments do by attention_prefill. Both give a position the same bits.
void CudaPlan::prepare_attention(bool is_score) {
  sequences_.clear();
  segments_.clear();
  decode.clear();
  most_decode_rows = most_segment_rows = 0;
  int64_t most_blocks = 1;
  for (const ops::Segment& segment : all_segments_) {
    most_blocks = std::max(most_blocks, static_cast<int64_t>(segment.blocks.size()));
    if (is_score || segment.row_count > 1) continue;
    const auto table_row = static_cast<int64_t>(sequences_.size());
    sequences_.push_back(segment.blocks);
    if (decode.empty() || decode.back().begin + decode.back().rows != segment.row_begin) {
      decode.push_back({segment.row_begin, 0, table_row});
    }
    most_decode_rows = std::max(most_decode_rows, ++decode.back().rows);
  }
  first_segment_row = static_cast<int64_t>(sequences_.size());
  for (const ops::Segment& segment : all_segments_) {
    if (!is_score && segment.row_count == 1) continue;
    sequences_.push_back(segment.blocks);
    segments_.push_back({static_cast<int32_t>(segment.row_begin),
                         static_cast<int32_t>(segment.row_count),
                         static_cast<int32_t>(segment.position)});
    most_segment_rows = std::max(most_segment_rows, segment.row_count);
  }
  // Of a decode step it is one of few, as the rows are.
  const int64_t steps = (most_blocks + kTableStep - 1) / kTableStep;
  table_ld = is_score ? most_blocks : kTableStep * (decodes_ ? power_of_two(steps) : steps);
}

void CudaPlan::prepare_score(const ops::PlanRequest& request) {
  const std::span<const ops::SegmentRows> paths = request.segment_rows;
  // Segments come with what continues them behind each, so a segment's children follow it.
  for (size_t s = 0; s < paths.size(); ++s) {
    const ops::Segment& segment = all_segments_[s];
    child_begins_.push_back(static_cast<int32_t>(children_.size()));
    const auto continues = [&](size_t other) {
      return paths[other].position > segment.position &&
             paths[other].key_rows[static_cast<size_t>(segment.position)] == segment.row_begin;
    };
    for (size_t v = s; v < paths.size() && (v == s || continues(v)); ++v) {
      children_.push_back(static_cast<int32_t>(v));
    }
  }
  child_begins_.push_back(static_cast<int32_t>(children_.size()));
  group(output_rows_, static_cast<int64_t>(tokens_.size()), output_begins_, row_outputs_);
  if (request.soft_rows == 0) return;
  std::vector<int32_t> named;  // by row; below 0: a token
  for (const int32_t token : tokens_) named.push_back(-1 - token);
  group(named, request.soft_rows, soft_begins_, soft_places_);
}

// fn(values, where they lie in the tables), of all but the block table.
template <typename Fn>
void CudaPlan::for_tables(Tables& t, const Fn& fn) const {
  fn(tokens_, t.tokens);
  fn(positions_, t.positions);
  fn(write_blocks_, t.write_blocks);
  fn(output_rows_, t.output_rows);
  fn(targets_, t.targets);
  fn(sum_begins_, t.sum_begins);
  fn(sum_rows_, t.sum_rows);
  fn(sum_weights_, t.sum_weights);
  fn(copies_, t.copies);
  fn(segments_, t.segments);
  fn(child_begins_, t.child_begins);
  fn(children_, t.children);
  fn(output_begins_, t.output_begins);
  fn(row_outputs_, t.row_outputs);
  fn(soft_begins_, t.soft_begins);
  fn(soft_places_, t.soft_places);
}

CudaPlan::Tables CudaPlan::cut(void* base) const {
  Workspace from(base);
  Tables t;
  for_tables(t, [&]<typename T>(const std::vector<T>& values, T*& at) {
    at = from.take<T>(static_cast<int64_t>(values.size()));
  });
  t.block_table = from.take<int32_t>(static_cast<int64_t>(sequences_.size()) * table_ld);
  t.bytes = from.bytes();
  return t;
}

void CudaPlan::place(void* memory) {
  tables = cut(memory);
  void* staging = staged_.reserve(tables.bytes);
  Tables staged = cut(staging);
  for_tables(staged,
             [](const auto& values, auto* at) { std::copy(values.begin(), values.end(), at); });
  std::fill_n(staged.block_table, static_cast<int64_t>(sequences_.size()) * table_ld, 0);
  for (size_t s = 0; s < sequences_.size(); ++s) {
    std::copy(sequences_[s].begin(), sequences_[s].end(),
              staged.block_table + static_cast<int64_t>(s) * table_ld);
  }
  ops_.upload(memory, staging, tables.bytes);
}

// The first of a shape runs as it is: its kernels are then loaded, and a shape seen once costs no
// graph. Memory that moved gives new shapes: no graph that is run knows an address that is no more.
void CudaPlan::run(std::span<void* const> memory, uint64_t adapter_version,
                   std::shared_ptr<const void> adapter, const std::function<void()>& launch) {
  if (!decodes_) return launch();
  const int64_t adapted = adapter_rows_.empty() ? 0 : rows_ - adapter_rows_.back().begin;
  StepShape shape{rows_, adapted, table_ld, adapter_version, {memory.begin(), memory.end()}};
  const bool seen = steps_.contains(shape);
  if (!seen && steps_.size() >= kMostSteps) steps_.clear();
  Step& step = steps_[std::move(shape)];
  if (!seen) {
    step.adapter = std::move(adapter);
    return launch();
  }
  if (!step.graph) step.graph.emplace(stream_, launch);
  step.graph->launch(stream_);
}

}  // namespace alignpro::cuda
