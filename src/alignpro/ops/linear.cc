// Matrix products. One driver packs the left operand, walks panels of 16 columns in parallel and
// asks a provider for sub-panels of the right operand; every row block uses a sub-panel while it is
// in L1.
//
// Every output is the sum, in ascending order, of per-block partial sums over kContract terms, each
// run from zero in ascending k, and a low-rank term is one more block. Neither the row count, the
// blocking over rows nor the pool's size enters, so a row's bits are its own (contract 2). The
// two-level sum is also the more accurate one: 1536 terms err like 192 + 8.

#include "alignpro/ops/linear.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>

#include "alignpro/core/error.h"
#include "alignpro/ops/int8_rows.h"
#include "alignpro/ops/packed_rows.h"

namespace alignpro::ops {
namespace {

using cpu::kContract;
using cpu::kPanel;
using cpu::kRowTile;

// Panels of a few rows that an item takes at least: what a kernel multiplies side by side.
constexpr int64_t kRowPanels = 4;

struct Workspace {
  AlignedBuffer tile;
  AlignedBuffer panel;
  AlignedBuffer wide;  // panels expanded on their way to be transposed
};

Workspace& workspace() {
  thread_local Workspace instance;
  return instance;
}

// Blocks small enough that every worker gets one, where there are rows for more than a few tiles.
int64_t block_size(int64_t rows, int threads) {
  const int64_t share = (rows + threads - 1) / threads;
  return std::clamp((share + kRowTile - 1) / kRowTile * kRowTile, 4 * kRowTile, kRowBlock);
}

// tile [block rows][16] (+)= the rows of a block times [k][16] over contraction indices
// [begin, end), which lie in one contraction block of `left`.
void multiply_range(const PackedRows& left, int64_t block, int64_t begin, int64_t end,
                    const float* right, float* tile, bool accumulate, bool stream = false) {
  const int64_t k_begin = begin / kContract * kContract;
  cpu::kernels().gemm_panel(left.block_rows(block), end - begin,
                            left.at(block, k_begin) + (begin - k_begin) * kRowTile,
                            left.tile_stride(k_begin), right, kPanel, tile, accumulate, stream);
}

// Calls fn(begin, end) for the parts of [begin, end) in each contraction block.
template <typename Fn>
void for_contraction(int64_t begin, int64_t end, const Fn& fn) {
  while (begin < end) {
    const int64_t stop = std::min(end, (begin / kContract + 1) * kContract);
    fn(begin, stop);
    begin = stop;
  }
}

// What follows the main sum: nothing, or a low-rank term.
struct NoTerm {
  std::span<const int64_t> cuts(int64_t, int64_t) { return {}; }
  void prepare(int64_t, const PackedRows&, ThreadPool&) {}
  void add(int64_t, int64_t, float*) const {}
};

// A provider's block(column panel, k_begin, k_count, scratch) is [k_count][16]; one that has
// rows() computes as many as it streams() without packing. Without c only the term's preparation is
// done.
template <typename Provider, typename Term>
void multiply(int64_t rows, int64_t columns, int64_t contract, MatrixView a, float* c, int64_t ldc,
              const Epilogue& epilogue, ThreadPool& pool, const Provider& provider, Term& term) {
  if (rows == 0 || columns == 0) return;
  const cpu::Kernels& k = cpu::kernels();
  const int64_t panels = (columns + kPanel - 1) / kPanel;
  thread_local PackedRows own_packed;
  PackedRows& packed = own_packed;  // workers must see this thread's instance, not their own
  constexpr bool kHasTerm = !std::is_same_v<Term, NoTerm>;
  constexpr bool kStreams = requires { provider.rows(0, 0, rows, a, c); };
  constexpr bool kHasInt8 = requires { provider.codes(); };
  Int8Rows* codes = nullptr;
  if constexpr (kHasInt8) codes = provider.codes();
  bool few = false;
  if constexpr (kStreams) few = a.col_stride == 1 && provider.streams(rows);
  for (int64_t first = 0; first < rows; first += kRowChunk) {
    const int64_t live = std::min(kRowChunk, rows - first);
    const MatrixView chunk{a.data + first * a.row_stride, a.row_stride, a.col_stride};
    if (codes != nullptr) codes->pack(live, contract, chunk, &pool);
    if ((!few && codes == nullptr) || kHasTerm) {
      packed.pack(live, contract, chunk, block_size(live, pool.size()), &pool,
                  term.cuts(first, live));
      term.prepare(first, packed, pool);
    }
    if (c == nullptr) continue;
    int64_t group = std::max<int64_t>(1, panels / (8 * pool.size()));
    if (few) group = (group + kRowPanels - 1) / kRowPanels * kRowPanels;
    pool.run((panels + group - 1) / group, [&](int64_t item, int) {
      Workspace& own = workspace();
      const int64_t p_begin = item * group, p_end = std::min(panels, p_begin + group);
      float* tiles = own.tile.reserve((few ? group : 1) * live * kPanel);
      float* scratch = own.panel.reserve(kContract * kPanel);
      if constexpr (kStreams) {
        if (few && codes == nullptr) provider.rows(p_begin, p_end - p_begin, live, chunk, tiles);
      }
      for (int64_t p = p_begin; p < p_end; ++p) {
        if constexpr (kHasInt8) {
          if (codes != nullptr) {
            provider.w.int8_gemm(p, live, codes->at(0), codes->stride(), tiles);
          }
        }
        const bool blocks = !few && codes == nullptr;
        for (int64_t k_begin = 0; blocks && k_begin < contract; k_begin += kContract) {
          const int64_t k_end = std::min(contract, k_begin + kContract);
          const float* b = provider.block(p, k_begin, k_end - k_begin, scratch);
          for (int64_t block = 0; block < packed.blocks(); ++block) {
            multiply_range(packed, block, k_begin, k_end, b,
                           tiles + packed.block_row(block) * kPanel, k_begin > 0, b != scratch);
          }
        }
        if constexpr (kHasTerm) {
          for (int64_t block = 0; block < packed.blocks(); ++block) {
            term.add(p, block, tiles + packed.block_row(block) * kPanel);
          }
        }
        const int64_t column = p * kPanel, at = first * ldc + column;
        k.store_tile(tiles, live, std::min(kPanel, columns - column), epilogue.scale,
                     epilogue.bias != nullptr ? epilogue.bias + column : nullptr,
                     epilogue.residual != nullptr ? epilogue.residual + at : nullptr, c + at, ldc);
        if (few) tiles += live * kPanel;
      }
    });
  }
}

// lora_down = scale x A^T by row block, kept for the caller and packed as a left operand for B.
class ForwardTerm {
 public:
  explicit ForwardTerm(std::span<const LowRankRows> updates) : updates_(updates) {}

