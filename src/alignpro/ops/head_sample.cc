#include "alignpro/ops/head_sample.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "alignpro/ops/vocabulary.h"

namespace alignpro::ops {
namespace {

// Rows whose logits are held at once for truncated sampling: the workspace is 16 x V floats.
constexpr int64_t kTruncatedRows = 16;

bool is_truncated(const SampleRow& row) {
  return !row.penalties.empty() || truncates(row, static_cast<int64_t>(row.banned.size()));
}

constexpr SampledToken kNoToken{-1, NAN, NAN};

// The logits of one row and tile again, for the one tile the draw fell into.
void row_tile(const PackedMatrix& head, const float* hidden, int64_t tile, float inv_temperature,
              float* out) {
  if (head.arithmetic() == Arithmetic::kInt8) {
    thread_local LogitRows row;
    row.pack(1, head.cols(), {hidden, head.cols(), 1}, kRowBlock, nullptr, head.arithmetic());
    tile_logits(row, 0, head, tile, hidden, out);
  } else {
    head.multiply_rows(tile * kTilePanels, tile_panels(head.rows(), tile), 1, hidden, head.cols(),
                       out);
  }
  finish_tile_row(head.rows(), tile, out, 1, 0, inv_temperature);
}

// The tile's logits are computed again, and have the bits that were measured unless the weights
// have changed in between (a mapped file can): then the row has no token.
SampledToken draw_plain(const PackedMatrix& head, const float* hidden, const SampleRow& row,
                        std::span<const TileStats> tiles) {
  const RowStats stats = merge_tiles(tiles.data(), static_cast<int64_t>(tiles.size()));
  const float inv_temperature = inverse_temperature(row);
  float logits[kVocabTile];
  int64_t tile = 0, column = 0;
  if (row.temperature == 0.0f) {
    const auto top = static_cast<float>(stats.max);
    tile = std::find_if(tiles.begin(), tiles.end(),
                        [top](const TileStats& s) { return s.max == top; }) -
           tiles.begin();
    if (tile == static_cast<int64_t>(tiles.size())) return kNoToken;
    row_tile(head, hidden, tile, inv_temperature, logits);
    const int64_t columns = tile_panels(head.rows(), tile) * cpu::kPanel;
    column = std::find(logits, logits + columns, top) - logits;
    if (column == columns) return kNoToken;
  } else {
    const auto tile_mass = [&](int64_t t) {
      const TileStats& s = tiles[static_cast<size_t>(t)];
      return s.sum > 0.0f ? s.sum * std::exp(s.max - stats.max) : 0.0;
    };
    const double target = row.uniform * stats.sum;
    double below = 0.0;
    tile = invert(static_cast<int64_t>(tiles.size()), target, tile_mass, &below);
    if (tile < 0) return kNoToken;
    row_tile(head, hidden, tile, inv_temperature, logits);
    float e[kVocabTile];
    const TileStats& s = tiles[static_cast<size_t>(tile)];
    cpu::kernels().tile_exp_row(logits, 1, 0, tile_panels(head.rows(), tile), s.max, e);
    const double scale = std::exp(s.max - stats.max);
    column = invert(tile_panels(head.rows(), tile) * cpu::kPanel, target - below,
                    [&](int64_t i) { return e[i] * scale; });
    if (column < 0) return kNoToken;
  }
  return {static_cast<int32_t>(tile * kVocabTile + column),
          static_cast<float>(logits[column] - stats.lse), 1.0f};
}

struct Candidate {
  float z;
  int32_t token;
};

// Order of preference: larger logit first, lower id on a tie.
bool better(const Candidate& a, const Candidate& b) {
  return a.z != b.z ? a.z > b.z : a.token < b.token;
}

// Sorts just enough of the best candidates that they hold `wanted` of `total` mass; returns how
// many are needed.
size_t nucleus(std::vector<Candidate>& all, double wanted, double lse) {
  size_t sorted = 0;
  double mass = 0.0;
  for (size_t count = 0; count < all.size(); ++count) {
    if (count == sorted) {
      sorted = std::min(all.size(), std::max<size_t>(256, 8 * sorted));
      const auto begin = all.begin() + static_cast<std::ptrdiff_t>(count);
      std::partial_sort(begin, all.begin() + static_cast<std::ptrdiff_t>(sorted), all.end(),
                        better);
    }
    mass += std::exp(all[count].z - lse);
    if (mass >= wanted) return count + 1;
  }
  return all.size();
}

// Lowers the penalised logits of row m; returns the logarithm of the sum of all exponentials after.
double penalise(const SampleRow& row, int64_t vocab, float* logits, int64_t rows, int64_t m) {
  const float inv_temperature = inverse_temperature(row);
  for (const Penalty& p : row.penalties) {
    float& z = tile_value(logits, rows, m, p.token);
    z = (z > 0.0f ? z / p.repetition : z * p.repetition) - p.minus * inv_temperature;
  }
  float best = -INFINITY;
  for (int64_t v = 0; v < vocab; ++v) best = std::max(best, tile_value(logits, rows, m, v));
  double sum = 0.0;
  for (int64_t v = 0; v < vocab; ++v) sum += std::exp(tile_value(logits, rows, m, v) - best);
  return best + std::log(sum);
}

// Penalties, then bans, then top-k, then top-p of what top-k left, then min-p against the best that
// is left.
SampledToken draw_truncated(const SampleRow& row, const RowStats& stats, int64_t vocab,
                            float* logits, int64_t rows, int64_t m) {
  std::vector<float> before;  // the penalties
  for (const Penalty& p : row.penalties) before.push_back(tile_value(logits, rows, m, p.token));
  const double lse = before.empty() ? stats.lse : penalise(row, vocab, logits, rows, m);
  std::vector<Candidate> kept;
  kept.reserve(static_cast<size_t>(vocab));
  auto ban = row.banned.begin();
  for (int64_t v = 0; v < vocab; ++v) {
    const float z = tile_value(logits, rows, m, v);
    while (ban != row.banned.end() && *ban < v) ++ban;
    if (z > -INFINITY && (ban == row.banned.end() || *ban != v)) {
      kept.push_back({z, static_cast<int32_t>(v)});
    }
  }
  if (kept.empty()) return kNoToken;
  if (row.top_k > 0 && static_cast<size_t>(row.top_k) < kept.size()) {
    std::nth_element(kept.begin(), kept.begin() + row.top_k - 1, kept.end(), better);
    kept.resize(static_cast<size_t>(row.top_k));
  }
  const auto mass_of = [&] {
    std::sort(kept.begin(), kept.end(),
              [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
    double mass = 0.0;
    for (const Candidate& c : kept) mass += std::exp(c.z - lse);
    return mass;
  };
  if (row.top_p < 1.0f) kept.resize(nucleus(kept, row.top_p * mass_of(), lse));
  if (row.min_p > 0.0f) {
    const float best = std::min_element(kept.begin(), kept.end(), better)->z;
    const double floor = min_p_floor(best, row.min_p);
    std::erase_if(kept, [&](const Candidate& c) { return c.z < floor; });
  }
  const double mass = mass_of();
  const int64_t drawn =
      invert(static_cast<int64_t>(kept.size()), row.uniform * mass,
             [&](int64_t i) { return std::exp(kept[static_cast<size_t>(i)].z - lse); });
  // Every candidate underflowed: the best of them is the limit.
  const Candidate& token = drawn >= 0 ? kept[static_cast<size_t>(drawn)]
                                      : *std::min_element(kept.begin(), kept.end(), better);
  const auto penalty = std::find_if(row.penalties.begin(), row.penalties.end(),
                                    [&](const Penalty& p) { return p.token == token.token; });
  const float z = penalty == row.penalties.end()
                      ? token.z
                      : before[static_cast<size_t>(penalty - row.penalties.begin())];
  return {token.token, static_cast<float>(z - stats.lse), static_cast<float>(std::min(1.0, mass))};
}

// Greedy with bans or penalties is a truncation to the best allowed token.
SampleRow as_drawn(const SampleRow& row) {
  SampleRow drawn = row;
  if (row.temperature == 0.0f && is_truncated(row)) {
    static_cast<DrawOptions&>(drawn) = {.temperature = 1.0f, .top_k = 1};
  }
  return drawn;
}

}  // namespace

void head_sample(const PackedMatrix& head, const float* hidden, std::span<const SampleRow> requests,
                 std::span<SampledToken> out, ThreadPool& pool) {
  const int64_t count = static_cast<int64_t>(requests.size());
  const int64_t tiles = vocab_tiles(head.rows()), cols = head.cols();
  std::vector<SampleRow> rows(requests.begin(), requests.end());
  std::transform(rows.begin(), rows.end(), rows.begin(), as_drawn);

  LogitRows packed;
  std::vector<TileStats> stats(static_cast<size_t>(count * tiles));
  for (int64_t first = 0; first < count; first += kRowChunk) {
    const int64_t live = std::min(kRowChunk, count - first);
    packed.pack(live, cols, {hidden + first * cols, cols, 1}, kRowBlock, &pool, head.arithmetic());
    pool.run(packed.blocks() * tiles, [&](int64_t item, int) {
      thread_local AlignedBuffer buffer;
      float* logits = buffer.reserve(kRowBlock * kVocabTile);
      const int64_t tile = item / packed.blocks(), block = item % packed.blocks();
      const int64_t block_rows = packed.block_rows(block);
      tile_logits(packed, block, head, tile, hidden + (first + block * kRowBlock) * cols, logits);
      for (int64_t m = 0; m < block_rows; ++m) {
        const int64_t row = first + block * kRowBlock + m;
        finish_tile_row(head.rows(), tile, logits, block_rows, m,
                        inverse_temperature(rows[static_cast<size_t>(row)]));
        cpu::kernels().tile_stats_row(logits, nullptr, block_rows, m,
                                      tile_panels(head.rows(), tile),
                                      &stats[static_cast<size_t>(row * tiles + tile)]);
      }
    });
  }
  const auto row_stats = [&](int64_t row) {
    return std::span<const TileStats>(stats.data() + row * tiles, static_cast<size_t>(tiles));
  };
  const auto merged = [&](int64_t row) { return merge_tiles(stats.data() + row * tiles, tiles); };
  std::vector<int64_t> truncated;
  for (int64_t row = 0; row < count; ++row) {
    if (!merged(row).valid()) {
      out[static_cast<size_t>(row)] = kNoToken;
    } else if (is_truncated(rows[static_cast<size_t>(row)])) {
      truncated.push_back(row);
    } else {
      out[static_cast<size_t>(row)] =
          draw_plain(head, hidden + row * cols, rows[static_cast<size_t>(row)], row_stats(row));
    }
  }
  AlignedBuffer gathered, logits;
  for (size_t first = 0; first < truncated.size(); first += kTruncatedRows) {
    const int64_t live =
        std::min<int64_t>(kTruncatedRows, static_cast<int64_t>(truncated.size() - first));
    float* some = gathered.reserve(kTruncatedRows * cols);
    for (int64_t m = 0; m < live; ++m) {
      std::memcpy(some + m * cols, hidden + truncated[first + static_cast<size_t>(m)] * cols,
                  static_cast<size_t>(cols) * sizeof(float));
    }
    packed.pack(live, cols, {some, cols, 1}, kRowBlock, &pool, head.arithmetic());
    float* all = logits.reserve(live * head.panels() * cpu::kPanel);
    pool.run(tiles, [&](int64_t tile, int) {
      float* to = all + tile * kTilePanels * live * cpu::kPanel;
      tile_logits(packed, 0, head, tile, some, to);
      for (int64_t m = 0; m < live; ++m) {
        const auto row = static_cast<size_t>(truncated[first + static_cast<size_t>(m)]);
        finish_tile_row(head.rows(), tile, to, live, m, inverse_temperature(rows[row]));
      }
    });
    pool.run(live, [&](int64_t m, int) {
      const int64_t row = truncated[first + static_cast<size_t>(m)];
      out[static_cast<size_t>(row)] =
          draw_truncated(rows[static_cast<size_t>(row)], merged(row), head.rows(), all, live, m);
    });
  }
}

}  // namespace alignpro::ops
