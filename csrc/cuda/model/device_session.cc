#include "device_session.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "alignpro/core/error.h"
#include "alignpro/ops/kv_view.h"
#include "alignpro/ops/shared/sampling.h"

namespace alignpro::cuda {
namespace {

using ops::kKvBlock;

// Attention's grid and workspace are made for so many blocks of positions, or multiples.
constexpr int64_t kTableStep = 32;
// Graphs held before they are all made anew: new adapters leave old ones behind.
constexpr size_t kMostSteps = 48;

int64_t power_of_two(int64_t at_least) {
  return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(at_least)));
}

// A batch in which each row is a sequence that draws, those of at most one adapter last: with rows
// that nobody reads, token 0 at position 0 of block 0 and written nowhere, behind both kinds, so
// that there are powers of two of each. None for another batch.
std::optional<model::Batch> padded_decode_step(const model::Batch& batch) {
  const int64_t rows = batch.rows();
  const auto count = static_cast<size_t>(rows);
  if (batch.output_rows.size() != count || batch.segments.size() != count) return std::nullopt;
  const auto& adapters = batch.adapters;
  if (adapters.size() > 1 || (!adapters.empty() && adapters[0].row_end != rows)) {
    return std::nullopt;
  }
  const int64_t plain = adapters.empty() ? rows : adapters[0].row_begin;
  const int64_t first = plain == 0 ? 0 : power_of_two(plain);  // of the adapter
  const int64_t padded = first + (plain == rows ? 0 : power_of_two(rows - plain));
  const auto place = [&](int64_t row) { return row < plain ? row : row - plain + first; };
  model::Batch out;
  out.tokens.resize(static_cast<size_t>(padded));
  out.positions.resize(static_cast<size_t>(padded));
  out.output_rows.resize(static_cast<size_t>(padded));
  for (int64_t row = 0; row < padded; ++row) out.segments.push_back({row, 1, 0, {}});
  for (size_t row = 0; row < count; ++row) {
    const int64_t to = place(static_cast<int64_t>(row));
    out.tokens[static_cast<size_t>(to)] = batch.tokens[row];
    out.positions[static_cast<size_t>(to)] = batch.positions[row];
    out.output_rows[row] = static_cast<int32_t>(place(batch.output_rows[row]));
    out.segments[static_cast<size_t>(to)] = batch.segments[row];
    out.segments[static_cast<size_t>(to)].row_begin = to;
  }
  for (model::KvWrite write : batch.kv_writes) {
    write.row = static_cast<int32_t>(place(write.row));
    out.kv_writes.push_back(write);
  }
  if (!adapters.empty()) out.adapters.push_back({first, padded, adapters[0].adapter});
  return out;
}

}  // namespace

DeviceSession::DeviceSession(std::shared_ptr<const DeviceWeights> weights,
                             std::shared_ptr<DeviceAdapters> adapters, int64_t kv_blocks)
    : weights_(std::move(weights)),
      adapters_(std::move(adapters)),
      kv_(stream(), kv_blocks * weights_->kv_block_bytes()),
      tables_(stream()),
      arena_(stream()),
      hidden_rows_(stream()),
      draws_(stream()) {
  if (weights_->fast != nullptr) fast_.emplace(weights_->fast, stream());
}

DeviceSession::~DeviceSession() {
  try {
    wait();
  } catch (const Unavailable&) {  // the device is gone, and with it what it read
  }
}

// What was staged may be written again, what was held may go.
void DeviceSession::wait() {
  if (!under_way_) return;
  synchronize(stream());
  under_way_ = false;
  held_.clear();
}

// No graph is left with an address that is no more.
void DeviceSession::grow(DeviceBuffer& buffer, int64_t bytes) {
  if (buffer.reserve(bytes)) steps_.clear();
}

void DeviceSession::copy_slots(int64_t from, int64_t to, int64_t slots) {
  const DeviceScope scope(weights_->device);
  const model::ModelConfig& c = weights_->config;
  const int64_t slot = c.head_dim * block_bytes(weights_->dtype);
  const int64_t block = weights_->kv_block_bytes();
  copy_pieces(at(kv_.data(), to * block), at(kv_.data(), from * block), kKvBlock * slot,
              slots * slot, c.num_layers * c.num_kv_heads * 2, stream());
}

