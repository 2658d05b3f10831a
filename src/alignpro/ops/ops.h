#pragma once

// What a device does for a model: the seam that src/alignpro/model is written over. A Device holds
// a model's weights and makes Ops, each of which runs the ops, one after the other, on a stream of
// its own. cpu_ops.cc implements them on a thread pool, csrc/cuda/device_ops.cc on a GPU.
//
// Matrices are views of the device's memory; weights, adapters and plans are what each device makes
// of them. Ops may return before they are done: wait() waits. Every result is a function of its own
// row: no sum depends on the number of rows or threads.

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "alignpro/core/dtype.h"
#include "alignpro/ops/attention.h"
#include "alignpro/ops/head_sample.h"
#include "alignpro/ops/kv_view.h"
#include "alignpro/ops/linear_logprob.h"
#include "alignpro/ops/lora_stack.h"
#include "alignpro/ops/matrix.h"
#include "alignpro/ops/mix_rows.h"
#include "alignpro/ops/quantized_matrix.h"

namespace alignpro::ops {

// A matrix [rows, cols] of weights as a device keeps it.
struct Weight {
  virtual ~Weight() = default;

  const char* name = "";  // of its product in a trace
  int64_t rows = 0, cols = 0;
  int64_t bytes = 0;
};

// LoRA modules at one weight (lora_stack.h) as a device keeps them.
struct LoraWeight {
  virtual ~LoraWeight() = default;

  int64_t ranks = 0;  // what a row of x A^T takes there, padding included
};

// Rows of a soft prompt (embedding.h) as a device keeps them, in its dtype.
struct SoftRows {
  virtual ~SoftRows() = default;

  Matrix matrix;  // [m, hidden_size]
};

// The angles of rotary embedding as a device keeps them.
struct Rope {
  virtual ~Rope() = default;

  int64_t rotary_dim = 0;
};

// How layers of one kind attend: kinds of a model differ in their window and their angles.
struct AttentionKind {
  AttentionShape shape;
  const Rope* rope;  // null: q and k stay as they are
};

struct RowRange {
  int64_t begin, end;
};

// LoRA in force for rows [begin, end): lora_down [end - begin, ranks] receives x A^T (times scale,
// where the device has it so).
struct LoraRows {
  int64_t begin, end;
  const LoraWeight* lora;
  Matrix lora_down;
};

// What joins a product before it is stored; no data: nothing.
struct LinearExtras {
  const void* bias = nullptr;  // [outputs], as Device::upload made it
  Matrix residual = {};        // [rows, outputs]; may be the output
  std::span<const LoraRows> lora = {};
};

// A batch, with rows that the model wants of it. Spans are read by Plan::place() and by the ops.
struct PlanRequest {
  std::span<const int32_t> tokens, positions;  // [rows]
  std::span<const Segment> segments;           // cover every row once, in order
  std::span<const KvWrite> kv_writes;
  std::span<const RowRange> adapter_rows = {};  // ascending, apart
  std::span<const int32_t> output_rows = {};    // whose final hidden states are wanted
  RowSums sums = {};                            // of output rows, in their order
  // Of a score: the tokens predicted there, and for attention_backward who sees whose keys.
  std::span<const int32_t> targets = {};
  std::span<const SegmentRows> segment_rows = {};
  int64_t soft_rows = 0;  // for soft_rows_backward: how many there are
};

// A batch as a device's ops read it: angles, who attends to what, where keys and values go.
class Plan {
 public:
  virtual ~Plan() = default;

  // Then bytes() of device memory are its own: place() puts it there.
  virtual void prepare(const PlanRequest& request) = 0;
  virtual int64_t bytes() const = 0;
  virtual void place(void* memory) = 0;

  // Runs what `launch` puts on the stream: as a recorded graph, where the device has them and has
  // seen this step before. `memory` and `adapter` are what the launches know beside the plan.
  virtual void run(std::span<void* const> memory, uint64_t adapter_version,
                   std::shared_ptr<const void> adapter, const std::function<void()>& launch) = 0;

