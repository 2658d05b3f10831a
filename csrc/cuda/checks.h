#pragma once

// What every op asks of its arguments, on the host and without CUDA: nothing is launched for shapes
// that a kernel does not take.

#include <cstdint>
#include <type_traits>

#include "alignpro/core/error.h"
#include "alignpro/core/float_bits.h"
#include "alignpro/ops/kv_view.h"
#include "ops.h"

namespace alignpro::cuda {

// fn(float{}) or fn(Bfloat16{}).
template <typename Fn>
void dispatch(const char* op, DType dtype, const Fn& fn) {
  switch (dtype) {
    case DType::kF32:
      return fn(float{});
    case DType::kBF16:
      return fn(Bfloat16{});
    default:
      throw InvalidArgument(
          cat(op, ": expected float32 or bfloat16 on a GPU, got ", dtype_name(dtype)));
  }
}

inline int64_t pack_size(DType dtype) { return 16 / block_bytes(dtype); }

inline void check_aligned(const char* op, const char* name, const void* data) {
  require(data != nullptr && reinterpret_cast<uintptr_t>(data) % 16 == 0, op, ": ", name,
          ": expected device memory at a multiple of 16 bytes, got ", data);
}

// Rows that are loaded 16 bytes at a time.
inline void check_matrix(const char* op, const char* name, const Matrix& m, int64_t rows,
                         int64_t cols, DType dtype) {
  require(m.dtype == dtype, op, ": ", name, ": expected ", dtype_name(dtype), ", got ",
          dtype_name(m.dtype));
  require(m.rows == rows && m.cols == cols, op, ": ", name, ": expected shape [", rows, ", ", cols,
          "], got [", m.rows, ", ", m.cols, "]");
  const int64_t pack = pack_size(dtype);
  require(m.cols > 0 && m.cols % pack == 0 && m.ld % pack == 0 && m.ld >= m.cols, op, ": ", name,
          ": expected rows of a multiple of ", pack, " values, got ", m.cols, " at a distance of ",
          m.ld);
  if (m.rows > 0) check_aligned(op, name, m.data);
}

inline void check_linear(const char* op, const Matrix& x, const Matrix& weight,
                         const Matrix& residual, const Matrix& out) {
  check_matrix(op, "x", x, x.rows, weight.cols, x.dtype);
  check_matrix(op, "weight", weight, weight.rows, x.cols, x.dtype);
  check_matrix(op, "out", out, x.rows, weight.rows, x.dtype);
  if (residual.data == nullptr) return;
  check_matrix(op, "residual", residual, x.rows, weight.rows, x.dtype);
}

inline void check_head_dim(const char* op, const AttentionShape& shape, DType dtype) {
  const int64_t pack = pack_size(dtype);
  require(shape.head_dim > 0 && shape.head_dim % pack == 0, op,
          ": expected a head_dim that is a multiple of ", pack, ", got ", shape.head_dim);
}

// Rows of [q heads | k heads | v heads].
inline void check_heads(const char* op, const AttentionShape& shape, const Matrix& qkv,
                        const char* name) {
  require(
      shape.num_kv_heads >= 1 && shape.num_heads >= 1 && shape.num_heads % shape.num_kv_heads == 0,
      op, ": expected heads in groups of the same size, got ", shape.num_heads, " over ",
      shape.num_kv_heads);
  check_matrix(op, name, qkv, qkv.rows, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim,
               qkv.dtype);
  check_head_dim(op, shape, qkv.dtype);
}

inline void check_rotary(const char* op, const AttentionShape& shape, int64_t rotary_dim) {
  require(rotary_dim >= 0 && rotary_dim % 2 == 0 && rotary_dim <= shape.head_dim, op,
          ": rotary_dim: expected an even number up to ", shape.head_dim, ", got ", rotary_dim);
}

inline void check_kv(const char* op, const AttentionShape& shape, DType dtype, const PagedKv& kv) {
  check_head_dim(op, shape, dtype);
  const int64_t pack = pack_size(dtype);
  require(kv.block_stride % pack == 0 && kv.head_stride % pack == 0 && kv.value_offset % pack == 0,
          op, ": kv: expected strides that are multiples of ", pack, ", got ", kv.block_stride,
          ", ", kv.head_stride, ", ", kv.value_offset);
  check_aligned(op, "kv", kv.base);
}

inline void check_attention(const char* op, const AttentionShape& shape, const Matrix& qkv,
                            const PagedKv& kv) {
  check_heads(op, shape, qkv, "qkv");
  check_kv(op, shape, qkv.dtype, kv);
}

// fn(std::integral_constant) of the width that a head_dim is padded to.
template <typename Fn>
void dispatch_head_dim(const char* op, int64_t head_dim, const Fn& fn) {
  if (head_dim <= 64) return fn(std::integral_constant<int, 64>());
  if (head_dim <= 96) return fn(std::integral_constant<int, 96>());
  require(head_dim <= 128, op, ": expected a head_dim up to 128, got ", head_dim);
  fn(std::integral_constant<int, 128>());
}

// Blocks of 16 positions in rows of table_ld, which hold max_positions each.
inline void check_table(const char* op, int64_t table_ld, int64_t max_positions) {
  require(max_positions >= 1 && table_ld * ops::kKvBlock >= max_positions, op,
          ": expected a block table for max_positions, got ", table_ld, " blocks of 16 for ",
          max_positions);
}

inline void check_segments(const char* op, int64_t count, int64_t max_rows, int64_t table_ld) {
  check_table(op, table_ld, max_rows);
  require(count >= 0 && count <= 65535, op, ": expected at most 65535 segments, got ", count);
}

inline bool has_reference(const LogprobInput& in) { return in.ref_hidden.rows > 0; }

inline void check_logprob(const char* op, const LogprobInput& in) {
  const Matrix& h = in.hidden;
  require(in.weight.rows >= 1, op, ": weight: expected at least one row, got none");
  require(in.temperature > 0.0f && in.temperature <= 3.4e38f, op,
          ": temperature: expected a finite number above 0, got ", in.temperature);
  check_matrix(op, "hidden", h, h.rows, in.weight.cols, h.dtype);
  check_matrix(op, "weight", in.weight, in.weight.rows, h.cols, h.dtype);
  if (!has_reference(in)) return;
  check_matrix(op, "reference_hidden", in.ref_hidden, h.rows, in.ref_weight.cols, h.dtype);
  check_matrix(op, "reference_weight", in.ref_weight, in.weight.rows, in.ref_hidden.cols, h.dtype);
}

}  // namespace alignpro::cuda