DeviceSession::Tables DeviceSession::upload(const model::Batch& batch, bool decodes) {
  Tables tables;
  const int64_t rows = tables.rows = batch.rows();
  const auto outputs = static_cast<int64_t>(batch.output_rows.size());
  tables.outputs = outputs;
  int64_t most_blocks = 1;
  for (const model::Segment& segment : batch.segments) {
    most_blocks = std::max(most_blocks, static_cast<int64_t>(segment.blocks.size()));
  }
  const int64_t steps = (most_blocks + kTableStep - 1) / kTableStep;
  const int64_t table_ld = tables.table_ld = kTableStep * (decodes ? power_of_two(steps) : steps);
  std::vector<const model::Segment*> sequences;  // as in block_table
  std::vector<Segment> prefill;
  for (const model::Segment& segment : batch.segments) {
    if (segment.row_count > 1) continue;
    const auto table_row = static_cast<int64_t>(sequences.size());
    sequences.push_back(&segment);
    if (tables.decode.empty() ||
        tables.decode.back().begin + tables.decode.back().rows != segment.row_begin) {
      tables.decode.push_back({segment.row_begin, 0, table_row});
    }
    ++tables.decode.back().rows;
    tables.most_decode_rows = std::max(tables.most_decode_rows, tables.decode.back().rows);
  }
  tables.prefill_table_row = static_cast<int64_t>(sequences.size());
  for (const model::Segment& segment : batch.segments) {
    if (segment.row_count == 1) continue;
    sequences.push_back(&segment);
    prefill.push_back({static_cast<int32_t>(segment.row_begin),
                       static_cast<int32_t>(segment.row_count),
                       static_cast<int32_t>(segment.position)});
    tables.most_prefill_rows = std::max(tables.most_prefill_rows, segment.row_count);
  }
  tables.prefill_count = static_cast<int64_t>(prefill.size());

  std::vector<int32_t> write_blocks(static_cast<size_t>(rows), -1);
  for (const model::KvWrite& write : batch.kv_writes) {
    int32_t& block = write_blocks[static_cast<size_t>(write.row)];
    require(block < 0, "device cuda: a row is written to one KV block, row ", write.row,
            " asks for two");
    block = write.block;
  }
  const int64_t table_values = static_cast<int64_t>(sequences.size()) * table_ld;
  struct Lists {
    int32_t *tokens, *positions, *write_blocks, *output_rows;
    Segment* prefill;
    int32_t* block_table;
    int64_t bytes;
  };
  const auto cut = [&](void* base) {
    Workspace from(base);
    Lists lists;
    lists.tokens = from.take<int32_t>(rows);
    lists.positions = from.take<int32_t>(rows);
    lists.write_blocks = from.take<int32_t>(rows);
    lists.output_rows = from.take<int32_t>(outputs);
    lists.prefill = from.take<Segment>(tables.prefill_count);
    lists.block_table = from.take<int32_t>(table_values);
    lists.bytes = from.bytes();
    return lists;
  };
  const int64_t bytes = cut(nullptr).bytes;
  void* staging = staged_tables_.reserve(bytes);
  grow(tables_, bytes);
  const Lists staged = cut(staging), there = cut(tables_.data());
  std::copy(batch.tokens.begin(), batch.tokens.end(), staged.tokens);
  std::copy(batch.positions.begin(), batch.positions.end(), staged.positions);
  std::copy(write_blocks.begin(), write_blocks.end(), staged.write_blocks);
  std::copy(batch.output_rows.begin(), batch.output_rows.end(), staged.output_rows);
  std::copy(prefill.begin(), prefill.end(), staged.prefill);
  std::fill_n(staged.block_table, table_values, 0);
  for (size_t s = 0; s < sequences.size(); ++s) {
    std::copy(sequences[s]->blocks.begin(), sequences[s]->blocks.end(),
              staged.block_table + static_cast<int64_t>(s) * table_ld);
  }
  copy_to_device(tables_.data(), staging, bytes, stream());
  tables.tokens = there.tokens;
  tables.positions = there.positions;
  tables.write_blocks = there.write_blocks;
  tables.output_rows = there.output_rows;
  tables.prefill = there.prefill;
  tables.block_table = there.block_table;

  int64_t row = 0;
  for (const model::AdapterRange& range : batch.adapters) {
    const auto adapter = adapters_->get(*range.adapter);
    held_.push_back(adapter);
    tables.most_ranks = std::max(tables.most_ranks, adapter->most_ranks());
    if (range.row_begin > row) tables.ranges.push_back({row, range.row_begin, nullptr});
    tables.ranges.push_back({range.row_begin, range.row_end, adapter.get()});
    row = range.row_end;
  }
  if (row < rows) tables.ranges.push_back({row, rows, nullptr});
  return tables;
}