  std::span<const int64_t> cuts(int64_t first, int64_t live) {
    cuts_.clear();
    for (const LowRankRows& u : updates_) {
      for (const int64_t row : {u.row_begin, u.row_end}) {
        if (row > first && row < first + live) cuts_.push_back(row - first);
      }
    }
    return cuts_;
  }

  void prepare(int64_t first, const PackedRows& x, ThreadPool& pool) {
    low_.resize(static_cast<size_t>(x.blocks()));
    active_.assign(static_cast<size_t>(x.blocks()), nullptr);
    for (int64_t block = 0; block < x.blocks(); ++block) {
      for (const LowRankRows& u : updates_) {
        const int64_t row = first + x.block_row(block);
        if (row >= u.row_begin && row < u.row_end) active_[static_cast<size_t>(block)] = &u;
      }
    }
    pool.run(x.blocks(), [&](int64_t block, int) {
      const LowRankRows* u = active_[static_cast<size_t>(block)];
      if (u == nullptr) return;
      const PackedMatrix& a = u->update->a;
      const int64_t rows = x.block_rows(block), ranks = a.rows();
      float* low = u->lora_down + (first + x.block_row(block) - u->row_begin) * ranks;
      float* tile = workspace().tile.reserve(rows * kPanel);
      for (int64_t p = 0; p < a.panels(); ++p) {
        for_contraction(0, a.cols(), [&](int64_t begin, int64_t end) {
          multiply_range(x, block, begin, end, a.block(p, begin, end - begin, nullptr), tile,
                         begin > 0);
        });
        cpu::kernels().store_tile(tile, rows, std::min(kPanel, ranks - p * kPanel),
                                  u->update->scale, nullptr, nullptr, low + p * kPanel, ranks);
      }
      low_[static_cast<size_t>(block)].pack(rows, ranks, {low, ranks, 1}, kRowBlock, nullptr);
    });
  }

