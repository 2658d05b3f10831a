// Two orders of work, one definition of every number. Long because values, Jacobian and backward
// are the same two sweeps over the vocabulary with other ends.
//
// Values alone run tile by tile, workers sharing tiles: each tile of W is read once for up to
// kChunkRows rows. With a Jacobian, and in the backward by the hidden states, workers own groups of
// rows and walk the tiles in order, so that sums over the vocabulary have one order.
//
// The Jacobian is attention over the vocabulary: with e = exp(z - running maximum), sum e W and
// sum e (z - z_ref) W are kept unnormalised and rescaled when a tile raises the maximum. Then
//   d logprob / dh = (W_a - E_p[W]) / temperature
//   d KL / dh      = E_p[(d - E_p[d]) W] / temperature,  d = z - z_ref,
// four products a row against five when the backward computes z and z_ref again. d is measured from
// the first tile's maxima, so that a common offset of either side's logits cancels before the sums.

#include "alignpro/ops/linear_logprob.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "alignpro/core/error.h"
#include "alignpro/ops/row_parallel.h"
#include "alignpro/ops/vocabulary.h"
#include "alignpro/ops/weight_tiles.h"

namespace alignpro::ops {
namespace {

using cpu::kPanel;
using cpu::kRowTile;

// Rows that share one reading of W when only values are wanted.
constexpr int64_t kChunkRows = 3 * kRowBlock;

struct Workspace {
  WeightTile weight, ref_weight;
  LogitRows rows, ref_rows;
  AlignedBuffer logits, ref_logits;    // [panels][rows][16] a block
  AlignedBuffer operand, ref_operand;  // the same as left operands of a product with W
  AlignedBuffer result, ref_result;    // [column panels][rows][16]
  AlignedBuffer columns;
  std::vector<TileStats> stats;
};

Workspace& workspace() {
  thread_local Workspace instance;
  return instance;
}

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

struct Problem {
  explicit Problem(const LogprobInput& input)
      : in(input),
        vocab(input.weight.rows()),
        cols(input.weight.cols()),
        tiles(vocab_tiles(vocab)),
        inv_temperature(1.0f / input.temperature),
        with_ref(input.ref_hidden != nullptr),
        own_ref_weight(with_ref && input.ref_weight.rows() > 0),
        ref_cols(own_ref_weight ? input.ref_weight.cols() : cols) {
    require(cols >= 1, "hidden: expected at least one column, got none");
    require(ref_cols >= 1, "reference_hidden: expected at least one column, got none");
  }

  void open(Workspace& own, int64_t tile) const {
    own.weight.open(in.weight, tile);
    if (own_ref_weight) own.ref_weight.open(in.ref_weight, tile);
  }
  Arithmetic ref_arithmetic() const {
    return (own_ref_weight ? in.ref_weight : in.weight).arithmetic();
  }
  // Gradients multiply by the weight's float32 values.
  void require_float32() const {
    require(
        in.weight.arithmetic() == Arithmetic::kFloat32 && ref_arithmetic() == Arithmetic::kFloat32,
        "gradients: expected a model loaded with compute float32, got int8");
  }
  MatrixView hidden(int64_t first) const { return {in.hidden + first * cols, cols, 1}; }
  MatrixView ref_hidden(int64_t first) const {
    return {in.ref_hidden + first * ref_cols, ref_cols, 1};
  }

