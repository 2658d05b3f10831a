// ops::Ops by the kernels of ops.h: each call puts its launches on the stream and does not wait.
// Long because all of Ops is here, most of it a call of the op.

#include "device_ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <utility>

#include "alignpro/core/error.h"
#include "alignpro/core/parallel.h"
#include "alignpro/ops/shared/sampling.h"
#include "checks.h"
#include "device_plan.h"
#include "fast_linear.h"
#include "matrix_store.h"
#include "runtime.h"

namespace alignpro::cuda {
namespace {

using ops::kKvBlock;
using ops::KvView;
using ops::rows_of;

struct CudaWeight final : ops::Weight {
  Matrix matrix;
};
struct CudaLora final : ops::LoraWeight {
  Matrix a, b;  // [ranks, inputs], [outputs, ranks]
  float scale = 0.0f;
  std::shared_ptr<const MatrixStore> store;  // of all sites of an adapter
};

struct CudaSoftRows final : ops::SoftRows {
  CudaSoftRows(DType dtype, std::unique_ptr<ops::Ops> ops, std::span<const float> rows,
               int64_t cols)
      : store(dtype, nullptr, std::move(ops)) {
    matrix = store.add(std::ssize(rows) / cols, cols, [&](int64_t row, std::byte* out) {
      round_values(dtype, rows.data() + row * cols, cols, out);
    });
    store.finish();
  }

  MatrixStore store;
};

const Matrix& matrix(const ops::Weight& weight) {
  return static_cast<const CudaWeight&>(weight).matrix;
}
const CudaLora& of(const ops::LoraWeight& lora) { return static_cast<const CudaLora&>(lora); }
const CudaPlan& of(const ops::Plan& plan) { return static_cast<const CudaPlan&>(plan); }

PagedKv paged(const KvView& kv) {
  const int64_t width = block_bytes(kv.dtype);
  return {kv.base, kv.block_stride / width, kv.head_stride / width, kv.value_offset / width};
}

class CudaSampler final : public ops::Sampler {
 public:
  CudaSampler(ops::Ops& ops, Stream stream)
      : ops_(ops), stream_(stream), memory_(ops), staged_(ops) {}

  void draw(const Matrix& hidden, const ops::Weight& head,
            std::span<const ops::SampleRow> rows) override;
  void collect(std::span<ops::SampledToken> out) override;

 private:
  ops::Ops& ops_;
  const Stream stream_;
  ops::Buffer memory_;
  ops::HostBuffer staged_;
  // Where a draw's tokens arrive: [count] of ids, log-probabilities and, where truncated, masses.
  int64_t count_ = 0;
  bool truncated_ = false;
  const int32_t* tokens_ = nullptr;
};

void CudaSampler::draw(const Matrix& hidden, const ops::Weight& head,
                       std::span<const ops::SampleRow> rows) {
  const auto count = count_ = static_cast<int64_t>(rows.size());
  if (count == 0) return;
  std::vector<SampleRow> requests;
  std::vector<int32_t> banned;
  bool truncated = false;  // without, no logits are kept
  for (const ops::SampleRow& row : rows) {
    require(row.penalties.empty(), "penalties: expected none on a CUDA device");
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
    pieces.workspace = from.take<char>(head_sample_bytes(count, head.rows, truncated));
    pieces.bytes = from.bytes();
    return pieces;
  };
  const Pieces sizes = cut(nullptr);
  memory_.reserve(sizes.bytes);
  void* staging = staged_.reserve(sizes.staged_bytes);
  const Pieces staged = cut(staging), there = cut(memory_.data());
  std::copy(requests.begin(), requests.end(), staged.requests);
  std::copy(banned.begin(), banned.end(), staged.banned);
  ops_.upload(memory_.data(), staging, sizes.request_bytes);
  auto* logprobs = reinterpret_cast<float*>(there.results + count);
  const Truncation truncation{there.banned, logprobs + count};
  head_sample(hidden, matrix(head), there.requests, there.results, logprobs, there.workspace,
              stream_, truncated ? &truncation : nullptr);
  copy_to_host(staged.results, there.results, count * (truncated ? 12 : 8), stream_);
  truncated_ = truncated;
  tokens_ = staged.results;
}

void CudaSampler::collect(std::span<ops::SampledToken> out) {
  require(static_cast<int64_t>(out.size()) == count_, "collect: expected ", count_,
          " rows, those of the last draw, got ", out.size());
  const auto* logprobs = reinterpret_cast<const float*>(tokens_ + count_);
  for (int64_t i = 0; i < count_; ++i) {
    out[static_cast<size_t>(i)] = {tokens_[i], logprobs[i],
                                   truncated_ ? logprobs[count_ + i] : 1.0f};
  }
}

class CudaOps final : public ops::Ops {
 public:
  explicit CudaOps(const std::shared_ptr<const FastLibrary>& fast) {
    if (fast != nullptr) fast_.emplace(fast, *this, stream());
  }

