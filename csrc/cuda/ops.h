#pragma once

// The ops on a GPU: what src/alignpro/ops declares and says, on device memory. No header of CUDA
// is named here: callers compile without. A build without CUDA has no_cuda.cc in their place.
//
// Pointers are device memory; matrices have rows `ld` elements apart, contiguous within a row,
// pointers and rows at multiples of 16 bytes. Work is put on `stream` and not waited for. Nothing
// is allocated: workspaces are the caller's, so the caller's allocator rules. Every result is a
// function of its own row: sums run in fixed trees, floats see no atomics, and no choice depends on
// the number of rows.
//
// Throws InvalidArgument for shapes that an op does not take, Unavailable where there is no GPU or
// a launch fails; both name the op.

#include <cstdint>
#include <string>

#include "alignpro/core/dtype.h"
#include "alignpro/ops/attention_shape.h"
#include "alignpro/ops/logprob_output.h"
#include "alignpro/ops/matrix.h"
#include "alignpro/ops/shared/sampling.h"

namespace alignpro::cuda {

using Stream = void*;  // cudaStream_t; null: the default stream

// The largest head_dim, and the largest vocabulary that head_sample draws from.
inline constexpr int kMaxHeadDim = 128;
inline constexpr int64_t kMaxVocabulary = int64_t{1} << 19;

// Whether this build has CUDA and the current device can run it; why not, in one line ("" where it
// can); and the device's name and number.
bool is_available();
std::string unavailable_reason();
std::string device_name();
int current_device();
// Of the tensors that are taken: DLPack's kDLCUDA, 2.
int dlpack_device_type();
// The runtime this build was compiled with, "13.0"; "no" without.
std::string version();

using ops::at;
using ops::AttentionShape;
using ops::LogprobOutput;
using ops::LogprobUpstream;
using ops::Matrix;  // kF32 or kBF16
using ops::Workspace;

// out [tokens, table.cols] = scale times rows of the table. A token outside the table gives a row
// of NaN.
void embedding(const Matrix& table, const int32_t* tokens, float scale, const Matrix& out,
               Stream stream);
// Rows of out [tokens, soft.cols] whose token is -1 - r, a row of soft, become it; others are left.
void soft_rows(const Matrix& soft, const int32_t* tokens, const Matrix& out, Stream stream);
// The gradient by the table, overwritten: its row r is the sum in float32 of d_out's rows
// places[begins[r] .. begins[r + 1]), those that read it, in their order. The dtypes may differ.
void embedding_backward(const Matrix& d_out, const int32_t* begins, const int32_t* places,
                        const Matrix& d_table, Stream stream);

// out's row i is the sum of weights[t] x's row rows[t], t in [begins[i], begins[i + 1]); products
// and sums in double, in that order, rounded once.
void mix_rows(const Matrix& x, const int32_t* begins, const int32_t* rows, const float* weights,
              const Matrix& out, Stream stream);

// weight [cols] in x's dtype. y may be x.
void rms_norm(const Matrix& x, const void* weight, float eps, const Matrix& y, Stream stream);
// y = residual + rms_norm(x), rounded once; y may be the residual or x.
void rms_norm_add(const Matrix& x, const void* weight, float eps, const Matrix& residual,
                  const Matrix& y, Stream stream);

void swiglu(const Matrix& gate_up, const Matrix& h, Stream stream);
void geglu(const Matrix& gate_up, const Matrix& h, Stream stream);

// dx is added to, and may not be dy; d_gate_up is overwritten.
void rms_norm_backward(const Matrix& x, const void* weight, float eps, const Matrix& dy,
                       const Matrix& dx, Stream stream);
void swiglu_backward(const Matrix& gate_up, const Matrix& dh, const Matrix& d_gate_up,
                     Stream stream);
void geglu_backward(const Matrix& gate_up, const Matrix& dh, const Matrix& d_gate_up,
                    Stream stream);

// What joins a linear layer's product while it is in registers; null or no matrix: nothing.
struct LinearExtras {
  const void* bias = nullptr;        // [out features]
  Matrix residual = {};              // [rows, out features]; may be out
  Matrix lora_x = {}, lora_up = {};  // x A^T [rows, rank] and B [out features, rank]
  float lora_scale = 0.0f;
};
// out [rows, out features] = x W^T + lora_scale lora_x B^T + bias + residual, in one dtype, sums in
// float32.
void linear(const Matrix& x, const Matrix& weight, const LinearExtras& extras, const Matrix& out,
            Stream stream);

// Of a layer with an adapter; null or no matrix: nothing.
struct LinearBackwardExtras {
  Matrix residual;            // [rows, in features]; may be dx
  Matrix lora_down, lora_up;  // A [rank, in features] and B [out features, rank]
  Matrix d_lora_down;         // [rows, rank], receives lora_scale dy B
  float lora_scale = 0.0f;
};
// dx [rows, in features] = dy W + d_lora_down A + residual, in one dtype, sums in float32. Without
// data in dx d_lora_down alone is computed; without data in d_lora_down there is no adapter.
void linear_backward(const Matrix& dy, const Matrix& weight, const LinearBackwardExtras& extras,
                     const Matrix& dx, Stream stream);

// What forward and linear_backward leave of a range of rows with one adapter module. Modules that
// share a weight take columns of dy and of the ranks.
struct LoraBackwardInput {
  Matrix x, lora_x;        // [rows, in features], x A^T [rows, rank]
  Matrix dy, d_lora_down;  // [rows, out features], lora_scale dy B [rows, rank]
  float lora_scale;
};
// d_a [rank, in features] = d_lora_down^T x and d_b [out features, rank] = lora_scale dy^T lora_x,
// float32, overwritten; rows are summed in their order. workspace: lora_backward_bytes.
void lora_backward(const LoraBackwardInput& in, const Matrix& d_a, const Matrix& d_b,
                   void* workspace, Stream stream);
int64_t lora_backward_bytes(int64_t rows, int64_t inputs, int64_t outputs, int64_t rank);

// rms_norm in place over each q head of qkv by q_weight [head_dim] and each k head by k_weight.
void qk_norm(const AttentionShape& shape, const Matrix& qkv, const void* q_weight,
             const void* k_weight, float eps, Stream stream);
// Turns the q and k heads of d_qkv from the gradient by qk_norm's output into that by its input,
// whose q and k heads qk has (and may have more), in place.
void qk_norm_backward(const AttentionShape& shape, const Matrix& qk, const void* q_weight,
                      const void* k_weight, float eps, const Matrix& d_qkv, Stream stream);

// One layer of a pool of KV blocks of 16 positions, in the dtype of qkv: K [16][head_dim] of a
// head, its V value_offset further. Strides in elements.
struct PagedKv {
  void* base = nullptr;
  int64_t block_stride = 0, head_stride = 0, value_offset = 0;
};

// Turns the q heads of qkv in place by cos, sin [., rotary_dim / 2] (float32, one row a position),
// and writes the turned k and the v to slot position % 16 of blocks[row]; a block of -1 is not
// written. qkv keeps its own k as it was.
void rope_kv_write(const AttentionShape& shape, const Matrix& qkv, int64_t rotary_dim,
                   const float* cos, const float* sin, const int32_t* positions,
                   const int32_t* blocks, const PagedKv& kv, Stream stream);

// Copies K and V of one position, all heads: slot `slot` of block `from` to that of block `to`. No
// copy reads what another one of the call writes.
struct KvCopy {
  int32_t from, to, slot;
};
void kv_copy(const AttentionShape& shape, DType dtype, const KvCopy* copies, int64_t copy_count,
             const PagedKv& kv, Stream stream);

// In place, of the q and k heads.
void rope_backward(const AttentionShape& shape, const Matrix& d_qkv, int64_t rotary_dim,
                   const float* cos, const float* sin, const int32_t* positions, Stream stream);

// Attention of one token a row: out [rows, q size] over positions [0, positions[row]], which lie in
// block_table [rows, table_ld]. Rows may share blocks. Positions are below max_positions, which
// fixes the grid. workspace: attention_decode_bytes.
void attention_decode(const AttentionShape& shape, const Matrix& qkv, const int32_t* positions,
                      const int32_t* block_table, int64_t table_ld, int64_t max_positions,
                      const PagedKv& kv, void* workspace, const Matrix& out, Stream stream);
int64_t attention_decode_bytes(const AttentionShape& shape, int64_t rows, int64_t max_positions);

// Consecutive rows of one sequence: qkv's rows [row_begin, row_begin + row_count) are its positions
// from `position` on.
struct Segment {
  int32_t row_begin, row_count, position;
};
// Causal attention of segments: out [rows, q size] over each row's own position and those before
// it, cached ones included, which lie in row s of block_table [segment_count, table_ld] (written
// before by rope_kv_write). A position has the same bits as from attention_decode, however rows are
// cut into segments. `segments` is device memory; none has more than max_rows rows, which fixes the
// grid. Rows in no segment are left as they are. lse [rows, num_heads], or null, receives the
// logarithm of each softmax's sum for attention_backward.
void attention_prefill(const AttentionShape& shape, const Matrix& qkv, const Segment* segments,
                       int64_t segment_count, int64_t max_rows, const int32_t* block_table,
                       int64_t table_ld, const PagedKv& kv, const Matrix& out, float* lse,
                       Stream stream);

// What attention_prefill took and left, and d loss / d out. The keys of a segment's own rows are
// seen by the segments children[child_begin[s] .. child_begin[s + 1]), itself among them, whose
// cached positions they are; null: by itself alone, and cached positions are constants.
struct AttentionBackwardInput {
  Matrix qkv, out, dout;
  const float* lse;
  const Segment* segments;
  int64_t segment_count, max_rows;
  const int32_t *child_begin, *children;
  const int32_t* block_table;
  int64_t table_ld;
  PagedKv kv;
};
// d_qkv of the segments' rows, overwritten: by q and k as they were turned, and by v. Keys are
// summed over children in their order. workspace: attention_backward_bytes.
void attention_backward(const AttentionShape& shape, const AttentionBackwardInput& in,
                        const Matrix& d_qkv, void* workspace, Stream stream);
int64_t attention_backward_bytes(const AttentionShape& shape, int64_t rows);

// See ops/linear_logprob.h. Reference: matrices of no rows mean none.
struct LogprobInput {
  Matrix hidden, weight;
  const int32_t* tokens = nullptr;  // [rows]; outside the vocabulary: NaN
  float temperature = 1.0f;
  Matrix ref_hidden, ref_weight;
};
// A row without a finite softmax is NaN in all of `out`.
// workspace: linear_logprob_bytes. Nothing of size rows x vocab is stored.
void linear_logprob(const LogprobInput& in, const LogprobOutput& out, void* workspace,
                    Stream stream);
int64_t linear_logprob_bytes(const LogprobInput& in);

// Given what linear_logprob wrote, with a reference. workspace: total_variation_bytes.
void total_variation(const LogprobInput& in, const LogprobOutput& forward, float* tv,
                     float* mass_above, void* workspace, Stream stream);
int64_t total_variation_bytes(const LogprobInput& in);

// d_hidden [rows, cols] and d_weight [vocab, cols], float32, overwritten; data null: not wanted.
// workspace: linear_logprob_backward_bytes.
void linear_logprob_backward(const LogprobInput& in, const LogprobOutput& forward,
                             const LogprobUpstream& upstream, const Matrix& d_hidden,
                             const Matrix& d_weight, void* workspace, Stream stream);
int64_t linear_logprob_backward_bytes(const LogprobInput& in);

// One draw, whose uniform is in [0, 1).
struct SampleRow : ops::DrawOptions {
  double uniform;
  int32_t ban_begin = 0, ban_count = 0;  // of Truncation::banned
};
// What truncated rows need beside: tokens that may not be drawn, and where the probability of what
// truncation and bans left goes, [rows].
struct Truncation {
  const int32_t* banned = nullptr;
  float* kept_mass = nullptr;
};
// Draws a token a row by inversion in token order, as ops/head_sample.h does, and its
// log-probability, which is the one that linear_logprob gives, whatever was truncated. A row
// without a finite softmax or with nothing left to draw gives token -1 and NaN; so does a truncated
// one without `truncation`. workspace: head_sample_bytes; with a truncation it holds the logits of
// up to 128 rows.
void head_sample(const Matrix& hidden, const Matrix& head, const SampleRow* rows, int32_t* tokens,
                 float* logprobs, void* workspace, Stream stream,
                 const Truncation* truncation = nullptr);
int64_t head_sample_bytes(int64_t rows, int64_t vocab, bool with_truncation = false);

}  // namespace alignpro::cuda