  void add(int64_t panel, int64_t block, float* tile) const {
    const LowRankRows* u = active_[static_cast<size_t>(block)];
    if (u == nullptr) return;
    const auto [begin, end] = u->update->ranks_of_outputs[static_cast<size_t>(panel)];
    for_contraction(begin, end, [&](int64_t from, int64_t to) {
      multiply_range(low_[static_cast<size_t>(block)], 0, from, to,
                     u->update->b.block(panel, from, to - from, nullptr), tile, true);
    });
  }

 private:
  std::span<const LowRankRows> updates_;
  std::vector<int64_t> cuts_;
  std::vector<PackedRows> low_;             // by block
  std::vector<const LowRankRows*> active_;  // by block
};

// d_lora_down = scale dy B by row block, kept for the caller and packed as a left operand for A.
class BackwardTerm {
 public:
  BackwardTerm(const LowRank& update, float* d_lora_down)
      : update_(update), d_lora_down_(d_lora_down) {}

  std::span<const int64_t> cuts(int64_t, int64_t) { return {}; }

  void prepare(int64_t first, const PackedRows& dy, ThreadPool& pool) {
    low_.resize(static_cast<size_t>(dy.blocks()));
    const PackedMatrix& b = update_.b;
    const int64_t ranks = update_.ranks();
    pool.run(dy.blocks(), [&](int64_t block, int) {
      const cpu::Kernels& k = cpu::kernels();
      const int64_t rows = dy.block_rows(block);
      float* low = d_lora_down_ + (first + dy.block_row(block)) * ranks;
      float* tile = workspace().tile.reserve(rows * kPanel);
      float* scratch = workspace().panel.reserve(kContract * kPanel);
      for (int64_t p = 0; p < update_.a.panels(); ++p) {
        // Whole panels of outputs: B is zero beyond the module's own.
        auto [begin, end] = update_.outputs_of_ranks[static_cast<size_t>(p)];
        begin = begin / kPanel * kPanel;
        const int64_t start = begin;
        for_contraction(begin, end, [&](int64_t from, int64_t to) {
          b.transposed_block(from, to - from, p * kPanel, nullptr, scratch);
          multiply_range(dy, block, from, to, scratch, tile, from > start);
        });
        k.store_tile(tile, rows, std::min(kPanel, ranks - p * kPanel), update_.scale, nullptr,
                     nullptr, low + p * kPanel, ranks);
      }
      low_[static_cast<size_t>(block)].pack(rows, ranks, {low, ranks, 1}, kRowBlock, nullptr);
    });
  }

  void add(int64_t panel, int64_t block, float* tile) const {
    float* scratch = workspace().panel.reserve(kContract * kPanel);
    for_contraction(0, update_.ranks(), [&](int64_t from, int64_t to) {
      update_.a.transposed_block(from, to - from, panel * kPanel, nullptr, scratch);
      multiply_range(low_[static_cast<size_t>(block)], 0, from, to, scratch, tile, true);
    });
  }

 private:
  const LowRank& update_;
  float* d_lora_down_;
  std::vector<PackedRows> low_;  // by block
};

struct ForwardWeight {
  const PackedMatrix& w;

  const float* block(int64_t p, int64_t k_begin, int64_t k_count, float* scratch) const {
    return w.block(p, k_begin, k_count, scratch);
  }
  bool streams(int64_t rows) const { return w.streams(rows); }
  void rows(int64_t p_begin, int64_t count, int64_t live, MatrixView x, float* out) const {
    w.multiply_rows(p_begin, count, live, x.data, x.row_stride, out);
  }
  // Where the rows are to be quantised, the calling thread's buffer for them.
  Int8Rows* codes() const {
    thread_local Int8Rows own;
    return w.arithmetic() == Arithmetic::kInt8 ? &own : nullptr;
  }
};

// The contraction runs over W's rows: kContract is a multiple of kPanel, so a block starts at a
// panel.
struct TransposedWeight {
  const PackedMatrix& w;

