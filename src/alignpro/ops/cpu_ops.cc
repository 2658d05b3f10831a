// The ops on a thread pool, in float32: each call is done when it returns, and leaves a span in the
// trace. Weights are packed, attention is planned once a batch. Long because all of Ops is here,
// most of it a call of the op.

#include "alignpro/ops/cpu_ops.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>

#include "alignpro/core/aligned.h"
#include "alignpro/core/cgroup.h"
#include "alignpro/core/error.h"
#include "alignpro/core/trace.h"
#include "alignpro/ops/embedding.h"
#include "alignpro/ops/linear.h"
#include "alignpro/ops/mix_rows.h"
#include "alignpro/ops/op_counts.h"
#include "alignpro/ops/packed_rows.h"
#include "alignpro/ops/rms_norm.h"
#include "alignpro/ops/rope.h"
#include "alignpro/ops/swiglu.h"

namespace alignpro::ops {
namespace {

// The attention kernel reads whole vectors, also past a block's last lanes.
constexpr int64_t kSlack = 64;

struct CpuWeight final : Weight {
  CpuWeight(const char* of, PackedMatrix packed) : matrix(std::move(packed)) {
    name = of;
    rows = matrix.rows();
    cols = matrix.cols();
    bytes = matrix.bytes();
  }

  PackedMatrix matrix;
};
struct CpuLora final : LoraWeight {
  LowRank update;
};
struct CpuSoftRows final : SoftRows {
  CpuSoftRows(std::span<const float> rows, int64_t cols) : values(rows.begin(), rows.end()) {
    matrix = {values.data(), std::ssize(values) / cols, cols, cols, DType::kF32};
  }

  std::vector<float> values;
};
struct CpuRope final : Rope {
  std::function<void(std::span<const int32_t>, float*, float*)> angles;
};

const PackedMatrix& packed(const Weight& weight) {
  return static_cast<const CpuWeight&>(weight).matrix;
}
const LowRank& packed(const LoraWeight& lora) { return static_cast<const CpuLora&>(lora).update; }

float* floats(const Matrix& m) { return static_cast<float*>(m.data); }
const float* floats(const void* vector) { return static_cast<const float*>(vector); }

class CpuPlan final : public Plan {
 public:
  CpuPlan(std::vector<AttentionKind> of, int threads)
      : Plan(std::move(of)), layers(kinds().size()), threads_(threads) {}

  void prepare(const PlanRequest& asked) override {
    request = asked;
    rows_ = static_cast<int64_t>(asked.tokens.size());
    outputs_ = static_cast<int64_t>(asked.output_rows.size());
    adapter_rows_.assign(asked.adapter_rows.begin(), asked.adapter_rows.end());
  }
  int64_t bytes() const override {
    int64_t floats = 0;
    for (const AttentionKind& kind : kinds()) floats += 3 * rows_ * half(kind);
    return floats * static_cast<int64_t>(sizeof(float));
  }
  void place(void* memory) override {
    auto* next = static_cast<float*>(memory);
    plans_.clear();
    for (size_t i = 0; i < kinds().size(); ++i) {
      Layers& of = layers[i];
      const int64_t angles = rows_ * half(kinds()[i]);
      of.cos = next;
      of.sin = of.cos + angles;
      of.minus_sin = of.sin + angles;
      next = of.minus_sin + angles;
      if (kinds()[i].rope != nullptr) {
        static_cast<const CpuRope*>(kinds()[i].rope)->angles(request.positions, of.cos, of.sin);
        std::transform(of.sin, of.minus_sin, of.minus_sin, [](float s) { return -s; });
      }
      size_t like = 0;  // the first of its window
      while (shape(like).sliding_window != shape(i).sliding_window) ++like;
      of.attention = like < i ? layers[like].attention
                              : &plans_.emplace_back(shape(i), request.segments, threads_);
    }
  }
  void run(std::span<void* const>, uint64_t, std::shared_ptr<const void>,
           const std::function<void()>& launch) override {
    launch();
  }
  static int64_t half(const AttentionKind& kind) {
    return kind.rope == nullptr ? 0 : kind.rope->rotary_dim / 2;
  }