DeviceSession::Buffers DeviceSession::carve(const Tables& tables) {
  const model::ModelConfig& c = weights_->config;
  const int64_t decode_bytes = attention_decode_bytes(
      weights_->attention(), tables.most_decode_rows, tables.table_ld * kKvBlock);
  const auto cut = [&](Workspace from, Buffers* buffers) {
    const auto matrix = [&](int64_t cols) {
      return from.matrix(tables.rows, cols, weights_->dtype);
    };
    LayerActivations& layer = buffers->layer;
    buffers->stream = layer.middle = matrix(c.hidden_size);
    layer.normed = matrix(c.hidden_size);
    layer.qkv = matrix(c.qkv_size());
    layer.attended = matrix(c.q_size());
    layer.gate_up = matrix(2 * c.intermediate_size);
    layer.activated = matrix(c.intermediate_size);
    layer.low.fill(matrix(tables.most_ranks));
    buffers->attention = from.take<char>(decode_bytes);
    return from.bytes();
  };
  Buffers buffers;
  grow(arena_, cut(Workspace(nullptr), &buffers));
  cut(Workspace(arena_.data()), &buffers);
  return buffers;
}

// Both ops give a position the same bits.
void DeviceSession::attend(const Tables& tables, void* workspace, const Matrix& qkv,
                           const PagedKv& kv, const Matrix& out) {
  const AttentionShape shape = weights_->attention();
  for (const DecodeRun& run : tables.decode) {
    attention_decode(shape, rows_of(qkv, run.begin, run.begin + run.rows),
                     tables.positions + run.begin,
                     tables.block_table + run.table_row * tables.table_ld, tables.table_ld,
                     tables.table_ld * kKvBlock, kv, workspace,
                     rows_of(out, run.begin, run.begin + run.rows), stream());
  }
  if (tables.prefill_count == 0) return;
  attention_prefill(shape, qkv, tables.prefill, tables.prefill_count, tables.most_prefill_rows,
                    tables.block_table + tables.prefill_table_row * tables.table_ld,
                    tables.table_ld, kv, out, nullptr, stream());
}

void DeviceSession::forward(const model::Batch& batch) {
  const DeviceScope scope(weights_->device);
  wait();
  under_way_ = true;
  const std::optional<model::Batch> padded = padded_decode_step(batch);
  const Tables tables = upload(padded ? *padded : batch, padded.has_value());
  const Buffers buffers = carve(tables);
  const int64_t width = weights_->config.hidden_size;
  grow(hidden_rows_, tables.outputs * width * block_bytes(weights_->dtype));
  hidden_ = {hidden_rows_.data(), tables.outputs, width, width, weights_->dtype};
  if (padded) {
    compute_as_graph(tables, buffers);
  } else {
    compute(tables, buffers);
  }
  hidden_.rows = static_cast<int64_t>(batch.output_rows.size());
}

void DeviceSession::compute(const Tables& tables, const Buffers& buffers) {
  embedding(weights_->embedding, tables.tokens, buffers.stream, stream());
  const LayerPass pass{*weights_,           tables.ranges, tables.positions,
                       tables.write_blocks, stream(),      fast_ ? &*fast_ : nullptr};
  const Attend attending = [&](const Matrix& qkv, const PagedKv& kv, const Matrix& out) {
    attend(tables, buffers.attention, qkv, kv, out);
  };
  for (int64_t l = 0; l < weights_->config.num_layers; ++l) {
    layer_forward(pass, l, buffers.stream, buffers.stream,
                  weights_->kv_layer(kv_.data(), weights_->config.num_layers, l), buffers.layer,
                  attending);
  }
  if (tables.outputs == 0) return;
  // The stream is a table too, its rows chosen as an embedding's are.
  embedding(buffers.stream, tables.output_rows, hidden_, stream());
  rms_norm(hidden_, weights_->final_norm, static_cast<float>(weights_->config.rms_eps), hidden_,
           stream());
}

