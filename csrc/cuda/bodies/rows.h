#pragma once

// Ops of one row by one block: embedding, soft_rows, mix_rows, rms_norm, swiglu, geglu,
// rope_kv_write, kv_copy, and backwards.

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../ops.h"
#include "alignpro/ops/kv_view.h"
#include "alignpro/ops/shared/activation.h"
#include "block.h"

namespace alignpro::cuda {

// Rows of T, `ld` elements apart.
template <typename T>
struct Rows {
  T* data;
  int64_t ld;

  using Packs = std::conditional_t<std::is_const_v<T>, const Pack<std::remove_const_t<T>>, Pack<T>>;
  ALIGNPRO_HOST_DEVICE Packs* packs(int64_t row) const {
    return reinterpret_cast<Packs*>(data + row * ld);
  }
};

template <typename T>
Rows<T> rows_as(const Matrix& m) {
  return {static_cast<T*>(m.data), m.ld};
}

template <typename T, typename Block>
ALIGNPRO_BODY void embedding_row(Block& block, int64_t row, Rows<T> table, int64_t vocab,
                                 int64_t cols, const int32_t* tokens, float scale, Rows<T> out) {
  const int32_t token = tokens[row];
  const bool known = token >= 0 && token < vocab;
  Pack<T> nothing;
  for (T& value : nothing.value) value = stored<T>(NAN);
  const Pack<T>* from = table.packs(known ? token : 0);
  for (int64_t i = block.thread(); i < cols / Pack<T>::kSize; i += block.threads()) {
    Pack<T> result = known ? from[i] : nothing;
    if (scale != 1.0f) {
      for (T& value : result.value) value = stored<T>(scale * to_float(value));
    }
    out.packs(row)[i] = result;
  }
}

template <typename T, typename Block>
ALIGNPRO_BODY void soft_rows_row(Block& block, int64_t row, Rows<const T> soft, int64_t soft_count,
                                 int64_t cols, const int32_t* tokens, Rows<T> out) {
  const int64_t from = -1 - int64_t{tokens[row]};
  if (from < 0 || from >= soft_count) return;
  for (int64_t i = block.thread(); i < cols / Pack<T>::kSize; i += block.threads()) {
    out.packs(row)[i] = soft.packs(from)[i];
  }
}

// places [begins[row], begins[row + 1]): the rows of d_out that read this row of the table.
template <typename From, typename T, typename Block>
ALIGNPRO_BODY void embedding_backward_row(Block& block, int64_t row, int64_t cols,
                                          Rows<const From> d_out, const int32_t* begins,
                                          const int32_t* places, Rows<T> d_table) {
  constexpr int kSize = Pack<T>::kSize;
  for (int64_t i = block.thread(); i < cols / kSize; i += block.threads()) {
    float sums[kSize] = {};
    for (int32_t at = begins[row]; at < begins[row + 1]; ++at) {
      const From* from = d_out.data + places[at] * d_out.ld + i * kSize;
      for (int k = 0; k < kSize; ++k) sums[k] += to_float(from[k]);
    }
    Pack<T> result;
    for (int k = 0; k < kSize; ++k) result.value[k] = stored<T>(sums[k]);
    d_table.packs(row)[i] = result;
  }
}

// A product of two float32 is exact in double, so that a sum is the same with and without FMA.
template <typename T, typename Block>
ALIGNPRO_BODY void mix_rows_row(Block& block, int64_t row, int64_t cols, Rows<const T> x,
                                const int32_t* begins, const int32_t* places, const float* weights,
                                Rows<T> out) {
  constexpr int kSize = Pack<T>::kSize;
  for (int64_t i = block.thread(); i < cols / kSize; i += block.threads()) {
    double sums[kSize] = {};
    for (int32_t at = begins[row]; at < begins[row + 1]; ++at) {
      const Pack<T> pack = x.packs(places[at])[i];
      const double weight = weights[at];
      for (int k = 0; k < kSize; ++k) sums[k] += weight * double{to_float(pack.value[k])};
    }
    Pack<T> result;
    for (int k = 0; k < kSize; ++k) result.value[k] = stored<T>(static_cast<float>(sums[k]));
    out.packs(row)[i] = result;
  }
}

// residual: without data none; y may be it, or x.
template <typename T, typename Block>
ALIGNPRO_BODY void rms_norm_row(Block& block, int64_t row, int64_t cols, Rows<T> x, const T* weight,
                                float eps, Rows<const T> residual, Rows<T> y, float* scratch) {
  const int64_t packs = cols / Pack<T>::kSize;
  float sum = 0.0f;
  for (int64_t i = block.thread(); i < packs; i += block.threads()) {
    const Pack<T> pack = x.packs(row)[i];
    for (const T& value : pack.value) sum = std::fma(to_float(value), to_float(value), sum);
  }
  sum = reduce_block(block, sum, scratch, Add());
  const float factor = 1.0f / std::sqrt(sum / static_cast<float>(cols) + eps);
  for (int64_t i = block.thread(); i < packs; i += block.threads()) {
    const Pack<T> pack = x.packs(row)[i], w = reinterpret_cast<const Pack<T>*>(weight)[i];
    Pack<T> result;
    for (int k = 0; k < Pack<T>::kSize; ++k) {
      float value = to_float(w.value[k]) * (to_float(pack.value[k]) * factor);
      if (residual.data != nullptr) value += to_float(residual.packs(row)[i].value[k]);
      result.value[k] = stored<T>(value);
    }
    y.packs(row)[i] = result;
  }
}

// Of swiglu and geglu, by their gates.
struct Silu {
  static ALIGNPRO_HOST_DEVICE float gate(float x) { return ops::silu(x); }
  static ALIGNPRO_HOST_DEVICE void gradient(float gate, float up, float d, float* d_gate,
                                            float* d_up) {
    ops::silu_gradient(gate, up, d, d_gate, d_up);
  }
};
struct Gelu {
  static ALIGNPRO_HOST_DEVICE float gate(float x) { return ops::gelu(x); }
  static ALIGNPRO_HOST_DEVICE void gradient(float gate, float up, float d, float* d_gate,
                                            float* d_up) {
    ops::gelu_gradient(gate, up, d, d_gate, d_up);
  }
};

template <typename Gate, typename T, typename Block>
ALIGNPRO_BODY void glu_row(Block& block, int64_t row, int64_t n, Rows<T> gate_up, Rows<T> h) {
  const int64_t packs = n / Pack<T>::kSize;
  for (int64_t i = block.thread(); i < packs; i += block.threads()) {
    const Pack<T> gate = gate_up.packs(row)[i], up = gate_up.packs(row)[packs + i];
    Pack<T> result;
    for (int k = 0; k < Pack<T>::kSize; ++k) {
      result.value[k] = stored<T>(Gate::gate(to_float(gate.value[k])) * to_float(up.value[k]));
    }
    h.packs(row)[i] = result;
  }
}

template <typename Gate, typename T, typename Block>
ALIGNPRO_BODY void glu_backward_row(Block& block, int64_t row, int64_t n, Rows<const T> gate_up,
                                    Rows<const T> dh, Rows<T> d_gate_up) {
  const int64_t packs = n / Pack<T>::kSize;
  for (int64_t i = block.thread(); i < packs; i += block.threads()) {
    const Pack<T> gate = gate_up.packs(row)[i], up = gate_up.packs(row)[packs + i];
    const Pack<T> d = dh.packs(row)[i];
    Pack<T> d_gate, d_up;
    for (int k = 0; k < Pack<T>::kSize; ++k) {
      float to_gate, to_up;
      Gate::gradient(to_float(gate.value[k]), to_float(up.value[k]), to_float(d.value[k]), &to_gate,
                     &to_up);
      d_gate.value[k] = stored<T>(to_gate);
      d_up.value[k] = stored<T>(to_up);
    }
    d_gate_up.packs(row)[i] = d_gate;
    d_gate_up.packs(row)[packs + i] = d_up;
  }
}

// dx = (w dy - x f^2 mean(w dy x)) f, with the row's factor f computed again; kAdd: added to dx,
// which is not dy.
template <bool kAdd, typename T, typename Block>
ALIGNPRO_BODY void rms_norm_backward_row(Block& block, int64_t row, int64_t cols, Rows<const T> x,
                                         const T* weight, float eps, Rows<const T> dy, Rows<T> dx,
                                         float* scratch) {
  const int64_t packs = cols / Pack<T>::kSize;
  float sum = 0.0f, dot = 0.0f;
  for (int64_t i = block.thread(); i < packs; i += block.threads()) {
    const Pack<T> pack = x.packs(row)[i], d = dy.packs(row)[i];
    const Pack<T> w = reinterpret_cast<const Pack<T>*>(weight)[i];
    for (int k = 0; k < Pack<T>::kSize; ++k) {
      const float value = to_float(pack.value[k]);
      sum = std::fma(value, value, sum);
      dot = std::fma(to_float(w.value[k]) * to_float(d.value[k]), value, dot);
    }
  }
  sum = reduce_block(block, sum, scratch, Add());
  dot = reduce_block(block, dot, scratch, Add());
  const auto n = static_cast<float>(cols);
  const float factor = 1.0f / std::sqrt(sum / n + eps), back = factor * factor * (dot / n);
  for (int64_t i = block.thread(); i < packs; i += block.threads()) {
    const Pack<T> pack = x.packs(row)[i], d = dy.packs(row)[i];
    const Pack<T> w = reinterpret_cast<const Pack<T>*>(weight)[i];
    Pack<T> result;
    if constexpr (kAdd) result = dx.packs(row)[i];
    for (int k = 0; k < Pack<T>::kSize; ++k) {
      const float value =
          std::fma(-back, to_float(pack.value[k]), to_float(w.value[k]) * to_float(d.value[k]));
      if constexpr (kAdd) {
        result.value[k] = stored<T>(std::fma(factor, value, to_float(result.value[k])));
      } else {
        result.value[k] = stored<T>(factor * value);
      }
    }
    dx.packs(row)[i] = result;
  }
}

// PagedKv of one type.
template <typename T>
struct KvBlocks {
  T* base;
  int64_t block_stride, head_stride, value_offset;
  int64_t head_dim;

