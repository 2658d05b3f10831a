#include "alignpro/ops/attention.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "alignpro/core/aligned.h"
#include "alignpro/ops/cpu/kernels.h"

namespace alignpro::ops {
namespace {

using cpu::kPanel;
using cpu::kRowTile;
static_assert(kKvBlock == kPanel, "a block of keys is one panel of the matrix product");

// Query rows (tokens x heads of a group) that share a pass over the keys.
constexpr int64_t kQueryRows = 48;

struct Workspace {
  AlignedBuffer queries;   // packed [head_dim][6] tiles
  AlignedBuffer tile;      // [rows][16]
  AlignedBuffer scores;    // [rows][padded keys]
  AlignedBuffer packed;    // packed probabilities of one block
  AlignedBuffer out;       // [column panels][rows][16]
  AlignedBuffer gathered;  // backward: K, V, dK, dV of one segment
};

Workspace& workspace() {
  thread_local Workspace instance;
  return instance;
}

struct QueryTile {
  int64_t segment;
  int64_t first;  // token within the segment
  int64_t count;
};

// First position a token at `position` may look at.
int64_t first_visible(const AttentionShape& shape, int64_t position) {
  return shape.sliding_window > 0 ? std::max<int64_t>(0, position - shape.sliding_window + 1) : 0;
}

void attend(const AttentionShape& shape, const float* qkv, const Segment& segment,
            const QueryTile& query, int64_t kv_head, const KvView& kv, float* out) {
  const cpu::Kernels& k = cpu::kernels();
  const int64_t d = shape.head_dim, group = shape.group();
  const int64_t rows = query.count * group;
  const int64_t row_tiles = (rows + kRowTile - 1) / kRowTile;
  const int64_t last = segment.position + query.first + query.count;  // keys [0, last)
  const int64_t first_block = first_visible(shape, segment.position + query.first) / kKvBlock;
  const int64_t blocks = (last + kKvBlock - 1) / kKvBlock;
  const int64_t stride = blocks * kKvBlock;
  Workspace& own = workspace();
  float* queries = own.queries.reserve(row_tiles * kRowTile * d);
  float* tile = own.tile.reserve(rows * kPanel);
  float* scores = own.scores.reserve(rows * stride);

  // Row (token t, head g of the group) is t * group + g; its q lies head_dim-contiguous in qkv.
  for (int64_t r = 0; r < row_tiles * kRowTile; ++r) {
    const int64_t t = r / group, g = r % group;
    const float* q = r < rows ? qkv + (segment.row_begin + query.first + t) * shape.qkv_size() +
                                    (kv_head * group + g) * d
                              : nullptr;
    float* to = queries + r / kRowTile * kRowTile * d + r % kRowTile;
    for (int64_t i = 0; i < d; ++i) to[i * kRowTile] = q != nullptr ? q[i] : 0.0f;
  }
  for (int64_t b = first_block; b < blocks; ++b) {
    k.gemm_panel(rows, d, queries, kv.keys(segment.blocks[static_cast<size_t>(b)], kv_head), kPanel,
                 tile, false);
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(scores + r * stride + b * kKvBlock, tile + r * kPanel, kPanel * sizeof(float));
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t position = segment.position + query.first + r / group;
    float* row = scores + r * stride;
    float max = 0.0f, sum = 0.0f;
    // Whole blocks before the window are never read: shift the row to the first block.
    const int64_t base = first_block * kKvBlock;
    k.softmax_row(row + base, first_visible(shape, position) - base, position + 1 - base,
                  shape.scale, &max, &sum);
    const int64_t padded = base + (position + 1 - base + kPanel - 1) / kPanel * kPanel;
    std::fill(row + padded, row + stride, 0.0f);
    const float inverse = 1.0f / sum;
    for (int64_t j = base; j < padded; ++j) row[j] *= inverse;
  }
  const int64_t column_panels = (d + kPanel - 1) / kPanel;
  float* packed = own.packed.reserve(row_tiles * kRowTile * kKvBlock);
  float* result = own.out.reserve(column_panels * rows * kPanel);
  for (int64_t b = first_block; b < blocks; ++b) {
    // Slots at or past `last` were never written for this sequence: they are not read.
    const int64_t live = std::min(kKvBlock, last - b * kKvBlock);
    k.pack_rows(rows, live, scores + b * kKvBlock, stride, 1, packed);
    const float* values = kv.values(segment.blocks[static_cast<size_t>(b)], kv_head);
    for (int64_t p = 0; p < column_panels; ++p) {
      // A head_dim that is no multiple of 16 reads into the next row (the pool ends in slack);
      // those lanes are dropped below.
      k.gemm_panel(rows, live, packed, values + p * kPanel, d, result + p * rows * kPanel,
                   b > first_block);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* to = out + (segment.row_begin + query.first + r / group) * shape.q_size() +
                (kv_head * group + r % group) * d;
    for (int64_t p = 0; p < column_panels; ++p) {
      const int64_t width = std::min(kPanel, d - p * kPanel);
      std::memcpy(to + p * kPanel, result + (p * rows + r) * kPanel,
                  static_cast<size_t>(width) * sizeof(float));
    }
  }
}

}  // namespace

void kv_write(const AttentionShape& shape, const float* qkv, std::span<const KvWrite> writes,
              const KvView& kv, ThreadTeam& team) {
  const int64_t d = shape.head_dim;
  const auto write = [&](int64_t item, int) {
    const KvWrite& to = writes[static_cast<size_t>(item)];
    const float* row = qkv + to.row * shape.qkv_size() + shape.q_size();
    for (int64_t head = 0; head < shape.num_kv_heads; ++head) {
      float* keys = kv.keys(to.block, head) + to.slot;
      for (int64_t i = 0; i < d; ++i) keys[i * kKvBlock] = row[head * d + i];
      std::memcpy(kv.values(to.block, head) + to.slot * d, row + (shape.num_kv_heads + head) * d,
                  static_cast<size_t>(d) * sizeof(float));
    }
  };
  const int64_t count = static_cast<int64_t>(writes.size());
  // A row is about a microsecond; below this the team costs more than it brings.
  if (count < 32) {
    for (int64_t i = 0; i < count; ++i) write(i, 0);
  } else {
    team.run(count, write);
  }
}

void attention(const AttentionShape& shape, const float* qkv, std::span<const Segment> segments,
               const KvView& kv, float* out, ThreadTeam& team) {
  const int64_t tokens = std::max<int64_t>(1, kQueryRows / shape.group());
  std::vector<QueryTile> tiles;
  for (size_t s = 0; s < segments.size(); ++s) {
    for (int64_t first = 0; first < segments[s].row_count; first += tokens) {
      tiles.push_back(
          {static_cast<int64_t>(s), first, std::min(tokens, segments[s].row_count - first)});
    }
  }
  const int64_t heads = shape.num_kv_heads;
  team.run(static_cast<int64_t>(tiles.size()) * heads, [&](int64_t item, int) {
    const QueryTile& tile = tiles[static_cast<size_t>(item / heads)];
    attend(shape, qkv, segments[static_cast<size_t>(tile.segment)], tile, item % heads, kv, out);
  });
}

void attention_backward(const AttentionShape& shape, const float* qkv, const float* out,
                        const float* dout, std::span<const SegmentRows> segments, float* dqkv,
                        ThreadTeam& team) {
  const cpu::Kernels& k = cpu::kernels();
  const int64_t d = shape.head_dim, group = shape.group(), width = shape.qkv_size();
  team.run(shape.num_kv_heads, [&](int64_t kv_head, int) {
    const int64_t k_offset = shape.q_size() + kv_head * d;
    const int64_t v_offset = k_offset + shape.num_kv_heads * d;
    Workspace& own = workspace();
    for (const SegmentRows& segment : segments) {
      const int64_t keys = segment.position + segment.row_count;
      float* gathered = own.gathered.reserve(4 * keys * d);
      float* key = gathered;
      float* value = gathered + keys * d;
      float* dkey = gathered + 2 * keys * d;
      float* dvalue = gathered + 3 * keys * d;
      for (int64_t j = 0; j < keys; ++j) {
        const float* row = qkv + segment.key_rows[static_cast<size_t>(j)] * width;
        std::memcpy(key + j * d, row + k_offset, static_cast<size_t>(d) * sizeof(float));
        std::memcpy(value + j * d, row + v_offset, static_cast<size_t>(d) * sizeof(float));
      }
      std::fill(dkey, dkey + 2 * keys * d, 0.0f);
      float* probs = own.scores.reserve(2 * (keys + kPanel));
      float* dprobs = probs + keys + kPanel;
      for (int64_t t = 0; t < segment.row_count; ++t) {
        const int64_t row = segment.row_begin + t, position = segment.position + t;
        const int64_t first = first_visible(shape, position);
        for (int64_t g = 0; g < group; ++g) {
          const int64_t head = kv_head * group + g;
          const float* q = qkv + row * width + head * d;
          float* dq = dqkv + row * width + head * d;
          const float* o = out + row * shape.q_size() + head * d;
          const float* go = dout + row * shape.q_size() + head * d;
          for (int64_t j = first; j <= position; ++j) probs[j] = k.dot(q, key + j * d, d);
          float max = 0.0f, sum = 0.0f;
          k.softmax_row(probs + first, 0, position + 1 - first, shape.scale, &max, &sum);
          const float inverse = 1.0f / sum;
          const float delta = k.dot(o, go, d);
          for (int64_t j = first; j <= position; ++j) {
            const float p = probs[j] * inverse;
            dprobs[j] = p * (k.dot(go, value + j * d, d) - delta) * shape.scale;
            probs[j] = p;
          }
          for (int64_t j = first; j <= position; ++j) {
            k.axpy(dprobs[j], key + j * d, d, dq);
            k.axpy(dprobs[j], q, d, dkey + j * d);
            k.axpy(probs[j], go, d, dvalue + j * d);
          }
        }
      }
      for (int64_t j = 0; j < keys; ++j) {
        float* row = dqkv + segment.key_rows[static_cast<size_t>(j)] * width;
        k.axpy(1.0f, dkey + j * d, d, row + k_offset);
        k.axpy(1.0f, dvalue + j * d, d, row + v_offset);
      }
    }
  });
}

}  // namespace alignpro::ops
