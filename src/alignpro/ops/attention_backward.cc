#include <algorithm>
#include <cstring>
#include <vector>

#include "alignpro/core/aligned.h"
#include "alignpro/ops/attention.h"
#include "alignpro/ops/cpu/kernels.h"

namespace alignpro::ops {
namespace {

using cpu::kPanel;
using cpu::kRowTile;

// Query rows (tokens x heads of a group) that share a pass over the keys.
constexpr int64_t kQueryRows = 48;

struct Workspace {
  AlignedBuffer queries;   // rows of q, then of dout
  AlignedBuffer gathered;  // K and V of one segment, as rows and as panels
  AlignedBuffer scores;    // probabilities and their gradients, [rows][padded keys] each
  AlignedBuffer packed;    // the left operand of a product
  AlignedBuffer tile;      // [rows][16]
};

Workspace& workspace() {
  thread_local Workspace instance;
  return instance;
}

// Gradients of one segment and KV head: writes dq, and leaves dk and dv of the segment's keys in
// `local`, [2][column panels][keys][16].
void attend_backward(const AttentionShape& shape, const float* qkv, const float* out,
                     const float* dout, const SegmentRows& segment, int64_t kv_head, float* local,
                     float* dqkv) {
  const cpu::Kernels& k = cpu::kernels();
  const int64_t d = shape.head_dim, group = shape.group(), width = shape.qkv_size();
  const int64_t k_offset = shape.q_size() + kv_head * d;
  const int64_t v_offset = k_offset + shape.num_kv_heads * d;
  const int64_t keys = segment.position + segment.row_count;
  const int64_t key_panels = (keys + kPanel - 1) / kPanel, stride = key_panels * kPanel;
  const int64_t column_panels = (d + kPanel - 1) / kPanel;
  const int64_t most = std::max<int64_t>(1, kQueryRows / group) * group;
  const int64_t padded = (most + kRowTile - 1) / kRowTile * kRowTile;

  // Keys and values as rows and as panels [d][16]. A head_dim that is no multiple of 16 is read
  // past a row's end, into the next (or the slack); those lanes are dropped.
  Workspace& own = workspace();
  float* key = own.gathered.reserve(2 * (keys * d + kPanel) + 2 * stride * d);
  float* value = key + keys * d + kPanel;
  float* key_panel = value + keys * d + kPanel;
  float* value_panel = key_panel + stride * d;
  for (int64_t j = 0; j < keys; ++j) {
    const float* row = qkv + segment.key_rows[static_cast<size_t>(j)] * width;
    std::memcpy(key + j * d, row + k_offset, static_cast<size_t>(d) * sizeof(float));
    std::memcpy(value + j * d, row + v_offset, static_cast<size_t>(d) * sizeof(float));
  }
  std::fill_n(key + keys * d, kPanel, 0.0f);
  for (int64_t b = 0; b < key_panels; ++b) {
    const int64_t live = std::min(kPanel, keys - b * kPanel);
    k.pack_panel(key + b * kPanel * d, d, live, d, key_panel + b * kPanel * d);
    k.pack_panel(value + b * kPanel * d, d, live, d, value_panel + b * kPanel * d);
  }
  float* dkey = local;
  float* dvalue = local + column_panels * keys * kPanel;
  std::fill_n(local, 2 * column_panels * keys * kPanel, 0.0f);

  float* query = own.queries.reserve(2 * (most * d + kPanel));  // rows of q, then of dout
  float* upstream = query + most * d + kPanel;
  std::fill_n(query + most * d, kPanel, 0.0f);
  std::fill_n(upstream + most * d, kPanel, 0.0f);
  float* probs = own.scores.reserve(2 * most * stride);
  float* dprobs = probs + most * stride;
  float* packed =
      own.packed.reserve(std::max({padded * d, padded * stride, (stride + kRowTile) * most}));
  float* tile = own.tile.reserve(most * kPanel);
  const int64_t tokens = most / group;
  for (int64_t first = 0; first < segment.row_count; first += tokens) {
    const int64_t count = std::min(tokens, segment.row_count - first);
    const int64_t rows = count * group;
    const int64_t last = segment.position + first + count;  // keys [0, last)
    const int64_t base = shape.first_visible(segment.position + first) / kPanel * kPanel;
    const int64_t end = (last + kPanel - 1) / kPanel * kPanel;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = segment.row_begin + first + r / group;
      const int64_t head = kv_head * group + r % group;
      std::memcpy(query + r * d, qkv + row * width + head * d,
                  static_cast<size_t>(d) * sizeof(float));
      std::memcpy(upstream + r * d, dout + row * shape.q_size() + head * d,
                  static_cast<size_t>(d) * sizeof(float));
    }
    const auto by_keys = [&](const float* left, const float* panels, float* to) {
      k.pack_rows(rows, d, left, d, 1, packed);
      for (int64_t b = base / kPanel; b < end / kPanel; ++b) {
        k.gemm_panel(rows, d, packed, d * kRowTile, panels + b * kPanel * d, kPanel, tile, false,
                     false);
        for (int64_t r = 0; r < rows; ++r) {
          std::memcpy(to + r * stride + b * kPanel, tile + r * kPanel, kPanel * sizeof(float));
        }
      }
    };
    by_keys(query, key_panel, probs);
    by_keys(upstream, value_panel, dprobs);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = segment.row_begin + first + r / group;
      const int64_t head = kv_head * group + r % group;
      const int64_t position = segment.position + first + r / group;
      float* p = probs + r * stride;
      float* dp = dprobs + r * stride;
      float max = 0.0f, sum = 0.0f;
      k.softmax_row(p + base, shape.first_visible(position) - base, position + 1 - base,
                    shape.scale, &max, &sum);
      const float inverse = 1.0f / sum;
      const float delta = k.dot(out + row * shape.q_size() + head * d, upstream + r * d, d);
      for (int64_t j = base; j <= position; ++j) {
        p[j] *= inverse;
        dp[j] = p[j] * (dp[j] - delta) * shape.scale;
      }
      std::fill(p + position + 1, p + end, 0.0f);
      std::fill(dp + position + 1, dp + end, 0.0f);
    }
    k.pack_rows(rows, last - base, dprobs + base, stride, 1, packed);
    for (int64_t c = 0; c < column_panels; ++c) {
      k.gemm_panel(rows, last - base, packed, (last - base) * kRowTile, key + base * d + c * kPanel,
                   d, tile, false, false);
      const int64_t live = std::min(kPanel, d - c * kPanel);
      for (int64_t r = 0; r < rows; ++r) {
        float* to = dqkv + (segment.row_begin + first + r / group) * width +
                    (kv_head * group + r % group) * d + c * kPanel;
        std::memcpy(to, tile + r * kPanel, static_cast<size_t>(live) * sizeof(float));
      }
    }
    const auto by_rows = [&](const float* weights, const float* right, float* sums) {
      k.pack_rows(last - base, rows, weights + base, 1, stride, packed);
      for (int64_t c = 0; c < column_panels; ++c) {
        k.gemm_panel(last - base, rows, packed, rows * kRowTile, right + c * kPanel, d,
                     sums + (c * keys + base) * kPanel, true, false);
      }
    };
    by_rows(dprobs, query, dkey);
    by_rows(probs, upstream, dvalue);
  }
}

}  // namespace