  const std::vector<AttentionKind>& kinds() const { return kinds_; }
  const AttentionShape& shape(size_t kind) const { return kinds_[kind].shape; }
  int64_t rows() const { return rows_; }        // of all matrices; padding included
  int64_t outputs() const { return outputs_; }  // the same of output_rows; theirs come first
  std::span<const RowRange> adapter_rows() const { return adapter_rows_; }  // where they now are

 protected:
  explicit Plan(std::vector<AttentionKind> kinds) : kinds_(std::move(kinds)) {}

  const std::vector<AttentionKind> kinds_;
  int64_t rows_ = 0, outputs_ = 0;
  std::vector<RowRange> adapter_rows_;
};

// Draws tokens, by head_sample.
class Sampler {
 public:
  virtual ~Sampler() = default;

  virtual void draw(const Matrix& hidden, const Weight& head, std::span<const SampleRow> rows) = 0;
  // After Ops::wait(). A row that cannot be drawn has token -1.
  virtual void collect(std::span<SampledToken> out) = 0;
};

struct LogprobRequest {
  Matrix hidden, reference_hidden;  // [values, hidden_size]; no data: no reference
  const Weight* head;
  float temperature;
};

// What a score holds on the host, or what its ops allocate for themselves, at most.
struct ScoreShape {
  int64_t values, hidden_size, widest;  // widest: the most inputs or outputs of a product
  bool with_reference, with_hidden, keep_graph;
};

struct HostBuffer;

class Ops {
 public:
  virtual ~Ops() = default;

  // Memory at a multiple of 64 bytes, of 256 on a GPU. kOnTouch: zeros, whose pages cost nothing
  // before they are written. kHost: the host's, for what stage() and download() move.
  enum class Pages { kNow, kOnTouch, kHost };
  virtual void* allocate(int64_t bytes, Pages pages) = 0;
  virtual void release(void* memory, int64_t bytes, Pages pages) noexcept = 0;
  virtual void clear(void* memory, int64_t bytes) = 0;
  // Where the host writes what upload() sends to `memory`: there itself, or in `buffer`.
  virtual void* stage(HostBuffer& buffer, void* memory, int64_t bytes) = 0;
  virtual void upload(void* memory, const void* staged, int64_t bytes) = 0;
  // Where the host reads `memory` after wait(): there itself, or in `buffer`.
  virtual const void* download(HostBuffer& buffer, const void* memory, int64_t bytes) = 0;
  virtual void wait() = 0;
  virtual bool is_done() const = 0;  // wait() would not wait

  // For a model whose layers are of these kinds; ops name one by its index.
  virtual std::unique_ptr<Plan> make_plan(std::vector<AttentionKind> kinds) = 0;
  virtual std::unique_ptr<Sampler> make_sampler() = 0;

  // out [rows, cols] = scale times rows of the table, by the plan's tokens; where they are below 0,
  // nothing that may be read before soft_rows has been there.
  virtual void embedding(const Plan& plan, const Weight& table, float scale, const Matrix& out) = 0;
  // Fills out's rows of `at` whose token is -1 - r with row r. d_soft [the plan's soft_rows, cols],
  // float32, is overwritten by the sums of d_out's rows that name each row, in their order.
  virtual void soft_rows(const Plan& plan, const SoftRows& soft, RowRange at,
                         const Matrix& out) = 0;
  virtual void soft_rows_backward(const Plan& plan, const Matrix& d_out, const Matrix& d_soft) = 0;
  // out [outputs, cols] = the plan's output rows of x; d_x is overwritten by the sums of d_out's
  // (float32) rows, in their order.
  virtual void output_rows(const Plan& plan, const Matrix& x, const Matrix& out) = 0;
  virtual void output_rows_backward(const Plan& plan, const Matrix& d_out, const Matrix& d_x) = 0;
  // out [sums, cols] = the plan's sums of rows of x; see mix_rows.h.
  virtual void mix_rows(const Plan& plan, const Matrix& x, const Matrix& out) = 0;