  const LogprobInput& in;
  int64_t vocab, cols, tiles;
  float inv_temperature;
  bool with_ref, own_ref_weight;
  int64_t ref_cols;
};

// Scaled logits of every block of `rows` against the open tile; block b's start at
// own.logits + b * kRowBlock * kVocabTile.
void tile_logits(const Problem& problem, const LogitRows& rows, const LogitRows& ref_rows,
                 int64_t tile, Workspace& own) {
  const int64_t panels = own.weight.panels();
  const int64_t size = rows.blocks() * kRowBlock * kVocabTile;
  float* z = own.logits.reserve(size);
  float* r = problem.with_ref ? own.ref_logits.reserve(size) : nullptr;
  WeightTile& ref_weight = problem.own_ref_weight ? own.ref_weight : own.weight;
  const bool shared = &ref_weight == &own.weight;
  for (int64_t p = 0; p < panels; ++p) {
    const float* panel = own.weight.has_int8() ? nullptr : own.weight.panel(p);
    const float* ref_panel =
        r == nullptr || shared || ref_weight.has_int8() ? panel : ref_weight.panel(p);
    for (int64_t b = 0; b < rows.blocks(); ++b) {
      const int64_t at = b * kRowBlock * kVocabTile + p * rows.block_rows(b) * kPanel;
      own.weight.logits(rows, b, p, panel, z + at);
      if (r != nullptr) ref_weight.logits(ref_rows, b, p, ref_panel, r + at);
    }
  }
  for (int64_t b = 0; b < rows.blocks(); ++b) {
    const int64_t at = b * kRowBlock * kVocabTile, count = rows.block_rows(b);
    for (int64_t m = 0; m < count; ++m) {
      finish_tile_row(problem.vocab, tile, z + at, count, m, problem.inv_temperature);
      if (r != nullptr) {
        finish_tile_row(problem.vocab, tile, r + at, count, m, problem.inv_temperature);
      }
    }
  }
}

// fn(first, tile, rows, own) for every chunk of rows and tile, own.logits filled; tiles in
// parallel. after(first, live) follows each chunk.
template <typename Fn, typename After>
void sweep_tiles(const Problem& problem, ThreadPool& pool, const Fn& fn, const After& after) {
  const int64_t total = problem.in.rows;
  if (total == 0) return;
  const int64_t chunk = round_up(divide_up(total, divide_up(total, kChunkRows)), kRowTile);
  LogitRows rows, ref_rows;
  for (int64_t first = 0; first < total; first += chunk) {
    const int64_t live = std::min(chunk, total - first);
    rows.pack(live, problem.cols, problem.hidden(first), kRowBlock, &pool,
              problem.in.weight.arithmetic());
    if (problem.with_ref) {
      ref_rows.pack(live, problem.ref_cols, problem.ref_hidden(first), kRowBlock, &pool,
                    problem.ref_arithmetic());
    }
    pool.run(problem.tiles, [&](int64_t tile, int) {
      Workspace& own = workspace();
      problem.open(own, tile);
      tile_logits(problem, rows, ref_rows, tile, own);
      fn(first, tile, rows, own);
    });
    after(first, live);
  }
}

// Rows a worker owns at a time: all workers busy where there are rows enough.
int64_t group_rows(int64_t rows, int threads) {
  const int64_t groups = round_up(divide_up(rows, kRowBlock), threads);
  return std::max(kRowTile, round_up(divide_up(rows, groups), kRowTile));
}

// For every group of rows, tile after tile: transform(first, m, tile, rows, own) turns the row's
// logits (and, for two operands, the reference's) into what multiplies the tile's rows of W; the
// sums over all tiles are left in own.result (own.ref_result) for finish(first, rows, own).
template <typename Transform, typename Finish>
void sweep_groups(const Problem& problem, int operands, ThreadPool& pool,
                  const Transform& transform, const Finish& finish) {
  const int64_t total = problem.in.rows;
  if (total == 0) return;
  const int64_t group = group_rows(total, pool.size());
  pool.run(divide_up(total, group), [&](int64_t item, int) {
    const cpu::Kernels& k = cpu::kernels();
    Workspace& own = workspace();
    const int64_t first = item * group, rows = std::min(group, total - first);
    const int64_t column_panels = divide_up(problem.cols, kPanel);
    own.rows.pack(rows, problem.cols, problem.hidden(first), kRowBlock, nullptr,
                  Arithmetic::kFloat32);
    if (problem.with_ref) {
      own.ref_rows.pack(rows, problem.ref_cols, problem.ref_hidden(first), kRowBlock, nullptr,
                        Arithmetic::kFloat32);
    }
    float* result = own.result.reserve(column_panels * kRowBlock * kPanel);
    float* ref_result =
        operands > 1 ? own.ref_result.reserve(column_panels * kRowBlock * kPanel) : nullptr;
    const auto pack = [&](const float* tile_rows, int64_t panels, AlignedBuffer& packed) {
      float* to = packed.reserve(kRowBlock * kVocabTile);
      for (int64_t m = 0; m < rows; m += kRowTile) {
        for (int64_t p = 0; p < panels; ++p) {
          k.pack_rows(std::min(kRowTile, rows - m), kPanel, tile_rows + (p * rows + m) * kPanel,
                      kPanel, 1, to);
          to += kPanel * kRowTile;
        }
      }
      return packed.data();
    };
    for (int64_t tile = 0; tile < problem.tiles; ++tile) {
      problem.open(own, tile);
      tile_logits(problem, own.rows, own.ref_rows, tile, own);
      for (int64_t m = 0; m < rows; ++m) transform(first, m, tile, rows, own);
      const int64_t count = own.weight.rows();
      const float* left = pack(own.logits.data(), own.weight.panels(), own.operand);
      const float* ref_left =
          operands > 1 ? pack(own.ref_logits.data(), own.weight.panels(), own.ref_operand)
                       : nullptr;
      for (int64_t c = 0; c < column_panels; ++c) {
        const float* columns = own.weight.columns(c);
        k.gemm_panel(rows, count, left, count * kRowTile, columns, kPanel,
                     result + c * rows * kPanel, tile > 0, false);
        if (operands > 1) {
          k.gemm_panel(rows, count, ref_left, count * kRowTile, columns, kPanel,
                       ref_result + c * rows * kPanel, tile > 0, false);
        }
      }
    }
    finish(first, rows, own);
  });
}

// A row of a result [column panels][rows][16], element by element.
template <typename Fn>
void for_row(int64_t cols, int64_t rows, int64_t m, const Fn& fn) {
  for (int64_t i = 0; i < cols; ++i) fn(i, (i / kPanel * rows + m) * kPanel + i % kPanel);
}

void read_weight_row(const VocabularyWeight& weight, int64_t row, float* out) {
  if (weight.packed != nullptr) return weight.packed->read_row(row, out);
  const QuantizedMatrix& stored = weight.stored;
  dequantize(stored.dtype, stored.data + row * row_bytes(stored.dtype, stored.cols), stored.cols,
             out);
}

// The token's logit, if it lies in this tile.
void note_token(const Problem& problem, int64_t row, int64_t m, int64_t tile, int64_t rows,
                const float* z, const float* r, float* logit, float* ref_logit) {
  const int64_t column = problem.in.tokens[static_cast<size_t>(row)] - tile * kVocabTile;
  if (column < 0 || column >= kVocabTile) return;
  *logit = tile_value(z, rows, m, column);
  if (r != nullptr) *ref_logit = tile_value(r, rows, m, column);
}

RowStats write_row(const Problem& problem, const LogprobOutput& out, int64_t row,
                   std::span<const TileStats> tiles, float logit, float ref_logit) {
  const RowStats s = merge_tiles(tiles.data(), static_cast<int64_t>(tiles.size()));
  require<NumericError>(s.valid() && (!problem.with_ref || std::isfinite(s.ref_lse)),
                        "linear_logprob: row ", row,
                        " has no finite softmax (NaN or infinite logits); check the weights, "
                        "the adapter and the learning rate");
  const RowValues values = row_values(s, logit, ref_logit);
  out.logprob[row] = values.logprob;
  out.entropy[row] = values.entropy;
  out.lse[row] = s.lse;
  if (problem.with_ref) {
    out.kl[row] = values.kl;
    if (out.reverse_kl != nullptr) out.reverse_kl[row] = values.reverse_kl;
    out.ref_logprob[row] = values.ref_logprob;
    out.ref_lse[row] = s.ref_lse;
  }
  return s;
}

void values_only(const Problem& problem, const LogprobOutput& out, ThreadPool& pool) {
  const int64_t tiles = problem.tiles;
  std::vector<TileStats> stats(static_cast<size_t>(std::min(problem.in.rows, kChunkRows) * tiles));
  std::vector<float> logit(static_cast<size_t>(problem.in.rows)), ref_logit(logit.size());
  sweep_tiles(
      problem, pool,
      [&](int64_t first, int64_t tile, const LogitRows& rows, Workspace& own) {
        for (int64_t b = 0; b < rows.blocks(); ++b) {
          const int64_t at = b * kRowBlock * kVocabTile, count = rows.block_rows(b);
          const float* z = own.logits.data() + at;
          const float* r = problem.with_ref ? own.ref_logits.data() + at : nullptr;
          for (int64_t m = 0; m < count; ++m) {
            const int64_t row = b * kRowBlock + m;
            const auto global = static_cast<size_t>(first + row);
            cpu::kernels().tile_stats_row(z, r, count, m, own.weight.panels(),
                                          &stats[static_cast<size_t>(row * tiles + tile)]);
            note_token(problem, first + row, m, tile, count, z, r, &logit[global],
                       &ref_logit[global]);
          }
        }
      },
      [&](int64_t first, int64_t live) {
        for (int64_t row = 0; row < live; ++row) {
          const auto global = static_cast<size_t>(first + row);
          write_row(problem, out, first + row,
                    {stats.data() + row * tiles, static_cast<size_t>(tiles)}, logit[global],
                    ref_logit[global]);
        }
      });
}

// What a row carries from tile to tile while its Jacobian is summed.
struct Running {
  float max = -INFINITY;
  float center = 0.0f, ref_center = 0.0f;
  float logit = 0.0f, ref_logit = 0.0f;
};

float finite_or_zero(float value) { return std::isfinite(value) ? value : 0.0f; }

void values_and_jacobian(const Problem& problem, const LogprobOutput& out,
                         const LogprobJacobian& jacobian, ThreadPool& pool) {
  const int64_t tiles = problem.tiles, cols = problem.cols;
  const int operands = problem.with_ref && jacobian.kl != nullptr ? 2 : 1;
  std::vector<Running> running(static_cast<size_t>(problem.in.rows));
  sweep_groups(
      problem, operands, pool,
      [&](int64_t first, int64_t m, int64_t tile, int64_t rows, Workspace& own) {
        const cpu::Kernels& k = cpu::kernels();
        Running& state = running[static_cast<size_t>(first + m)];
        float* z = own.logits.data();
        float* r = problem.with_ref ? own.ref_logits.data() : nullptr;
        own.stats.resize(static_cast<size_t>(kRowBlock * tiles));
        TileStats& stats = own.stats[static_cast<size_t>(m * tiles + tile)];
        k.tile_stats_row(z, r, rows, m, own.weight.panels(), &stats);
        note_token(problem, first + m, m, tile, rows, z, r, &state.logit, &state.ref_logit);
        if (tile == 0) {
          state.center = finite_or_zero(stats.max);
          state.ref_center = problem.with_ref ? finite_or_zero(stats.ref_max) : 0.0f;
        }
        if (stats.max > state.max) {
          const float factor = std::exp(state.max - stats.max);
          state.max = stats.max;
          if (tile > 0) {
            const auto rescale = [&](float* sums) {
              for_row(cols, rows, m, [&](int64_t, int64_t at) { sums[at] *= factor; });
            };
            rescale(own.result.data());
            if (operands > 1) rescale(own.ref_result.data());
          }
        }
        k.tile_weights_row(z, operands > 1 ? r : nullptr, rows, m, own.weight.panels(),
                           finite_or_zero(state.max), state.center, state.ref_center);
      },
      [&](int64_t first, int64_t rows, Workspace& own) {
        std::vector<float> chosen(static_cast<size_t>(cols));
        for (int64_t m = 0; m < rows; ++m) {
          const Running& state = running[static_cast<size_t>(first + m)];
          const RowStats s = write_row(problem, out, first + m,
                                       {own.stats.data() + m * tiles, static_cast<size_t>(tiles)},
                                       state.logit, state.ref_logit);
          const auto share = static_cast<float>(1.0 / s.sum);
          const auto mean =
              static_cast<float>(s.mean_cross - (double{state.center} - state.ref_center));
          read_weight_row(problem.in.weight, problem.in.tokens[static_cast<size_t>(first + m)],
                          chosen.data());
          float* d_logprob = jacobian.logprob + (first + m) * cols;
          float* d_kl = operands > 1 ? jacobian.kl + (first + m) * cols : nullptr;
          const float* sums = own.result.data();
          const float* cross = own.ref_result.data();
          for_row(cols, rows, m, [&](int64_t i, int64_t at) {
            const float expected = sums[at] * share;
            d_logprob[i] = (chosen[static_cast<size_t>(i)] - expected) * problem.inv_temperature;
            if (d_kl != nullptr) {
              d_kl[i] = (cross[at] * share - mean * expected) * problem.inv_temperature;
            }
          });
        }
      });
}

RowGradient row_gradient(const Problem& problem, const LogprobOutput& forward,
                         const LogprobUpstream& upstream, int64_t row) {
  return row_gradient(row, problem.with_ref, problem.in.tokens.data(), forward, upstream);
}

void hidden_gradient(const Problem& problem, const LogprobOutput& forward,
                     const LogprobUpstream& upstream, float* d_hidden, ThreadPool& pool) {
  sweep_groups(
      problem, 1, pool,
      [&](int64_t first, int64_t m, int64_t tile, int64_t rows, Workspace& own) {
        const RowGradient gradient = row_gradient(problem, forward, upstream, first + m);
        cpu::kernels().tile_gradient_row(
            own.logits.data(), problem.with_ref ? own.ref_logits.data() : nullptr, rows, m,
            own.weight.panels(), tile * kVocabTile, &gradient, problem.inv_temperature);
      },
      [&](int64_t first, int64_t rows, Workspace& own) {
        for (int64_t m = 0; m < rows; ++m) {
          float* to = d_hidden + (first + m) * problem.cols;
          const float* sums = own.result.data();
          for_row(problem.cols, rows, m, [&](int64_t i, int64_t at) { to[i] = sums[at]; });
        }
      });
}

// dW = dz^T h, tile by tile: blocks of rows in order, summed in own.result [column panels][vocab
// panels][16][16].
void weight_gradient(const Problem& problem, const LogprobOutput& forward,
                     const LogprobUpstream& upstream, float* d_weight, ThreadPool& pool) {
  const int64_t cols = problem.cols, column_panels = divide_up(cols, kPanel);
  sweep_tiles(
      problem, pool,
      [&](int64_t first, int64_t tile, const LogitRows& rows, Workspace& own) {
        const cpu::Kernels& k = cpu::kernels();
        const int64_t panels = own.weight.panels();
        float* sums = own.result.reserve(column_panels * kVocabTile * kPanel);
        for (int64_t b = 0; b < rows.blocks(); ++b) {
          const int64_t at = b * kRowBlock * kVocabTile, count = rows.block_rows(b);
          const int64_t block_first = first + b * kRowBlock;
          float* dz = own.logits.data() + at;
          for (int64_t m = 0; m < count; ++m) {
            const RowGradient gradient = row_gradient(problem, forward, upstream, block_first + m);
            k.tile_gradient_row(dz, problem.with_ref ? own.ref_logits.data() + at : nullptr, count,
                                m, panels, tile * kVocabTile, &gradient, problem.inv_temperature);
          }
          constexpr int64_t kPackedRows = (kPanel + kRowTile - 1) / kRowTile * kRowTile;
          float* left = own.operand.reserve(kTilePanels * kPackedRows * kRowBlock);
          for (int64_t p = 0; p < panels; ++p) {
            k.pack_rows(kPanel, count, dz + p * count * kPanel, 1, kPanel,
                        left + p * kPackedRows * count);
          }
          float* columns = own.columns.reserve(kRowBlock * kPanel);
          for (int64_t c = 0; c < column_panels; ++c) {
            const int64_t width = std::min(kPanel, cols - c * kPanel);
            for (int64_t m = 0; m < count; ++m) {
              const float* from = problem.in.hidden + (block_first + m) * cols + c * kPanel;
              for (int64_t j = 0; j < kPanel; ++j) {
                columns[m * kPanel + j] = j < width ? from[j] : 0.0f;
              }
            }
            for (int64_t p = 0; p < panels; ++p) {
              k.gemm_panel(kPanel, count, left + p * kPackedRows * count, count * kRowTile, columns,
                           kPanel, sums + (c * kTilePanels + p) * kPanel * kPanel, b > 0, false);
            }
          }
        }
        for (int64_t v = 0; v < std::min(kVocabTile, problem.vocab - tile * kVocabTile); ++v) {
          float* to = d_weight + (tile * kVocabTile + v) * cols;
          for (int64_t i = 0; i < cols; ++i) {
            const float sum =
                sums[((i / kPanel * kTilePanels + v / kPanel) * kPanel + v % kPanel) * kPanel +
                     i % kPanel];
            to[i] = first > 0 ? to[i] + sum : sum;
          }
        }
      },
      [](int64_t, int64_t) {});
}

}  // namespace

void linear_logprob(const LogprobInput& in, const LogprobOutput& out,
                    const LogprobJacobian* jacobian, ThreadPool& pool) {
  const Problem problem(in);
  if (jacobian != nullptr) {
    problem.require_float32();
    values_and_jacobian(problem, out, *jacobian, pool);
  } else {
    values_only(problem, out, pool);
  }
}

void total_variation(const LogprobInput& in, const LogprobOutput& forward, float* tv,
                     float* mass_above, ThreadPool& pool) {
  const Problem problem(in);
  require(problem.with_ref, "total_variation: expected reference hidden states, got none");
  const int64_t tiles = problem.tiles;
  std::vector<std::array<float, 2>> parts(
      static_cast<size_t>(std::min(in.rows, kChunkRows) * tiles));
  sweep_tiles(
      problem, pool,
      [&](int64_t first, int64_t tile, const LogitRows& rows, Workspace& own) {
        for (int64_t b = 0; b < rows.blocks(); ++b) {
          const int64_t at = b * kRowBlock * kVocabTile, count = rows.block_rows(b);
          for (int64_t m = 0; m < count; ++m) {
            const int64_t row = b * kRowBlock + m;
            auto& part = parts[static_cast<size_t>(row * tiles + tile)];
            const RowGradient statistics = row_gradient(problem, forward, {}, first + row);
            cpu::kernels().tile_variation_row(own.logits.data() + at, own.ref_logits.data() + at,
                                              count, m, own.weight.panels(), &statistics, &part[0],
                                              &part[1]);
          }
        }
      },
      [&](int64_t first, int64_t live) {
        for (int64_t row = 0; row < live; ++row) {
          double variation = 0.0, mass = 0.0;
          for (int64_t tile = 0; tile < tiles; ++tile) {
            variation += parts[static_cast<size_t>(row * tiles + tile)][0];
            mass += parts[static_cast<size_t>(row * tiles + tile)][1];
          }
          tv[first + row] = static_cast<float>(std::min(1.0, variation));
          mass_above[first + row] = static_cast<float>(mass);
        }
      });
}

void linear_logprob_backward(const LogprobInput& in, const LogprobOutput& forward,
                             const LogprobJacobian* jacobian, const LogprobUpstream& upstream,
                             float* d_hidden, float* d_weight, ThreadPool& pool) {
  const Problem problem(in);
  problem.require_float32();
  if (d_weight != nullptr) {
    if (in.rows == 0) std::fill_n(d_weight, problem.vocab * problem.cols, 0.0f);
    weight_gradient(problem, forward, upstream, d_weight, pool);
  }
  if (d_hidden == nullptr) return;
  LogprobUpstream rest = upstream;
  const float* d_logprob = nullptr;
  const float* d_kl = nullptr;
  if (jacobian != nullptr) {
    d_logprob = std::exchange(rest.logprob, nullptr);
    if (jacobian->kl != nullptr) d_kl = std::exchange(rest.kl, nullptr);
  }
  const bool again = rest.logprob != nullptr || rest.entropy != nullptr || rest.kl != nullptr ||
                     rest.reverse_kl != nullptr || rest.total_variation != nullptr;
  if (again) {
    hidden_gradient(problem, forward, rest, d_hidden, pool);
  } else {
    std::fill_n(d_hidden, in.rows * problem.cols, 0.0f);
  }
  row_parallel(in.rows, problem.cols, pool, [&](int64_t row) {
    float* to = d_hidden + row * problem.cols;
    const cpu::Kernels& k = cpu::kernels();
    if (d_logprob != nullptr) {
      k.axpy(d_logprob[row], jacobian->logprob + row * problem.cols, problem.cols, to);
    }
    if (d_kl != nullptr && d_kl[row] != 0.0f) {
      k.axpy(d_kl[row], jacobian->kl + row * problem.cols, problem.cols, to);
    }
  });
}

int64_t linear_logprob_bytes(const LogprobInput& in, bool with_jacobian, int threads) {
  const Problem problem(in);
  const int64_t sides = problem.with_ref ? 2 : 1;
  const int64_t contract = problem.cols + (problem.with_ref ? problem.ref_cols : 0);
  const auto weight_bytes = [](const VocabularyWeight& weight) {
    const QuantizedMatrix& m = weight.stored;  // of no columns where it is packed
    return 4 * (kVocabTile * kPanel + kPanel * m.cols +
                (m.dtype == DType::kF32 ? 0 : kVocabTile * m.cols));
  };
  const int64_t tile_bytes =
      weight_bytes(in.weight) + (problem.own_ref_weight ? weight_bytes(in.ref_weight) : 0);
  const auto stats_bytes = static_cast<int64_t>(sizeof(TileStats)) * problem.tiles;
  if (!with_jacobian) {
    const int64_t rows = round_up(std::min(in.rows, kChunkRows), kRowBlock);
    return rows * (stats_bytes + 4 * contract) + 8 * in.rows +
           threads * (tile_bytes + rows * 4 * kVocabTile * sides);
  }
  const int64_t columns = round_up(problem.cols, kPanel);
  return static_cast<int64_t>(sizeof(Running)) * in.rows +
         threads * (tile_bytes + kRowBlock * (stats_bytes + 4 * contract + 8 * kVocabTile * sides +
                                              4 * columns * sides));
}

}  // namespace alignpro::ops