  struct Layers {
    float *cos = nullptr, *sin = nullptr, *minus_sin = nullptr;  // [rows, half]
    const AttentionPlan* attention = nullptr;
  };

  PlanRequest request;
  std::vector<Layers> layers;  // by kind

 private:
  const int threads_;
  std::deque<AttentionPlan> plans_;
};

const CpuPlan& of(const Plan& plan) { return static_cast<const CpuPlan&>(plan); }

class CpuSampler final : public Sampler {
 public:
  explicit CpuSampler(ThreadPool& pool) : pool_(pool) {}

  void draw(const Matrix& hidden, const Weight& head, std::span<const SampleRow> rows) override {
    const trace::Span op(trace::Level::kOps, "head_sample", [&] {
      return head_sample_counts(static_cast<int64_t>(rows.size()), packed(head));
    });
    drawn_.assign(rows.size(), {});
    head_sample(packed(head), floats(hidden), rows, drawn_, pool_);
  }
  void collect(std::span<SampledToken> out) override {
    require(out.size() == drawn_.size(), "collect: expected ", drawn_.size(),
            " rows, those of the last draw, got ", out.size());
    std::copy(drawn_.begin(), drawn_.end(), out.begin());
  }

 private:
  ThreadPool& pool_;
  std::vector<SampledToken> drawn_;
};

class CpuOps final : public Ops {
 public:
  explicit CpuOps(ThreadPool& pool) : pool_(pool) { spare_.reserve(kSpare + 1); }