  void* allocate(int64_t bytes, Pages pages) override {
    return pages == Pages::kHost ? allocate_pinned(bytes) : cuda::allocate(bytes, stream());
  }
  void release(void* memory, int64_t, Pages pages) noexcept override {
    pages == Pages::kHost ? release_pinned(memory) : cuda::release(memory, stream());
  }
  void clear(void* memory, int64_t bytes) override { cuda::clear(memory, bytes, stream()); }
  void* stage(ops::HostBuffer& buffer, void*, int64_t bytes) override {
    return buffer.reserve(bytes);
  }
  void upload(void* memory, const void* staged, int64_t bytes) override {
    copy_to_device(memory, staged, bytes, stream());
  }
  const void* download(ops::HostBuffer& buffer, const void* memory, int64_t bytes) override {
    void* host = buffer.reserve(bytes);
    copy_to_host(host, memory, bytes, stream());
    return host;
  }
  void wait() override { synchronize(stream()); }
  bool is_done() const override { return cuda::is_done(stream()); }

  std::unique_ptr<ops::Plan> make_plan(std::vector<ops::AttentionKind> kinds) override {
    return std::make_unique<CudaPlan>(std::move(kinds), *this, stream());
  }
  std::unique_ptr<ops::Sampler> make_sampler() override {
    return std::make_unique<CudaSampler>(*this, stream());
  }

  void embedding(const ops::Plan& plan, const ops::Weight& table, float scale,
                 const Matrix& out) override {
    cuda::embedding(matrix(table), of(plan).tables.tokens, scale, out, stream());
  }
  void soft_rows(const ops::Plan& plan, const ops::SoftRows& soft, ops::RowRange at,
                 const Matrix& out) override {
    cuda::soft_rows(soft.matrix, of(plan).tables.tokens + at.begin, rows_of(out, at.begin, at.end),
                    stream());
  }
  void soft_rows_backward(const ops::Plan& plan, const Matrix& d_out,
                          const Matrix& d_soft) override {
    embedding_backward(d_out, of(plan).tables.soft_begins, of(plan).tables.soft_places, d_soft,
                       stream());
  }
  // The stream is a table too, its rows chosen as an embedding's are.
  void output_rows(const ops::Plan& plan, const Matrix& x, const Matrix& out) override {
    cuda::embedding(x, of(plan).tables.output_rows, 1.0f, out, stream());
  }
  void output_rows_backward(const ops::Plan& plan, const Matrix& d_out,
                            const Matrix& d_x) override {
    embedding_backward(d_out, of(plan).tables.output_begins, of(plan).tables.row_outputs, d_x,
                       stream());
  }

  void mix_rows(const ops::Plan& plan, const Matrix& x, const Matrix& out) override {
    const CudaPlan::Tables& tables = of(plan).tables;
    cuda::mix_rows(x, tables.sum_begins, tables.sum_rows, tables.sum_weights, out, stream());
  }

  void rms_norm(const Matrix& x, const void* weight, float eps, const Matrix& y) override {
    cuda::rms_norm(x, weight, eps, y, stream());
  }
  void rms_norm_add(const Matrix& x, const void* weight, float eps, const Matrix& residual,
                    const Matrix& y) override {
    cuda::rms_norm_add(x, weight, eps, residual, y, stream());
  }
  void rms_norm_backward(const Matrix& x, const void* weight, float eps, const Matrix& dy,
                         const Matrix& dx) override {
    cuda::rms_norm_backward(x, weight, eps, dy, dx, stream());
  }
  void swiglu(const Matrix& gate_up, const Matrix& h) override {
    cuda::swiglu(gate_up, h, stream());
  }
  void swiglu_backward(const Matrix& gate_up, const Matrix& dh, const Matrix& d_gate_up) override {
    cuda::swiglu_backward(gate_up, dh, d_gate_up, stream());
  }
  void geglu(const Matrix& gate_up, const Matrix& h) override { cuda::geglu(gate_up, h, stream()); }
  void geglu_backward(const Matrix& gate_up, const Matrix& dh, const Matrix& d_gate_up) override {
    cuda::geglu_backward(gate_up, dh, d_gate_up, stream());
  }