  ALIGNPRO_HOST_DEVICE T* key(int64_t block, int64_t head, int64_t slot) const {
    return base + block * block_stride + head * head_stride + slot * head_dim;
  }
  ALIGNPRO_HOST_DEVICE T* value(int64_t block, int64_t head, int64_t slot) const {
    return key(block, head, slot) + value_offset;
  }
};

template <typename T>
KvBlocks<T> kv_blocks(const PagedKv& kv, const AttentionShape& shape) {
  return {static_cast<T*>(kv.base), kv.block_stride, kv.head_stride, kv.value_offset,
          shape.head_dim};
}

template <typename T>
struct RopeKvWrite {
  Rows<T> qkv;
  int64_t num_heads, num_kv_heads, rotary_dim;
  const float *cos, *sin;  // [positions, rotary_dim / 2]
  const int32_t *positions, *blocks;
  KvBlocks<T> kv;
};

template <typename T, typename Block>
ALIGNPRO_BODY void rope_kv_write_row(Block& block, int64_t row, const RopeKvWrite<T>& args) {
  const int64_t d = args.kv.head_dim, half = args.rotary_dim / 2;
  const int64_t position = args.positions[row], slot = position % ops::kKvBlock;
  const int64_t to_block = args.blocks[row];
  const float *cos = args.cos + position * half, *sin = args.sin + position * half;
  T* from = args.qkv.data + row * args.qkv.ld;
  const int64_t heads = args.num_heads + (to_block < 0 ? 0 : args.num_kv_heads);
  for (int64_t i = block.thread(); i < heads * half; i += block.threads()) {
    const int64_t head = i / half, lane = i % half;
    T* x = from + head * d;
    float a = to_float(x[lane]), b = to_float(x[lane + half]);
    ops::rotate(cos[lane], sin[lane], &a, &b);
    T* to = head < args.num_heads ? x : args.kv.key(to_block, head - args.num_heads, slot);
    to[lane] = stored<T>(a);
    to[lane + half] = stored<T>(b);
  }
  if (to_block < 0) return;
  const int64_t rest = d - args.rotary_dim;
  for (int64_t i = block.thread(); i < args.num_kv_heads * rest; i += block.threads()) {
    const int64_t head = i / rest, lane = args.rotary_dim + i % rest;
    args.kv.key(to_block, head, slot)[lane] = from[(args.num_heads + head) * d + lane];
  }
  const T* values = from + (args.num_heads + args.num_kv_heads) * d;
  for (int64_t i = block.thread(); i < args.num_kv_heads * d; i += block.threads()) {
    args.kv.value(to_block, i / d, slot)[i % d] = values[i];
  }
}

// K and V of one position, all heads.
template <typename T, typename Block>
ALIGNPRO_BODY void kv_copy_position(Block& block, const KvCopy& copy, int64_t num_kv_heads,
                                    const KvBlocks<T>& kv) {
  const int64_t packs = kv.head_dim / Pack<T>::kSize;
  for (int64_t i = block.thread(); i < 2 * num_kv_heads * packs; i += block.threads()) {
    const int64_t head = i / (2 * packs), along = i % packs * Pack<T>::kSize;
    const int64_t half = i / packs % 2 * kv.value_offset;
    const T* from = kv.key(copy.from, head, copy.slot) + half + along;
    *reinterpret_cast<Pack<T>*>(kv.key(copy.to, head, copy.slot) + half + along) =
        *reinterpret_cast<const Pack<T>*>(from);
  }
}

// Turns the first `heads` heads of a row back: the gradient of their rotation.
template <typename T, typename Block>
ALIGNPRO_BODY void rope_backward_row(Block& block, int64_t row, Rows<T> d_qkv, int64_t heads,
                                     int64_t head_dim, int64_t rotary_dim, const float* cos,
                                     const float* sin, const int32_t* positions) {
  const int64_t half = rotary_dim / 2, at = positions[row] * half;
  for (int64_t i = block.thread(); i < heads * half; i += block.threads()) {
    const int64_t lane = i % half;
    T* x = d_qkv.data + row * d_qkv.ld + i / half * head_dim;
    float a = to_float(x[lane]), b = to_float(x[lane + half]);
    ops::rotate(cos[at + lane], -sin[at + lane], &a, &b);
    x[lane] = stored<T>(a);
    x[lane + half] = stored<T>(b);
  }
}

}  // namespace alignpro::cuda