  const float* block(int64_t p, int64_t n_begin, int64_t n_count, float* scratch) const {
    static_assert(kContract % kPanel == 0);
    float* wide = w.is_float32() ? nullptr : workspace().wide.reserve(kContract * kPanel);
    w.transposed_block(n_begin, n_count, p * kPanel, wide, scratch);
    return scratch;
  }
};

struct PlainRight {
  const float* b;
  int64_t ldb, columns;

  const float* block(int64_t p, int64_t k_begin, int64_t k_count, float* scratch) const {
    const int64_t width = std::min(kPanel, columns - p * kPanel);
    for (int64_t i = 0; i < k_count; ++i) {
      const float* from = b + (k_begin + i) * ldb + p * kPanel;
      float* to = scratch + i * kPanel;
      if (width == kPanel) {
        std::memcpy(to, from, kPanel * sizeof(float));
      } else {
        for (int64_t j = 0; j < kPanel; ++j) to[j] = j < width ? from[j] : 0.0f;
      }
    }
    return scratch;
  }
};

}  // namespace

LowRank LowRank::pack(const LoraStack& m) {
  const auto panels = [](int64_t rows) {
    return static_cast<size_t>((rows + kPanel - 1) / kPanel);
  };
  const auto widen = [](std::pair<int64_t, int64_t>& range, int64_t begin, int64_t end) {
    range = {std::min(range.first, begin), std::max(range.second, end)};
  };
  LowRank update;
  update.ranks_of_outputs.assign(panels(m.outputs), {m.ranks, 0});
  update.outputs_of_ranks.assign(panels(m.ranks), {m.outputs, 0});
  for (const LoraStack::Module& module : m.modules) {
    const int64_t out_end = module.out_begin + module.outputs;
    const int64_t rank_end = module.rank_begin + module.rank;
    for (int64_t p = module.out_begin / kPanel; p * kPanel < out_end; ++p) {
      widen(update.ranks_of_outputs[static_cast<size_t>(p)], module.rank_begin, rank_end);
    }
    for (int64_t p = module.rank_begin / kPanel; p * kPanel < rank_end; ++p) {
      widen(update.outputs_of_ranks[static_cast<size_t>(p)], module.out_begin, out_end);
    }
  }
  update.a = PackedMatrix::pack(m.ranks, m.inputs, m.a.data());
  update.b = PackedMatrix::pack(m.outputs, m.ranks, m.b.data());
  update.scale = m.scale;
  update.modules = m.modules;
  return update;
}

void linear(int64_t rows, MatrixView x, const PackedMatrix& w, float* y, int64_t ldy,
            const Epilogue& epilogue, ThreadPool& pool, std::span<const LowRankRows> updates) {
  const ForwardWeight weight{w};
  if (updates.empty()) {
    NoTerm none;
    multiply(rows, w.rows(), w.cols(), x, y, ldy, epilogue, pool, weight, none);
  } else {
    ForwardTerm term(updates);
    multiply(rows, w.rows(), w.cols(), x, y, ldy, epilogue, pool, weight, term);
  }
}

void linear_backward(int64_t rows, MatrixView dy, const PackedMatrix& w, float* dx, int64_t ldx,
                     const Epilogue& epilogue, ThreadPool& pool, const LowRank* update,
                     float* d_lora_down) {
  require(w.arithmetic() == Arithmetic::kFloat32,
          "gradients: expected a model loaded with compute float32, got int8");
  const TransposedWeight weight{w};
  if (update == nullptr) {
    NoTerm none;
    multiply(rows, w.cols(), w.rows(), dy, dx, ldx, epilogue, pool, weight, none);
  } else {
    BackwardTerm term(*update, d_lora_down);
    multiply(rows, w.cols(), w.rows(), dy, dx, ldx, epilogue, pool, weight, term);
  }
}

void matmul(int64_t m, int64_t n, int64_t k, MatrixView a, const float* b, int64_t ldb, float* c,
            int64_t ldc, const Epilogue& epilogue, ThreadPool& pool) {
  NoTerm none;
  multiply(m, n, k, a, c, ldc, epilogue, pool, PlainRight{b, ldb, n}, none);
}

}  // namespace alignpro::ops