  // Large memory that is released is kept for the next of its size: fresh pages cost about a
  // fifteenth of a training step.
  void* allocate(int64_t bytes, Pages pages) override {
    if (pages == Pages::kOnTouch) {
      void* mapped = mmap(nullptr, static_cast<size_t>(bytes + kSlack), PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (mapped == MAP_FAILED) throw Unavailable(cat("memory: cannot reserve ", bytes, " bytes"));
      return mapped;
    }
    const int64_t count = (bytes + kSlack + 3) / 4;
    const auto by_size = [](const AlignedBuffer& a, const AlignedBuffer& b) {
      return a.capacity() < b.capacity();
    };
    std::sort(spare_.begin(), spare_.end(), by_size);
    auto fitting = std::find_if(spare_.begin(), spare_.end(), [&](const AlignedBuffer& spare) {
      return spare.capacity() >= count;
    });
    AlignedBuffer memory;
    if (fitting != spare_.end()) {
      memory = std::move(*fitting);
      spare_.erase(fitting);
    } else {
      if (!spare_.empty()) spare_.pop_back();  // what this one takes the place of
      memory.reserve(count);
    }
    void* data = memory.data();
    live_.emplace(data, std::move(memory));
    return data;
  }
  void release(void* memory, int64_t bytes, Pages pages) noexcept override {
    if (pages == Pages::kOnTouch) {
      munmap(memory, static_cast<size_t>(bytes + kSlack));
      return;
    }
    const auto found = live_.find(memory);
    spare_.push_back(std::move(found->second));
    live_.erase(found);
    if (spare_.size() > kSpare) {
      spare_.erase(std::min_element(spare_.begin(), spare_.end(), [](const auto& a, const auto& b) {
        return a.capacity() < b.capacity();
      }));
    }
  }
  void clear(void* memory, int64_t bytes) override {
    std::memset(memory, 0, static_cast<size_t>(bytes));
  }
  void* stage(HostBuffer&, void* memory, int64_t) override { return memory; }
  void upload(void*, const void*, int64_t) override {}
  const void* download(HostBuffer&, const void* memory, int64_t) override { return memory; }
  void wait() override {}
  bool is_done() const override { return true; }

  std::unique_ptr<Plan> make_plan(std::vector<AttentionKind> kinds) override {
    return std::make_unique<CpuPlan>(std::move(kinds), pool_.size());
  }
  std::unique_ptr<Sampler> make_sampler() override { return std::make_unique<CpuSampler>(pool_); }

  void embedding(const Plan& plan, const Weight& table, float scale, const Matrix& out) override {
    const trace::Span op(trace::Level::kOps, "embedding",
                         [&] { return embedding_counts(plan.rows(), packed(table)); });
    ops::embedding(packed(table), of(plan).request.tokens, scale, floats(out), pool_);
  }
  void soft_rows(const Plan& plan, const SoftRows& soft, RowRange at, const Matrix& out) override {
    const auto tokens = of(plan).request.tokens.subspan(static_cast<size_t>(at.begin),
                                                        static_cast<size_t>(at.end - at.begin));
    ops::soft_rows(floats(soft.matrix), out.cols, tokens, floats(out) + at.begin * out.ld);
  }
  void soft_rows_backward(const Plan& plan, const Matrix& d_out, const Matrix& d_soft) override {
    ops::soft_rows_backward(of(plan).request.tokens, d_out.cols, floats(d_out), d_soft.rows,
                            floats(d_soft));
  }
  void output_rows(const Plan& plan, const Matrix& x, const Matrix& out) override {
    for (int64_t i = 0; i < out.rows; ++i) {
      const int64_t row = of(plan).request.output_rows[static_cast<size_t>(i)];
      std::copy_n(floats(x) + row * x.ld, x.cols, floats(out) + i * out.ld);
    }
  }
  void output_rows_backward(const Plan& plan, const Matrix& d_out, const Matrix& d_x) override {
    std::fill_n(floats(d_x), d_x.rows * d_x.ld, 0.0f);
    for (int64_t i = 0; i < d_out.rows; ++i) {
      const int64_t row = of(plan).request.output_rows[static_cast<size_t>(i)];
      float* to = floats(d_x) + row * d_x.ld;
      const float* from = floats(d_out) + i * d_out.ld;
      for (int64_t c = 0; c < d_out.cols; ++c) to[c] += from[c];
    }
  }

  void mix_rows(const Plan& plan, const Matrix& x, const Matrix& out) override {
    const RowSums& sums = of(plan).request.sums;
    const auto terms = static_cast<int64_t>(sums.rows.size());
    const trace::Span op(trace::Level::kOps, "mix_rows",
                         [&] { return mix_rows_counts(out.rows, terms, out.cols); });
    ops::mix_rows(sums, out.cols, floats(x), x.ld, floats(out), out.ld);
  }

  void rms_norm(const Matrix& x, const void* weight, float eps, const Matrix& y) override {
    const trace::Span op(trace::Level::kOps, "rms_norm",
                         [&] { return rms_norm_counts(x.rows, x.cols); });
    ops::rms_norm(x.rows, x.cols, floats(x), x.ld, floats(weight), eps, floats(y), y.ld, pool_);
  }
  void rms_norm_add(const Matrix& x, const void* weight, float eps, const Matrix& residual,
                    const Matrix& y) override {
    const trace::Span op(trace::Level::kOps, "rms_norm_add",
                         [&] { return rms_norm_counts(x.rows, x.cols); });
    ops::rms_norm_add(x.rows, x.cols, floats(x), x.ld, floats(weight), eps, floats(residual),
                      residual.ld, floats(y), y.ld, pool_);
  }
  void rms_norm_backward(const Matrix& x, const void* weight, float eps, const Matrix& dy,
                         const Matrix& dx) override {
    ops::rms_norm_backward(x.rows, x.cols, floats(x), x.ld, floats(weight), eps, floats(dy), dy.ld,
                           floats(dx), dx.ld, pool_);
  }
  void swiglu(const Matrix& gate_up, const Matrix& h) override {
    const trace::Span op(trace::Level::kOps, "swiglu",
                         [&] { return swiglu_counts(h.rows, h.cols); });
    ops::swiglu(h.rows, h.cols, floats(gate_up), floats(h), pool_);
  }
  void swiglu_backward(const Matrix& gate_up, const Matrix& dh, const Matrix& d_gate_up) override {
    ops::swiglu_backward(dh.rows, dh.cols, floats(gate_up), floats(dh), floats(d_gate_up), pool_);
  }
  void geglu(const Matrix& gate_up, const Matrix& h) override {
    const trace::Span op(trace::Level::kOps, "geglu", [&] { return geglu_counts(h.rows, h.cols); });
    ops::geglu(h.rows, h.cols, floats(gate_up), floats(h), pool_);
  }
  void geglu_backward(const Matrix& gate_up, const Matrix& dh, const Matrix& d_gate_up) override {
    ops::geglu_backward(dh.rows, dh.cols, floats(gate_up), floats(dh), floats(d_gate_up), pool_);
  }

  void linear(const Matrix& x, const Weight& weight, const LinearExtras& extras,
              const Matrix& out) override {
    std::vector<LowRankRows> updates;
    for (const LoraRows& rows : extras.lora) {
      updates.push_back({rows.begin, rows.end, &packed(*rows.lora), floats(rows.lora_down)});
    }
    const Epilogue epilogue{.bias = floats(extras.bias), .residual = floats(extras.residual)};
    const trace::Span op(trace::Level::kOps, weight.name,
                         [&] { return linear_counts(x.rows, packed(weight), epilogue, updates); });
    ops::linear(x.rows, {floats(x), x.ld}, packed(weight), floats(out), out.ld, epilogue, pool_,
                updates);
  }
  void linear_backward(const Matrix& dy, const Weight& weight, const LoraWeight* lora,
                       const Matrix& d_lora_down, const Matrix& dx) override {
    ops::linear_backward(dy.rows, {floats(dy), dy.ld}, packed(weight), floats(dx), weight.cols, {},
                         pool_, lora == nullptr ? nullptr : &packed(*lora), floats(d_lora_down));
  }
  void lora_backward(const LoraWeight& lora, const Matrix& x, const Matrix& lora_down,
                     const Matrix& dy, const Matrix& d_lora_down, const Matrix& d_a,
                     const Matrix& d_b, void* workspace) override {
    const int64_t rows = x.rows, ranks = lora.ranks;
    matmul(ranks, x.cols, rows, {floats(d_lora_down), 1, ranks}, floats(x), x.ld, floats(d_a),
           d_a.ld, {}, pool_);
    auto* turned = static_cast<float*>(workspace);  // a module's [rank, outputs]
    for (const LoraStack::Module& m : packed(lora).modules) {
      matmul(m.rank, m.outputs, rows, {floats(lora_down) + m.rank_begin, 1, ranks},
             floats(dy) + m.out_begin, dy.ld, turned, m.outputs, {}, pool_);
      float* to = floats(d_b) + m.out_begin * d_b.ld + m.rank_begin;
      for (int64_t n = 0; n < m.outputs; ++n) {
        for (int64_t r = 0; r < m.rank; ++r) to[n * d_b.ld + r] = turned[r * m.outputs + n];
      }
    }
  }
  int64_t lora_backward_bytes(int64_t, int64_t, int64_t outputs, int64_t ranks) const override {
    return ranks * outputs * static_cast<int64_t>(sizeof(float));
  }

  void qk_norm(const AttentionShape& shape, const Matrix& qkv, const void* q_weight,
               const void* k_weight, float eps, const Matrix& raw) override {
    const int64_t d = shape.head_dim, width = shape.qk_size();
    const trace::Span op(trace::Level::kOps, "qk_norm",
                         [&] { return rms_norm_counts(qkv.rows, width); });
    for (int64_t row = 0; row < qkv.rows; ++row) {
      float* q = floats(qkv) + row * qkv.ld;
      float* k = q + shape.q_size();
      if (raw.data != nullptr) std::copy_n(q, width, floats(raw) + row * raw.ld);
      ops::rms_norm(shape.num_heads, d, q, d, floats(q_weight), eps, q, d, pool_);
      ops::rms_norm(shape.num_kv_heads, d, k, d, floats(k_weight), eps, k, d, pool_);
    }
  }
  void qk_norm_backward(const AttentionShape& shape, const Matrix& raw, const void* q_weight,
                        const void* k_weight, float eps, const Matrix& d_qkv) override {
    const int64_t d = shape.head_dim, width = shape.qk_size();
    std::vector<float> dy(static_cast<size_t>(width));
    for (int64_t row = 0; row < d_qkv.rows; ++row) {
      const float* x = floats(raw) + row * raw.ld;
      float* dx = floats(d_qkv) + row * d_qkv.ld;
      std::copy_n(dx, width, dy.begin());
      std::fill_n(dx, width, 0.0f);
      const auto heads = [&](int64_t from, int64_t count, const void* weight) {
        ops::rms_norm_backward(count, d, x + from, d, floats(weight), eps, dy.data() + from, d,
                               dx + from, d, pool_);
      };
      heads(0, shape.num_heads, q_weight);
      heads(shape.q_size(), shape.num_kv_heads, k_weight);
    }
  }
  void rope_kv_write(const Plan& plan, size_t kind, const Matrix& qkv, const KvView& kv) override {
    const CpuPlan& p = of(plan);
    const AttentionShape& shape = plan.shape(kind);
    if (p.kinds()[kind].rope != nullptr) {
      const int64_t heads = shape.num_heads + shape.num_kv_heads;
      const int64_t rotary_dim = p.kinds()[kind].rope->rotary_dim;
      const trace::Span op(trace::Level::kOps, "rope",
                           [&] { return rope_counts(qkv.rows, heads, rotary_dim); });
      rope(qkv.rows, floats(qkv), qkv.ld, heads, shape.head_dim, rotary_dim, p.layers[kind].cos,
           p.layers[kind].sin, pool_);
    }
    const trace::Span op(trace::Level::kOps, "kv_write", [&] {
      return kv_write_counts(shape, static_cast<int64_t>(p.request.kv_writes.size()), kv.dtype);
    });
    kv_write(shape, floats(qkv), p.request.kv_writes, kv, pool_);
  }
  void rope_backward(const Plan& plan, size_t kind, const Matrix& d_qkv) override {
    const CpuPlan& p = of(plan);
    if (p.kinds()[kind].rope == nullptr) return;
    const AttentionShape& shape = plan.shape(kind);
    rope(d_qkv.rows, floats(d_qkv), d_qkv.ld, shape.num_heads + shape.num_kv_heads, shape.head_dim,
         p.kinds()[kind].rope->rotary_dim, p.layers[kind].cos, p.layers[kind].minus_sin, pool_);
  }
  void attention(const Plan& plan, size_t kind, const Matrix& qkv, const KvView& kv, void*,
                 const Matrix& out, float*) override {
    const AttentionShape& shape = plan.shape(kind);
    const AttentionPlan& p = *of(plan).layers[kind].attention;
    const trace::Span op(trace::Level::kOps, "attention",
                         [&] { return attention_counts(shape, p, kv.dtype); });
    ops::attention(shape, floats(qkv), p, kv, floats(out), pool_);
  }
  void attention_backward(const Plan& plan, size_t kind, const Matrix& qkv, const KvView&,
                          const float*, const Matrix& out, const Matrix& d_out, void* workspace,
                          const Matrix& d_qkv) override {
    std::fill_n(floats(d_qkv), d_qkv.rows * d_qkv.ld, 0.0f);
    ops::attention_backward(plan.shape(kind), floats(qkv), floats(out), floats(d_out),
                            of(plan).request.segment_rows, floats(d_qkv),
                            static_cast<float*>(workspace), pool_);
  }
  int64_t attention_bytes(const Plan&) const override { return 0; }
  int64_t attention_backward_bytes(const Plan& plan) const override {
    return attention_backward_floats(plan.shape(0), of(plan).request.segment_rows) *
           static_cast<int64_t>(sizeof(float));
  }
  bool attention_backward_reads_kv() const override { return false; }
  void kv_copy_slots(const KvView& kv, int64_t heads, int64_t head_dim, int64_t from, int64_t to,
                     int64_t slots) override {
    const int64_t slot = block_bytes(kv.dtype), lane_bytes = kKvBlock * slot;
    const auto live = static_cast<size_t>(slots * slot);
    for (int64_t head = 0; head < heads; ++head) {
      const auto* source = kv.keys<std::byte>(from, head);
      auto* target = kv.keys<std::byte>(to, head);
      for (int64_t lane = 0; lane < head_dim; ++lane) {  // K is [head_dim][kKvBlock]
        std::memcpy(target + lane * lane_bytes, source + lane * lane_bytes, live);
      }
      std::memcpy(kv.values<std::byte>(to, head), kv.values<std::byte>(from, head),
                  live * static_cast<size_t>(head_dim));
    }
  }

  void linear_logprob(const Plan& plan, const LogprobRequest& in, const LogprobOutput& out,
                      void* jacobian, void*) override {
    const LogprobJacobian to = jacobian_of(in, jacobian);
    ops::linear_logprob(input_of(plan, in, true), out, jacobian == nullptr ? nullptr : &to, pool_);
  }
  // The reference enters through the KL alone, whose derivative the forward has left.
  void linear_logprob_backward(const Plan& plan, const LogprobRequest& in,
                               const LogprobOutput& forward, const LogprobUpstream& upstream,
                               const void* jacobian, const Matrix& d_hidden, void*) override {
    const LogprobJacobian left = jacobian_of(in, const_cast<void*>(jacobian));
    const LogprobOutput own{
        .logprob = forward.logprob, .entropy = forward.entropy, .lse = forward.lse};
    ops::linear_logprob_backward(input_of(plan, in, false), own, &left, upstream, floats(d_hidden),
                                 nullptr, pool_);
  }
  int64_t linear_logprob_bytes(const LogprobRequest&) const override { return 0; }
  int64_t linear_logprob_backward_bytes(const LogprobRequest&) const override { return 0; }
  int64_t logprob_jacobian_bytes(int64_t values, int64_t hidden_size,
                                 bool with_reference) const override {
    return (with_reference ? 2 : 1) * values * hidden_size * static_cast<int64_t>(sizeof(float));
  }

  int64_t score_overhead_bytes(const ScoreShape& s, const Weight& head) const override {
    const float some = 0.0f;  // only whether it is null counts
    const int64_t head_bytes =
        ops::linear_logprob_bytes({.rows = s.values,
                                   .hidden = &some,
                                   .weight = &packed(head),
                                   .tokens = {},
                                   .ref_hidden = s.with_reference ? &some : nullptr},
                                  s.keep_graph, pool_.size());
    // Packed rows and a tile a thread; the results, and the hidden states here and in a copy for
    // the caller.
    const int64_t values = kRowChunk * (s.widest + (pool_.size() + 1) * cpu::kPanel) +
                           (s.with_hidden ? 2 * s.values * s.hidden_size : 0);
    return head_bytes + values * static_cast<int64_t>(sizeof(float)) + s.values * 64;
  }

 private:
  static constexpr size_t kSpare = 2;  // what a score keeps, and its scratch

  static LogprobInput input_of(const Plan& plan, const LogprobRequest& in, bool with_reference) {
    return {.rows = in.hidden.rows,
            .hidden = floats(in.hidden),
            .weight = &packed(*in.head),
            .tokens = of(plan).request.targets,
            .temperature = in.temperature,
            .ref_hidden = with_reference ? floats(in.reference_hidden) : nullptr};
  }
  static LogprobJacobian jacobian_of(const LogprobRequest& in, void* memory) {
    auto* first = static_cast<float*>(memory);
    const bool with_kl = memory != nullptr && in.reference_hidden.rows > 0;
    return {first, with_kl ? first + in.hidden.rows * in.hidden.cols : nullptr};
  }

  ThreadPool& pool_;
  std::map<void*, AlignedBuffer> live_;
  std::vector<AlignedBuffer> spare_;
};

class CpuDevice final : public Device {
 public:
  CpuDevice(int threads, Arithmetic arithmetic, DType kv_dtype)
      : pool_(threads), arithmetic_(arithmetic), kv_dtype_(kv_dtype) {
    require(kv_dtype == DType::kF32 || kv_dtype == DType::kF16,
            "kv_dtype: expected F32 or F16, got ", dtype_name(kv_dtype));
  }

