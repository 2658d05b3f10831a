#include "alignpro/ops/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "alignpro/core/aligned.h"
#include "alignpro/core/error.h"
#include "alignpro/ops/cpu/kernels.h"

namespace alignpro::ops {
namespace {

using cpu::kGemvPanels;
using cpu::kGemvRows;
using cpu::kPanel;
using cpu::kRowTile;
static_assert(kKvBlock == kPanel, "a block of keys is one panel of the matrix product");

constexpr int64_t kChunkBlocks = kKvChunk / kKvBlock;
constexpr float kInf = std::numeric_limits<float>::infinity();

struct Workspace {
  AlignedBuffer queries;  // packed [head_dim][6] tiles
  AlignedBuffer block;    // [rows][16] scores
  AlignedBuffer floats;   // K or V of kGemvPanels blocks, and slack, where stored as halves
  AlignedBuffer scores;   // [rows][kKvChunk]
  AlignedBuffer packed;   // packed probabilities of one block
  AlignedBuffer chunk;    // one chunk's result
  AlignedBuffer merged;   // of the chunks so far
  AlignedBuffer partial;  // results of chunks computed apart; the calling thread's
};

Workspace& workspace() {
  thread_local Workspace instance;
  return instance;
}

// What some chunks say about a tile's query rows: softmax by its maximum and the sum below it, and
// the output under that softmax. A row that sees none of the keys has a sum of 0.
struct Result {
  float* max;  // [rows]
  float* sum;  // [rows]
  float* out;  // [column panels][rows][16]

  Result(float* at, int64_t rows) : max(at), sum(at + rows), out(at + 2 * rows) {}
};

// One call, as every item of it sees it. Row (token t of the tile, head g of the group) is
// t * group + g.
struct Pass {
  const AttentionShape& shape;
  const float* qkv;
  const KvView& kv;
  float* out;

  int64_t rows(const AttentionPlan::Tile& tile) const {
    return static_cast<int64_t>(tile.tokens.size()) * shape.group();
  }
  int64_t panels() const { return (shape.head_dim + kPanel - 1) / kPanel; }

  // K or V of one block as floats; valid until the next call for the same slot on this thread.
  const float* floats(const std::byte* stored, int64_t slot = 0) const {
    if (kv.dtype == DType::kF32) return reinterpret_cast<const float*>(stored);
    const int64_t count = shape.head_dim * kKvBlock;
    float* to =
        workspace().floats.reserve(kGemvPanels * (count + kPanel)) + slot * (count + kPanel);
    cpu::kernels().from_halves(reinterpret_cast<const uint16_t*>(stored), count, to);
    std::fill_n(to + count, kPanel, 0.0f);
    return to;
  }
  // Blocks lie far apart: no hardware prefetcher finds the next one.
  void fetch(const std::byte* stored) const {
    const int64_t bytes = shape.head_dim * kKvBlock * block_bytes(kv.dtype);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(stored + i, 0, 2);
  }
};

const float* pack_queries(const Pass& pass, const AttentionPlan::Tile& tile, int64_t kv_head) {
  const int64_t d = pass.shape.head_dim, group = pass.shape.group(), rows = pass.rows(tile);
  const int64_t padded = (rows + kRowTile - 1) / kRowTile * kRowTile;
  float* queries = workspace().queries.reserve(padded * d);
  for (int64_t r = 0; r < padded; ++r) {
    float* to = queries + r / kRowTile * kRowTile * d + r % kRowTile;
    if (r >= rows) {
      for (int64_t i = 0; i < d; ++i) to[i * kRowTile] = 0.0f;
      continue;
    }
    const int64_t row = tile.tokens[static_cast<size_t>(r / group)].row;
    const float* q = pass.qkv + row * pass.shape.qkv_size() + (kv_head * group + r % group) * d;
    for (int64_t i = 0; i < d; ++i) to[i * kRowTile] = q[i];
  }
  return queries;
}

// c [rows][16] = rows [first, first + rows) of packed tiles, which need not begin one, times b.
void gemm_rows(int64_t first, int64_t rows, int64_t k_count, const float* packed, const float* b,
               float* c) {
  while (rows > 0) {
    const int64_t within = first % kRowTile;
    const int64_t some = within == 0 ? rows : std::min(rows, kRowTile - within);
    cpu::kernels().gemm_panel(some, k_count, packed + (first - within) * k_count + within,
                              k_count * kRowTile, b, kPanel, c, false, false);
    first += some;
    rows -= some;
    c += some * kPanel;
  }
}

// What a run reads of blocks [begin, end), and for which of its tile's rows.
struct Reach {
  int64_t row, rows;
  int64_t begin, end;  // blocks
  bool is_gemv;        // few rows, in one packed tile