  void linear(const Matrix& x, const ops::Weight& weight, const ops::LinearExtras& extras,
              const Matrix& out) override {
    int64_t row = 0;
    for (const ops::LoraRows& rows : extras.lora) {
      linear_rows(row, rows.begin, x, matrix(weight), extras, nullptr, out);
      linear_rows(rows.begin, rows.end, x, matrix(weight), extras, &rows, out);
      row = rows.end;
    }
    linear_rows(row, x.rows, x, matrix(weight), extras, nullptr, out);
  }
  void linear_backward(const Matrix& dy, const ops::Weight& weight, const ops::LoraWeight* lora,
                       const Matrix& d_lora_down, const Matrix& dx) override {
    LinearBackwardExtras extras{};
    if (lora != nullptr) {
      extras = {{}, of(*lora).a, of(*lora).b, d_lora_down, of(*lora).scale};
    }
    cuda::linear_backward(dy, matrix(weight), extras, dx, stream());
  }
  void lora_backward(const ops::LoraWeight& lora, const Matrix& x, const Matrix& lora_down,
                     const Matrix& dy, const Matrix& d_lora_down, const Matrix& d_a,
                     const Matrix& d_b, void* workspace) override {
    cuda::lora_backward({x, lora_down, dy, d_lora_down, of(lora).scale}, d_a, d_b, workspace,
                        stream());
  }
  int64_t lora_backward_bytes(int64_t rows, int64_t inputs, int64_t outputs,
                              int64_t ranks) const override {
    return cuda::lora_backward_bytes(rows, inputs, outputs, ranks);
  }