  // See rms_norm.h, swiglu.h.
  virtual void rms_norm(const Matrix& x, const void* weight, float eps, const Matrix& y) = 0;
  virtual void rms_norm_add(const Matrix& x, const void* weight, float eps, const Matrix& residual,
                            const Matrix& y) = 0;
  virtual void rms_norm_backward(const Matrix& x, const void* weight, float eps, const Matrix& dy,
                                 const Matrix& dx) = 0;
  virtual void swiglu(const Matrix& gate_up, const Matrix& h) = 0;
  virtual void swiglu_backward(const Matrix& gate_up, const Matrix& dh,
                               const Matrix& d_gate_up) = 0;
  virtual void geglu(const Matrix& gate_up, const Matrix& h) = 0;
  virtual void geglu_backward(const Matrix& gate_up, const Matrix& dh, const Matrix& d_gate_up) = 0;

  // out [rows, outputs] = x W^T + LoRA + bias + residual.
  virtual void linear(const Matrix& x, const Weight& weight, const LinearExtras& extras,
                      const Matrix& out) = 0;
  // dx [rows, inputs] = dy W + d_lora_down A, d_lora_down [rows, ranks] = scale dy B. dx without
  // data: not wanted; lora null: without the second term.
  virtual void linear_backward(const Matrix& dy, const Weight& weight, const LoraWeight* lora,
                               const Matrix& d_lora_down, const Matrix& dx) = 0;
  // d_a [ranks, inputs], d_b [outputs, ranks], float32, from linear's x and lora_down.
  virtual void lora_backward(const LoraWeight& lora, const Matrix& x, const Matrix& lora_down,
                             const Matrix& dy, const Matrix& d_lora_down, const Matrix& d_a,
                             const Matrix& d_b, void* workspace) = 0;
  virtual int64_t lora_backward_bytes(int64_t rows, int64_t inputs, int64_t outputs,
                                      int64_t ranks) const = 0;

  // rms_norm of each q and k head of qkv in place; raw [rows, qk_size] keeps what they were.
  virtual void qk_norm(const AttentionShape& shape, const Matrix& qkv, const void* q_weight,
                       const void* k_weight, float eps, const Matrix& raw) = 0;
  virtual void qk_norm_backward(const AttentionShape& shape, const Matrix& raw,
                                const void* q_weight, const void* k_weight, float eps,
                                const Matrix& d_qkv) = 0;
  // Turns q and k by the angles of the layer's kind, where it has some, and writes k and v where
  // the plan says. A device may keep k in qkv as it was.
  virtual void rope_kv_write(const Plan& plan, size_t kind, const Matrix& qkv,
                             const KvView& kv) = 0;
  virtual void rope_backward(const Plan& plan, size_t kind, const Matrix& d_qkv) = 0;
  // See attention.h. `saved` is what attention_backward reads beside qkv and kv; null: not wanted.
  virtual void attention(const Plan& plan, size_t kind, const Matrix& qkv, const KvView& kv,
                         void* workspace, const Matrix& out, float* saved) = 0;
  virtual void attention_backward(const Plan& plan, size_t kind, const Matrix& qkv,
                                  const KvView& kv, const float* saved, const Matrix& out,
                                  const Matrix& d_out, void* workspace, const Matrix& d_qkv) = 0;
  virtual int64_t attention_bytes(const Plan& plan) const = 0;
  virtual int64_t attention_backward_bytes(const Plan& plan) const = 0;
  // Whether attention_backward reads the layer's keys and values, and `saved` [rows, heads].
  virtual bool attention_backward_reads_kv() const = 0;
  // Copies the first `slots` positions of block `from` to block `to`; kv names the block's first
  // head of so many that lie head_stride apart.
  virtual void kv_copy_slots(const KvView& kv, int64_t heads, int64_t head_dim, int64_t from,
                             int64_t to, int64_t slots) = 0;

  // See linear_logprob.h; tokens are the plan's targets. `jacobian`, of logprob_jacobian_bytes,
  // receives what makes linear_logprob_backward cheap, or is null. d_hidden is float32.
  virtual void linear_logprob(const Plan& plan, const LogprobRequest& in, const LogprobOutput& out,
                              void* jacobian, void* workspace) = 0;
  virtual void linear_logprob_backward(const Plan& plan, const LogprobRequest& in,
                                       const LogprobOutput& forward,
                                       const LogprobUpstream& upstream, const void* jacobian,
                                       const Matrix& d_hidden, void* workspace) = 0;
  virtual int64_t linear_logprob_bytes(const LogprobRequest& in) const = 0;
  virtual int64_t linear_logprob_backward_bytes(const LogprobRequest& in) const = 0;
  virtual int64_t logprob_jacobian_bytes(int64_t values, int64_t hidden_size,
                                         bool with_reference) const = 0;