  Reach(const AttentionPlan::Run& run, int64_t group, int64_t begin_block, int64_t end_block)
      : row(run.token_begin * group),
        rows(run.token_end * group - row),
        begin(std::max(begin_block, run.first_block)),
        end(std::min(end_block, run.end_block)),
        is_gemv(rows <= kGemvRows && row % kRowTile + rows <= kRowTile) {}

  // Its first row among packed tiles of k_count columns.
  const float* first_of(const float* tiles, int64_t k_count) const {
    return tiles + row / kRowTile * kRowTile * k_count + row % kRowTile;
  }
};

// The keys of one chunk, for all rows of a tile. Masked probabilities are exactly 0, so that what
// other rows of the tile see adds nothing.
void attend_chunk(const Pass& pass, const AttentionPlan::Tile& tile, int64_t kv_head, int64_t chunk,
                  const float* queries, const Result& to) {
  const cpu::Kernels& k = cpu::kernels();
  const int64_t d = pass.shape.head_dim, group = pass.shape.group(), rows = pass.rows(tile);
  const int64_t begin = std::max(tile.first_block, chunk * kChunkBlocks);
  const int64_t end = std::min(tile.end_block, (chunk + 1) * kChunkBlocks);
  const int64_t first_key = begin * kKvBlock, width = (end - begin) * kKvBlock;
  const int64_t panels = pass.panels();
  Workspace& own = workspace();
  float* block = own.block.reserve(rows * kPanel);
  float* scores = own.scores.reserve(rows * kKvChunk);
  float* packed = own.packed.reserve((rows + kRowTile) * kKvBlock);
  for (const AttentionPlan::Run& run : tile.runs) {
    const Reach reach(run, group, begin, end);
    const auto stored = [&](int64_t at) {
      return pass.kv.keys<std::byte>(run.blocks[at], kv_head);
    };
    for (int64_t b = reach.begin; b < reach.end;) {
      const int64_t some = reach.is_gemv ? std::min(kGemvPanels, reach.end - b) : 1;
      for (int64_t next = b + some; next < std::min(run.end_block, b + 2 * some); ++next) {
        pass.fetch(stored(next));
      }
      float* row = scores + reach.row * kKvChunk + (b - begin) * kKvBlock;
      if (reach.is_gemv) {
        const float* keys[kGemvPanels];
        for (int64_t i = 0; i < some; ++i) keys[i] = pass.floats(stored(b + i), i);
        k.gemv(reach.rows, d, reach.first_of(queries, d), keys, some, kPanel, row, kKvChunk, kPanel,
               false);
      } else {
        gemm_rows(reach.row, reach.rows, d, queries, pass.floats(stored(b)), block);
        for (int64_t r = 0; r < reach.rows; ++r) {
          std::memcpy(row + r * kKvChunk, block + r * kPanel, kPanel * sizeof(float));
        }
      }
      b += some;
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t position = tile.tokens[static_cast<size_t>(r / group)].position;
    const int64_t visible = std::max<int64_t>(0, pass.shape.first_visible(position) - first_key);
    const int64_t live = std::min(width, position + 1 - first_key);
    float* row = scores + r * kKvChunk;
    if (live <= visible) {
      std::fill_n(row, width, 0.0f);
      to.max[r] = -kInf;
      to.sum[r] = 0.0f;
      continue;
    }
    k.softmax_row(row, visible, live, pass.shape.scale, to.max + r, to.sum + r);
    const int64_t padded = (live + kPanel - 1) / kPanel * kPanel;
    std::fill(row + padded, row + width, 0.0f);
    // A sum of 0 is scores of -inf alone.
    const float inverse = to.sum[r] == 0.0f ? 0.0f : 1.0f / to.sum[r];
    for (int64_t j = 0; j < padded; ++j) row[j] *= inverse;
  }
  std::fill_n(to.out, panels * rows * kPanel, 0.0f);
  for (const AttentionPlan::Run& run : tile.runs) {
    const Reach reach(run, group, begin, end);
    const auto stored = [&](int64_t at) {
      return pass.kv.values<std::byte>(run.blocks[at], kv_head);
    };
    float* out = to.out + reach.row * kPanel;
    for (int64_t b = reach.begin; b < reach.end; ++b) {
      // Slots from key_end on were never written for these sequences: they are not read.
      const int64_t live = std::min(kKvBlock, run.key_end - b * kKvBlock);
      k.pack_rows(reach.rows, live, scores + reach.row * kKvChunk + (b - begin) * kKvBlock,
                  kKvChunk, 1, packed);
      if (b + 1 < run.end_block) pass.fetch(stored(b + 1));
      const float* values = pass.floats(stored(b));
      // A head_dim that is no multiple of 16 reads into the next row (the pool ends in slack);
      // those lanes are dropped when the row is stored.
      for (int64_t p = 0; p < panels;) {
        const int64_t some = reach.is_gemv ? std::min(kGemvPanels, panels - p) : 1;
        if (reach.is_gemv) {
          const float* columns[kGemvPanels];
          for (int64_t i = 0; i < some; ++i) columns[i] = values + (p + i) * kPanel;
          k.gemv(reach.rows, live, packed, columns, some, d, out + p * rows * kPanel, kPanel,
                 rows * kPanel, true);
        } else {
          k.gemm_panel(reach.rows, live, packed, live * kRowTile, values + p * kPanel, d,
                       out + p * rows * kPanel, true, false);
        }
        p += some;
      }
    }
  }
}

// Adds a later chunk to what the earlier ones gave, row by row.
void merge(int64_t rows, int64_t panels, const Result& next, const Result& to) {
  for (int64_t r = 0; r < rows; ++r) {
    if (next.sum[r] == 0.0f) continue;
    const auto [max, sum, keep, add] = join_softmax(to.max[r], to.sum[r], next.max[r], next.sum[r]);
    to.max[r] = max;
    to.sum[r] = sum;
    for (int64_t p = 0; p < panels; ++p) {
      float* out = to.out + (p * rows + r) * kPanel;
      const float* from = next.out + (p * rows + r) * kPanel;
      for (int64_t i = 0; i < kPanel; ++i) out[i] = keep * out[i] + add * from[i];
    }
  }
}

Result no_chunk(float* at, int64_t rows, int64_t panels) {
  const Result result(at, rows);
  std::fill_n(result.max, rows, -kInf);
  std::fill_n(result.sum, rows, 0.0f);
  std::fill_n(result.out, panels * rows * kPanel, 0.0f);
  return result;
}

void store(const Pass& pass, const AttentionPlan::Tile& tile, int64_t kv_head,
           const Result& result) {
  const int64_t d = pass.shape.head_dim, group = pass.shape.group(), rows = pass.rows(tile);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = tile.tokens[static_cast<size_t>(r / group)].row;
    float* to = pass.out + row * pass.shape.q_size() + (kv_head * group + r % group) * d;
    if (result.sum[r] == 0.0f) {  // no key scores above -inf: there is no softmax
      std::fill_n(to, d, std::numeric_limits<float>::quiet_NaN());
      continue;
    }
    for (int64_t p = 0; p < pass.panels(); ++p) {
      std::memcpy(to + p * kPanel, result.out + (p * rows + r) * kPanel,
                  static_cast<size_t>(std::min(kPanel, d - p * kPanel)) * sizeof(float));
    }
  }
}

void attend(const Pass& pass, const AttentionPlan::Tile& tile, int64_t kv_head) {
  const int64_t rows = pass.rows(tile), panels = pass.panels();
  const int64_t floats = attention_partial_floats(rows, pass.shape.head_dim);
  const float* queries = pack_queries(pass, tile, kv_head);
  const Result one(workspace().chunk.reserve(floats), rows);
  const int64_t first = tile.first_chunk(), end = tile.end_chunk();
  attend_chunk(pass, tile, kv_head, first, queries, one);
  if (end == first + 1) return store(pass, tile, kv_head, one);
  const Result all = no_chunk(workspace().merged.reserve(floats), rows, panels);
  merge(rows, panels, one, all);
  for (int64_t chunk = first + 1; chunk < end; ++chunk) {
    attend_chunk(pass, tile, kv_head, chunk, queries, one);
    merge(rows, panels, one, all);
  }
  store(pass, tile, kv_head, all);
}

template <typename T>
void write_row(const AttentionShape& shape, const T* row, const KvWrite& to, const KvView& kv) {
  const int64_t d = shape.head_dim;
  for (int64_t head = 0; head < shape.num_kv_heads; ++head) {
    T* keys = kv.keys<T>(to.block, head) + to.slot;
    for (int64_t i = 0; i < d; ++i) keys[i * kKvBlock] = row[head * d + i];
    std::memcpy(kv.values<T>(to.block, head) + to.slot * d, row + (shape.num_kv_heads + head) * d,
                static_cast<size_t>(d) * sizeof(T));
  }
}

[[noreturn]] void refuse_for_halves(const float* row, int64_t width) {
  const float* bad = std::find_if(row, row + width, [](float x) {
    return std::isfinite(x) && std::isinf(half_to_float(float_to_half(x)));
  });
  throw NumericError(cat("kv_dtype float16: expected keys and values of at most 65504, got ", *bad,
                         "; load the model with kv_dtype float32"));
}

}  // namespace

int64_t attention_partial_floats(int64_t rows, int64_t head_dim) {
  return rows * (2 + (head_dim + kPanel - 1) / kPanel * kPanel);
}

void kv_write(const AttentionShape& shape, const float* qkv, std::span<const KvWrite> writes,
              const KvView& kv, ThreadPool& pool) {
  const int64_t width = 2 * shape.num_kv_heads * shape.head_dim;
  const auto write = [&](int64_t item, int) {
    const KvWrite& to = writes[static_cast<size_t>(item)];
    const float* row = qkv + to.row * shape.qkv_size() + shape.q_size();
    if (kv.dtype == DType::kF32) return write_row(shape, row, to, kv);
    auto* halves = reinterpret_cast<uint16_t*>(workspace().floats.reserve((width + 1) / 2));
    if (!cpu::kernels().to_halves(row, width, halves)) refuse_for_halves(row, width);
    write_row(shape, halves, to, kv);
  };
  const int64_t count = static_cast<int64_t>(writes.size());
  // A row is about two microseconds; below this the pool costs more than it brings.
  if (count < 8) {
    for (int64_t i = 0; i < count; ++i) write(i, 0);
  } else {
    pool.run(count, write);
  }
}

void attention(const AttentionShape& shape, const float* qkv, const AttentionPlan& plan,
               const KvView& kv, float* out, ThreadPool& pool) {
  const Pass pass{shape, qkv, kv, out};
  float* partial = workspace().partial.reserve(plan.partial_floats);
  pool.run(static_cast<int64_t>(plan.items.size()), [&](int64_t index, int) {
    const AttentionPlan::Item& item = plan.items[static_cast<size_t>(index)];
    if (item.chunk < 0) return attend(pass, *item.tile, item.kv_head);
    attend_chunk(pass, *item.tile, item.kv_head, item.chunk,
                 pack_queries(pass, *item.tile, item.kv_head),
                 Result(partial + item.partial, pass.rows(*item.tile)));
  });
  if (plan.merges.empty()) return;
  pool.run(static_cast<int64_t>(plan.merges.size()), [&](int64_t index, int) {
    const AttentionPlan::Merge& split = plan.merges[static_cast<size_t>(index)];
    const int64_t rows = pass.rows(*split.tile), panels = pass.panels();
    const int64_t floats = attention_partial_floats(rows, shape.head_dim);
    const Result all = no_chunk(workspace().merged.reserve(floats), rows, panels);
    const int64_t chunks = split.tile->end_chunk() - split.tile->first_chunk();
    for (int64_t c = 0; c < chunks; ++c) {
      merge(rows, panels, Result(partial + split.partial + c * floats, rows), all);
    }
    store(pass, *split.tile, split.kv_head, all);
  });
}

}  // namespace alignpro::ops