  void qk_norm(const AttentionShape& shape, const Matrix& qkv, const void* q_weight,
               const void* k_weight, float eps, const Matrix& raw) override {
    if (raw.data != nullptr) {
      const int64_t width = block_bytes(qkv.dtype);
      copy_pieces(raw.data, raw.ld * width, qkv.data, qkv.ld * width, raw.cols * width, qkv.rows,
                  stream());
    }
    cuda::qk_norm(shape, qkv, q_weight, k_weight, eps, stream());
  }
  void qk_norm_backward(const AttentionShape& shape, const Matrix& raw, const void* q_weight,
                        const void* k_weight, float eps, const Matrix& d_qkv) override {
    cuda::qk_norm_backward(shape, raw, q_weight, k_weight, eps, d_qkv, stream());
  }
  void rope_kv_write(const ops::Plan& plan, size_t kind, const Matrix& qkv,
                     const KvView& kv) override {
    const CudaPlan& p = of(plan);
    static const CudaRope kNone;
    const auto* own = static_cast<const CudaRope*>(p.kinds()[kind].rope);
    const CudaRope& rope = own == nullptr ? kNone : *own;
    cuda::rope_kv_write(p.shape(kind), qkv, rope.rotary_dim, rope.cos, rope.sin, p.tables.positions,
                        p.tables.write_blocks, paged(kv), stream());
    if (p.copies() == 0) return;
    kv_copy(p.shape(kind), kv.dtype, p.tables.copies, p.copies(), paged(kv), stream());
  }
  void rope_backward(const ops::Plan& plan, size_t kind, const Matrix& d_qkv) override {
    const CudaPlan& p = of(plan);
    const auto* rope = static_cast<const CudaRope*>(p.kinds()[kind].rope);
    if (rope == nullptr) return;
    cuda::rope_backward(p.shape(kind), d_qkv, rope->rotary_dim, rope->cos, rope->sin,
                        p.tables.positions, stream());
  }
  void attention(const ops::Plan& plan, size_t kind, const Matrix& qkv, const KvView& kv,
                 void* workspace, const Matrix& out, float* saved) override {
    const CudaPlan& p = of(plan);
    for (const CudaPlan::DecodeRun& run : p.decode) {
      const int64_t end = run.begin + run.rows;
      attention_decode(p.shape(kind), rows_of(qkv, run.begin, end), p.tables.positions + run.begin,
                       p.tables.block_table + run.table_row * p.table_ld, p.table_ld,
                       p.table_ld * kKvBlock, paged(kv), workspace, rows_of(out, run.begin, end),
                       stream());
    }
    if (p.segments() == 0) return;
    attention_prefill(p.shape(kind), qkv, p.tables.segments, p.segments(), p.most_segment_rows,
                      p.tables.block_table + p.first_segment_row * p.table_ld, p.table_ld,
                      paged(kv), out, saved, stream());
  }
  void attention_backward(const ops::Plan& plan, size_t kind, const Matrix& qkv, const KvView& kv,
                          const float* saved, const Matrix& out, const Matrix& d_out,
                          void* workspace, const Matrix& d_qkv) override {
    const CudaPlan& p = of(plan);
    const AttentionBackwardInput in{.qkv = qkv,
                                    .out = out,
                                    .dout = d_out,
                                    .lse = saved,
                                    .segments = p.tables.segments,
                                    .segment_count = p.segments(),
                                    .max_rows = p.most_segment_rows,
                                    .child_begin = p.tables.child_begins,
                                    .children = p.tables.children,
                                    .block_table = p.tables.block_table,
                                    .table_ld = p.table_ld,
                                    .kv = paged(kv)};
    cuda::attention_backward(p.shape(kind), in, d_qkv, workspace, stream());
  }
  int64_t attention_bytes(const ops::Plan& plan) const override {
    const CudaPlan& p = of(plan);
    if (p.decode.empty()) return 0;
    return attention_decode_bytes(p.shape(0), p.most_decode_rows, p.table_ld * kKvBlock);
  }
  int64_t attention_backward_bytes(const ops::Plan& plan) const override {
    return cuda::attention_backward_bytes(plan.shape(0), plan.rows());
  }
  bool attention_backward_reads_kv() const override { return true; }
  void kv_copy_slots(const KvView& kv, int64_t heads, int64_t head_dim, int64_t from, int64_t to,
                     int64_t slots) override {
    // K and V lie in pieces of one size, positions first.
    copy_pieces(kv.keys<char>(to, 0), kv.value_offset, kv.keys<char>(from, 0), kv.value_offset,
                slots * head_dim * block_bytes(kv.dtype), 2 * heads, stream());
  }

  void linear_logprob(const ops::Plan& plan, const ops::LogprobRequest& in,
                      const LogprobOutput& out, void*, void* workspace) override {
    cuda::linear_logprob(input_of(&plan, in), out, workspace, stream());
  }
  void linear_logprob_backward(const ops::Plan& plan, const ops::LogprobRequest& in,
                               const LogprobOutput& forward, const ops::LogprobUpstream& upstream,
                               const void*, const Matrix& d_hidden, void* workspace) override {
    cuda::linear_logprob_backward(input_of(&plan, in), forward, upstream, d_hidden, {}, workspace,
                                  stream());
  }
  int64_t linear_logprob_bytes(const ops::LogprobRequest& in) const override {
    return cuda::linear_logprob_bytes(input_of(nullptr, in));
  }
  int64_t linear_logprob_backward_bytes(const ops::LogprobRequest& in) const override {
    return cuda::linear_logprob_backward_bytes(input_of(nullptr, in));
  }
  int64_t logprob_jacobian_bytes(int64_t, int64_t, bool) const override { return 0; }
  int64_t score_overhead_bytes(const ops::ScoreShape&, const ops::Weight&) const override {
    return 0;
  }

 private:
  Stream stream() const { return stream_.get(); }