int64_t attention_backward_floats(const AttentionShape& shape,
                                  std::span<const SegmentRows> segments) {
  int64_t keys = 0;
  for (const SegmentRows& s : segments) keys += s.position + s.row_count;
  const int64_t columns = (shape.head_dim + kPanel - 1) / kPanel * kPanel;
  return 2 * keys * columns * shape.num_kv_heads;
}

void attention_backward(const AttentionShape& shape, const float* qkv, const float* out,
                        const float* dout, std::span<const SegmentRows> segments, float* dqkv,
                        float* workspace, ThreadPool& pool) {
  const int64_t d = shape.head_dim, heads = shape.num_kv_heads;
  const int64_t column_panels = (d + kPanel - 1) / kPanel;
  std::vector<int64_t> offsets;  // of each segment's first head
  int64_t size = 0;
  for (const SegmentRows& s : segments) {
    offsets.push_back(size);
    size += 2 * column_panels * (s.position + s.row_count) * kPanel * heads;
  }
  float* local = workspace;
  const auto local_of = [&](int64_t segment, int64_t head) {
    const SegmentRows& s = segments[static_cast<size_t>(segment)];
    return local + offsets[static_cast<size_t>(segment)] +
           head * 2 * column_panels * (s.position + s.row_count) * kPanel;
  };
  pool.run(static_cast<int64_t>(segments.size()) * heads, [&](int64_t item, int) {
    attend_backward(shape, qkv, out, dout, segments[static_cast<size_t>(item / heads)],
                    item % heads, local_of(item / heads, item % heads), dqkv);
  });
  // Keys that several segments share are summed in the segments' order.
  pool.run(2 * heads, [&](int64_t item, int) {
    const int64_t head = item / 2, half = item % 2;
    const int64_t column = shape.q_size() + (half * heads + head) * d;
    for (size_t s = 0; s < segments.size(); ++s) {
      const int64_t keys = segments[s].position + segments[s].row_count;
      const float* from =
          local_of(static_cast<int64_t>(s), head) + half * column_panels * keys * kPanel;
      for (int64_t j = 0; j < keys; ++j) {
        float* to = dqkv + segments[s].key_rows[static_cast<size_t>(j)] * shape.qkv_size() + column;
        for (int64_t i = 0; i < d; ++i) {
          to[i] += from[(i / kPanel * keys + j) * kPanel + i % kPanel];
        }
      }
    }
  });
}

}  // namespace alignpro::ops