// The first of a shape runs as it is: its kernels are then loaded, and a shape seen once costs no
// graph.
void DeviceSession::compute_as_graph(const Tables& tables, const Buffers& buffers) {
  const auto adapter = held_.empty() ? nullptr : held_.back();
  const int64_t adapted = adapter == nullptr ? 0 : tables.rows - tables.ranges.back().begin;
  const StepShape shape{tables.rows, adapted, tables.table_ld,
                        adapter == nullptr ? 0 : adapter->version()};
  const bool seen = steps_.contains(shape);
  if (!seen && steps_.size() >= kMostSteps) steps_.clear();
  Step& step = steps_[shape];
  if (!seen) {
    step.adapter = adapter;
    compute(tables, buffers);
    return;
  }
  if (!step.graph) step.graph.emplace(stream(), [&] { compute(tables, buffers); });
  step.graph->launch(stream());
}

bool DeviceSession::ready() const {
  if (!under_way_) return true;
  const DeviceScope scope(weights_->device);
  return is_done(stream());
}

void DeviceSession::draw(std::span<const ops::SampleRow> rows) {
  const DeviceScope scope(weights_->device);
  const auto count = static_cast<int64_t>(rows.size());
  require(count == hidden_.rows, "draw: expected ", hidden_.rows,
          " rows, those of the last forward, got ", count);
  drawn_ = {};
  if (count == 0) return;
  std::vector<SampleRow> requests;
  std::vector<int32_t> banned;
  bool truncated = false;  // without, no logits are kept
  for (const ops::SampleRow& row : rows) {
    const auto bans = static_cast<int32_t>(row.banned.size());
    requests.push_back({row, row.uniform, static_cast<int32_t>(banned.size()), bans});
    banned.insert(banned.end(), row.banned.begin(), row.banned.end());
    truncated |= ops::truncates(row, bans);
  }
  struct Pieces {
    SampleRow* requests;
    int32_t* banned;
    int64_t request_bytes;  // of both
    int32_t* results;       // tokens, log-probabilities, kept masses: [3][count]
    int64_t staged_bytes;   // of all so far
    void* workspace;
    int64_t bytes;
  };
  const auto cut = [&](void* base) {
    Workspace from(base);
    Pieces pieces;
    pieces.requests = from.take<SampleRow>(count);
    pieces.banned = from.take<int32_t>(static_cast<int64_t>(banned.size()));
    pieces.request_bytes = from.bytes();
    pieces.results = from.take<int32_t>(3 * count);
    pieces.staged_bytes = from.bytes();
    pieces.workspace =
        from.take<char>(head_sample_bytes(count, weights_->config.vocab_size, truncated));
    pieces.bytes = from.bytes();
    return pieces;
  };
  const Pieces sizes = cut(nullptr);
  draws_.reserve(sizes.bytes);
  void* staging = staged_draws_.reserve(sizes.staged_bytes);
  const Pieces staged = cut(staging), there = cut(draws_.data());
  std::copy(requests.begin(), requests.end(), staged.requests);
  std::copy(banned.begin(), banned.end(), staged.banned);
  copy_to_device(draws_.data(), staging, sizes.request_bytes, stream());
  auto* logprobs = reinterpret_cast<float*>(there.results + count);
  const Truncation truncation{there.banned, logprobs + count};
  head_sample(hidden_, weights_->head, there.requests, there.results, logprobs, there.workspace,
              stream(), truncated ? &truncation : nullptr);
  copy_to_host(staged.results, there.results, count * (truncated ? 12 : 8), stream());
  under_way_ = true;
  drawn_ = {count, truncated, staged.results};
}

void DeviceSession::collect(std::span<ops::SampledToken> out) {
  const DeviceScope scope(weights_->device);
  wait();
  const auto [count, truncated, tokens] = drawn_;
  require(static_cast<int64_t>(out.size()) == count, "collect: expected ", count,
          " rows, those of the last draw, got ", out.size());
  const auto* logprobs = reinterpret_cast<const float*>(tokens + count);
  for (int64_t i = 0; i < count; ++i) {
    out[static_cast<size_t>(i)] = {tokens[i], logprobs[i], truncated ? logprobs[count + i] : 1.0f};
  }
}

}  // namespace alignpro::cuda