  // Rows [begin, end) of linear, under one adapter or none; deterministic, in one pass.
  void linear_rows(int64_t begin, int64_t end, const Matrix& x, const Matrix& weight,
                   const ops::LinearExtras& extras, const ops::LoraRows* lora, const Matrix& out) {
    if (begin == end) return;
    const Matrix from = rows_of(x, begin, end), to = rows_of(out, begin, end);
    LinearExtras joined{.bias = extras.bias, .residual = rows_of(extras.residual, begin, end)};
    if (lora != nullptr) {
      joined.lora_x = lora->lora_down;
      joined.lora_up = of(*lora->lora).b;
      joined.lora_scale = of(*lora->lora).scale;
    }
    if (fast_) {
      fast_->multiply(from, weight, 1.0f, joined.bias, joined.residual, to);
      if (lora == nullptr) return;
      fast_->multiply(from, of(*lora->lora).a, 1.0f, nullptr, {}, joined.lora_x);
      fast_->multiply(joined.lora_x, joined.lora_up, joined.lora_scale, nullptr, to, to);
      return;
    }
    if (lora != nullptr) cuda::linear(from, of(*lora->lora).a, {}, joined.lora_x, stream());
    cuda::linear(from, weight, joined, to, stream());
  }
  static LogprobInput input_of(const ops::Plan* plan, const ops::LogprobRequest& in) {
    LogprobInput input;
    input.hidden = in.hidden;
    input.weight = matrix(*in.head);
    input.tokens = plan == nullptr ? nullptr : of(*plan).tables.targets;
    input.temperature = in.temperature;
    if (in.reference_hidden.rows > 0) {
      input.ref_hidden = in.reference_hidden;
      input.ref_weight = input.weight;
    }
    return input;
  }

  OwnedStream stream_;
  std::optional<FastLinear> fast_;
};

class CudaDevice final : public ops::Device {
 public:
  CudaDevice(DType compute, bool deterministic, int threads,
             const std::vector<std::string>& library_folders)
      : dtype_(checked(compute)),
        device_(current_device()),
        fast_(deterministic ? nullptr : open_fast_library(library_folders)),
        pool_(std::make_unique<ThreadPool>(threads)),
        store_(compute, pool_.get(), std::make_unique<CudaOps>(nullptr)) {}

  std::string name() const override { return "cuda"; }
  std::string compute() const override { return dtype_ == DType::kBF16 ? "bfloat16" : "float32"; }
  DType dtype() const override { return dtype_; }
  DType kv_dtype() const override { return dtype_; }
  int threads() const override { return 0; }
  bool deterministic() const override { return fast_ == nullptr; }
  void require_runs(const ops::ModelShape& shape) const override;
  void require_gradients() const override {}
  int64_t kv_share_bytes() const override { return free_memory() / 2; }
  // A step of few rows reads the weights; the host does not see how long that takes.
  ops::RowCost row_cost() const override { return {0.05, false}; }

  std::unique_ptr<const ops::Weight> upload(const char* name,
                                            std::span<const ops::QuantizedRow> rows, int64_t cols,
                                            Use) override {
    auto weight = std::make_unique<CudaWeight>();
    weight->matrix =
        store_.add(static_cast<int64_t>(rows.size()), cols, [&](int64_t row, std::byte* out) {
          const ops::QuantizedRow& from = rows[static_cast<size_t>(row)];
          if (from.dtype == dtype_) {
            std::memcpy(out, from.data, static_cast<size_t>(row_bytes(dtype_, cols)));
            return;
          }
          thread_local std::vector<float> values;
          values.resize(static_cast<size_t>(cols));
          dequantize(from.dtype, from.data, cols, values.data());
          round_values(dtype_, values.data(), cols, out);
        });
    weight->name = name;
    weight->rows = weight->matrix.rows;
    weight->cols = cols;
    weight->bytes = weight->rows * row_bytes(dtype_, cols);
    return weight;
  }
  const void* upload(std::span<const float> values) override { return store_.add(values); }
  std::unique_ptr<const ops::Rope> make_rope(
      int64_t positions, int64_t half,
      const std::function<void(std::span<const int32_t>, float*, float*)>& angles) override {
    std::vector<int32_t> all(static_cast<size_t>(positions));
    std::iota(all.begin(), all.end(), 0);
    std::vector<float> cos(static_cast<size_t>(positions * half)), sin(cos.size());
    angles(all, cos.data(), sin.data());
    auto rope = std::make_unique<CudaRope>();
    rope->rotary_dim = 2 * half;
    rope->cos = store_.add_float32(cos);
    rope->sin = store_.add_float32(sin);
    return rope;
  }
  void finish_uploads() override {
    store_.finish();
    pool_.reset();
  }
  std::vector<std::unique_ptr<const ops::LoraWeight>> upload(
      std::span<const ops::LoraStack* const> sites) const override;
  std::unique_ptr<const ops::SoftRows> upload(std::span<const float> rows,
                                              int64_t cols) const override {
    return std::make_unique<CudaSoftRows>(dtype_, make_ops(), rows, cols);
  }