  // Bytes beside what is allocate()d, where the host's memory is the device's.
  virtual int64_t score_overhead_bytes(const ScoreShape& shape, const Weight& head) const = 0;
};

// What a device must be able to hold and run, before anything is uploaded.
struct ModelShape {
  int64_t hidden_size, intermediate_size, head_dim, vocab_size;
  int64_t weights;  // values of all matrices
};

// What one more row adds to a step of one row, as a share of it.
struct RowCost {
  double share;
  bool is_estimate;  // the times of steps say it better
};

// Where one model computes: its weights' memory, and what makes Ops. Any thread.
class Device {
 public:
  virtual ~Device() = default;

  uint64_t id() const { return id_; }       // unique in this process, never reused
  virtual std::string name() const = 0;     // "cpu", "cuda"
  virtual std::string compute() const = 0;  // "float32", "int8", "bfloat16"
  virtual DType dtype() const = 0;          // of activations
  virtual DType kv_dtype() const = 0;
  virtual int threads() const = 0;
  // Whether a row's bits are its own, so that what is scored is what was sampled.
  virtual bool deterministic() const = 0;
  // Throws where a model of this shape cannot run, or no gradients can be had.
  virtual void require_runs(const ModelShape& shape) const = 0;
  virtual void require_gradients() const = 0;
  // What a KV cache may take now, where nobody says how much.
  virtual int64_t kv_share_bytes() const = 0;
  virtual RowCost row_cost() const = 0;

  // The uploads of one thread, done when finish_uploads() returns. A table is read by row, and is
  // not multiplied by.
  enum class Use { kTable, kProduct };
  virtual std::unique_ptr<const Weight> upload(const char* name, std::span<const QuantizedRow> rows,
                                               int64_t cols, Use use) = 0;
  virtual const void* upload(
      std::span<const float> values) = 0;  // in dtype(), as long as the device
  virtual std::unique_ptr<const Rope> make_rope(
      int64_t positions, int64_t half,
      const std::function<void(std::span<const int32_t>, float*, float*)>& angles) = 0;
  virtual void finish_uploads() {}
  virtual std::vector<std::unique_ptr<const LoraWeight>> upload(
      std::span<const LoraStack* const> sites) const = 0;
  virtual std::unique_ptr<const SoftRows> upload(std::span<const float> rows,
                                                 int64_t cols) const = 0;

  virtual std::unique_ptr<Ops> make_ops() const = 0;

  // Makes the calling thread's work this device's until it goes.
  class Scope {
   public:
    explicit Scope(const Device& device) : device_(device), before_(device.enter()) {}
    ~Scope() { device_.leave(before_); }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    const Device& device_;
    const int before_;
  };

 protected:
  virtual int enter() const { return 0; }
  virtual void leave(int) const {}

 private:
  static uint64_t next_id() {
    static std::atomic<uint64_t> next{1};
    return next.fetch_add(1);
  }

  const uint64_t id_ = next_id();
};

// Memory of a device that grows and does not keep its values then. The Ops outlive it.
class Buffer {
 public:
  explicit Buffer(Ops& ops, int64_t bytes = 0, Ops::Pages pages = Ops::Pages::kNow)
      : ops_(ops), pages_(pages) {
    reserve(bytes);
  }
  ~Buffer() { reset(); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* reserve(int64_t bytes) {
    if (bytes > bytes_) {
      reset();
      data_ = ops_.allocate(bytes, pages_);
      bytes_ = bytes;
    }
    return data_;
  }
  void* data() const { return data_; }
  void reset() {
    if (data_ != nullptr) ops_.release(std::exchange(data_, nullptr), bytes_, pages_);
    bytes_ = 0;
  }

 private:
  Ops& ops_;
  const Ops::Pages pages_;
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Nothing under way may still read it when it grows.
struct HostBuffer : Buffer {
  explicit HostBuffer(Ops& ops) : Buffer(ops, 0, Ops::Pages::kHost) {}
};

}  // namespace alignpro::ops