  std::string name() const override { return "cpu"; }
  std::string compute() const override {
    return arithmetic_ == Arithmetic::kInt8 ? "int8" : "float32";
  }
  DType dtype() const override { return DType::kF32; }
  DType kv_dtype() const override { return kv_dtype_; }
  int threads() const override { return pool_.size(); }
  bool deterministic() const override { return true; }
  void require_runs(const ModelShape&) const override {}
  void require_gradients() const override {
    require(arithmetic_ == Arithmetic::kFloat32,
            "gradients: expected a model loaded with compute float32, got int8");
    require(kv_dtype_ == DType::kF32,
            "gradients: expected a model loaded with kv_dtype float32, got float16");
  }
  int64_t kv_share_bytes() const override { return cgroup::available_memory() / 4; }
  RowCost row_cost() const override { return {arithmetic_ == Arithmetic::kInt8 ? 0.1 : 0.2, true}; }

  std::unique_ptr<const Weight> upload(const char* name, std::span<const QuantizedRow> rows,
                                       int64_t cols, Use use) override {
    const Arithmetic arithmetic = use == Use::kProduct ? arithmetic_ : Arithmetic::kFloat32;
    return std::make_unique<CpuWeight>(name, PackedMatrix::pack(rows, cols, pool_, arithmetic));
  }
  const void* upload(std::span<const float> values) override {
    return vectors_.emplace_back(values.begin(), values.end()).data();
  }
  std::unique_ptr<const Rope> make_rope(
      int64_t, int64_t half,
      const std::function<void(std::span<const int32_t>, float*, float*)>& angles) override {
    auto rope = std::make_unique<CpuRope>();
    rope->rotary_dim = 2 * half;
    rope->angles = angles;
    return rope;
  }
  std::vector<std::unique_ptr<const LoraWeight>> upload(
      std::span<const LoraStack* const> sites) const override {
    std::vector<std::unique_ptr<const LoraWeight>> made;
    for (const LoraStack* site : sites) {
      auto lora = std::make_unique<CpuLora>();
      lora->update = LowRank::pack(*site);
      lora->ranks = site->ranks;
      made.push_back(std::move(lora));
    }
    return made;
  }
  std::unique_ptr<const SoftRows> upload(std::span<const float> rows, int64_t cols) const override {
    return std::make_unique<CpuSoftRows>(rows, cols);
  }

  std::unique_ptr<Ops> make_ops() const override { return std::make_unique<CpuOps>(pool_); }

 private:
  mutable ThreadPool pool_;
  const Arithmetic arithmetic_;
  const DType kv_dtype_;
  std::deque<std::vector<float>> vectors_;
};

}  // namespace

std::unique_ptr<Device> make_cpu_device(int threads, Arithmetic arithmetic, DType kv_dtype) {
  return std::make_unique<CpuDevice>(threads, arithmetic, kv_dtype);
}

std::unique_ptr<const Weight> planned_weight(PackedMatrix matrix) {
  return std::make_unique<CpuWeight>("", std::move(matrix));
}

}  // namespace alignpro::ops