  std::unique_ptr<ops::Ops> make_ops() const override { return std::make_unique<CudaOps>(fast_); }

 protected:
  int enter() const override {
    const int before = current_device();
    if (before != device_) use_device(device_);
    return before;
  }
  void leave(int before) const override {
    if (before != device_) use_device(before);
  }

 private:
  static DType checked(DType compute) {
    if (const std::string reason = unavailable_reason(); !reason.empty()) {
      throw Unavailable(cat("device cuda: ", reason));
    }
    require(compute == DType::kF32 || compute == DType::kBF16,
            "compute: expected bfloat16 or float32 on device cuda, got ", dtype_name(compute));
    return compute;
  }

  const DType dtype_;
  const int device_;
  const std::shared_ptr<const FastLibrary> fast_;  // null: deterministic
  std::unique_ptr<ThreadPool> pool_;               // converts rows
  MatrixStore store_;
};

void CudaDevice::require_runs(const ops::ModelShape& shape) const {
  const int64_t pack = pack_size(dtype_);
  const auto whole = [&](const char* name, int64_t size) {
    require(size % pack == 0, "device cuda: ", name, ": expected a multiple of ", pack, " in ",
            dtype_name(dtype_), ", the model has ", size, "; use device cpu");
  };
  const auto at_most = [](const char* name, int64_t size, int64_t most) {
    require(size <= most, "device cuda: ", name, ": expected at most ", most, ", the model has ",
            size, "; use device cpu");
  };
  whole("hidden_size", shape.hidden_size);
  whole("intermediate_size", shape.intermediate_size);
  whole("head_dim", shape.head_dim);
  at_most("head_dim", shape.head_dim, kMaxHeadDim);
  at_most("vocab_size", shape.vocab_size, kMaxVocabulary);
  const int64_t wanted = shape.weights * block_bytes(dtype_), free = free_memory();
  require<Unavailable>(wanted <= free, "device cuda: the weights need ", wanted >> 20, " MB in ",
                       dtype_name(dtype_), ", ", free >> 20, " MB of ", device_name(),
                       " are free; free some, or use device cpu");
}

// Ranks are padded with zeros to whole 16 bytes, which changes no bit.
std::vector<std::unique_ptr<const ops::LoraWeight>> CudaDevice::upload(
    std::span<const ops::LoraStack* const> sites) const {
  const auto store = std::make_shared<MatrixStore>(dtype_, nullptr, make_ops());
  const int64_t pack = pack_size(dtype_);
  std::vector<std::unique_ptr<const ops::LoraWeight>> made;
  for (const ops::LoraStack* site : sites) {
    const int64_t ranks = (site->ranks + pack - 1) / pack * pack;
    std::vector<float> padded;
    // Rows of so many values with zeros up to `rows` x `cols`.
    const auto add = [&](const std::vector<float>& from, int64_t width, int64_t rows,
                         int64_t cols) {
      return store->add(rows, cols, [&](int64_t row, std::byte* out) {
        padded.assign(static_cast<size_t>(cols), 0.0f);
        if (row * width < static_cast<int64_t>(from.size())) {
          std::copy_n(from.data() + row * width, width, padded.begin());
        }
        round_values(dtype_, padded.data(), cols, out);
      });
    };
    auto lora = std::make_unique<CudaLora>();
    lora->a = add(site->a, site->inputs, ranks, site->inputs);
    lora->b = add(site->b, site->ranks, site->outputs, ranks);
    lora->scale = site->scale;
    lora->ranks = ranks;
    lora->store = store;
    made.push_back(std::move(lora));
  }
  store->finish();
  return made;
}

}  // namespace

std::unique_ptr<ops::Device> make_device(DType compute, bool deterministic, int threads,
                                         const std::vector<std::string>& library_folders) {
  return std::make_unique<CudaDevice>(compute, deterministic, threads, library_folders);
}

}  // namespace alignpro::cuda
