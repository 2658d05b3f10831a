#include "alignpro/ops/head_sample.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <numeric>
#include <utility>
#include <vector>

#include "alignpro/ops/vocabulary.h"

namespace alignpro::ops {
namespace {

// Rows that are drawn together where some are truncated, whose logits are kept until they are.
constexpr int64_t kTruncatedRows = 64;

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
                        const RowStats& stats, std::span<const TileStats> tiles) {
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

// What may be drawn, in token order.
struct Candidates {
  std::vector<float> z, mass;  // mass: exp(z - best)
  std::vector<int32_t> tokens;
  float best = -INFINITY;

  void add(float logit, int32_t token) {
    z.push_back(logit);
    tokens.push_back(token);
    best = std::max(best, logit);
  }

  void weigh() {
    const size_t panels = (z.size() + cpu::kPanel - 1) / cpu::kPanel, count = z.size();
    z.resize(panels * cpu::kPanel, -INFINITY);
    mass.resize(z.size());
    cpu::kernels().tile_exp_row(z.data(), 1, 0, static_cast<int64_t>(panels), best, mass.data());
    z.resize(count);
    mass.resize(count);
  }

  double total() const { return std::accumulate(mass.begin(), mass.end(), 0.0); }

  // Leaves those above `least`, and of those at it the first `ties`.
  void keep(float least, size_t ties) {
    size_t kept = 0;
    mass.resize(z.size());
    for (size_t i = 0; i < z.size(); ++i) {
      const bool tie = z[i] == least;
      if (z[i] < least || (tie && ties == 0)) continue;
      if (tie) --ties;
      z[kept] = z[i];
      mass[kept] = mass[i];
      tokens[kept++] = tokens[i];
    }
    z.resize(kept);
    mass.resize(kept);
    tokens.resize(kept);
  }

  // The `count` best, lower ids first where logits tie.
  void keep_best(size_t count) {
    if (count >= z.size()) return;
    std::vector<float> order = z;
    const auto last = order.begin() + static_cast<std::ptrdiff_t>(count) - 1;
    std::nth_element(order.begin(), last, order.end(), std::greater<>());
    keep(*last, static_cast<size_t>(std::count(order.begin(), last + 1, *last)));
  }

  // The best that hold `wanted` mass. Only those are sorted that are about as likely as the last.
  void keep_nucleus(double wanted) {
    constexpr float kBuckets = 1024, kPerNat = 16;
    const auto bucket = [&](float logit) {
      return static_cast<size_t>(std::min((best - logit) * kPerNat, kBuckets - 1));
    };
    std::array<double, static_cast<size_t>(kBuckets)> masses = {};
    for (size_t i = 0; i < z.size(); ++i) masses[bucket(z[i])] += mass[i];
    size_t reached = 0;
    double held = 0.0;
    while (reached + 1 < masses.size() && held + masses[reached] < wanted) {
      held += masses[reached++];
    }
    std::vector<std::pair<float, float>> order;
    for (size_t i = 0; i < z.size(); ++i) {
      if (bucket(z[i]) == reached) order.emplace_back(z[i], mass[i]);
    }
    if (order.empty()) return;
    std::sort(order.begin(), order.end(), std::greater<>());
    size_t last = 0;
    while ((held += order[last].second) < wanted && last + 1 < order.size()) ++last;
    const float least = order[last].first;
    size_t ties = 1;
    while (ties <= last && order[last - ties].first == least) ++ties;
    keep(least, ties);
  }
};

// Lowers the penalised logits; returns the logarithm of the sum of all exponentials after.
double penalise(const SampleRow& row, std::span<float> logits) {
  const float inv_temperature = inverse_temperature(row);
  for (const Penalty& p : row.penalties) {
    float& z = logits[static_cast<size_t>(p.token)];
    z = (z > 0.0f ? z / p.repetition : z * p.repetition) - p.minus * inv_temperature;
  }
  const float best = *std::max_element(logits.begin(), logits.end());
  double sum = 0.0;
  for (const float z : logits) sum += std::exp(z - best);
  return best + std::log(sum);
}

// A logit that no token left by truncation is below, from the tiles' statistics: of V tokens, those
// less likely than (1 - top_p) / V have no more than 1 - top_p among them, and the k best of all
// are no worse than the k-th of the tiles' best.
float least_kept(const SampleRow& row, const RowStats& stats, std::span<const TileStats> tiles,
                 int64_t vocab) {
  if (!row.penalties.empty() || !row.banned.empty()) return -INFINITY;
  double least = -INFINITY;
  if (row.top_k > 0 && static_cast<size_t>(row.top_k) <= tiles.size()) {
    std::vector<float> best(tiles.size());
    std::transform(tiles.begin(), tiles.end(), best.begin(),
                   [](const TileStats& s) { return s.max; });
    const auto kth = best.begin() + row.top_k - 1;
    std::nth_element(best.begin(), kth, best.end(), std::greater<>());
    least = *kth;
  }
  if (row.top_k == 0 && row.top_p < 1.0f) {
    least = stats.lse + std::log((1.0 - row.top_p) / static_cast<double>(vocab));
  }
  // Of what top-p takes a share of, min-p may not take away before.
  if (row.min_p > 0.0f && (row.top_k == 0 || row.top_p == 1.0f)) {
    least = std::max(least, min_p_floor(static_cast<float>(stats.max), row.min_p));
  }
  constexpr double kSlack = 1e-3;  // the statistics' sums are float
  return static_cast<float>(least - kSlack);
}

// The allowed tokens from `least` on.
void find_candidates(const SampleRow& row, std::span<const TileStats> tiles,
                     std::span<const float> logits, float least, Candidates& found) {
  auto ban = row.banned.begin();
  for (size_t tile = 0; tile < tiles.size(); ++tile) {
    if (row.penalties.empty() && tiles[tile].max < least) continue;
    const size_t begin = tile * kVocabTile, end = std::min(logits.size(), begin + kVocabTile);
    for (size_t v = begin; v < end; ++v) {
      const float z = logits[v];
      if (!(z >= least) || z == -INFINITY) continue;
      const auto token = static_cast<int32_t>(v);
      while (ban != row.banned.end() && *ban < token) ++ban;
      if (ban == row.banned.end() || *ban != token) found.add(z, token);
    }
  }
}

// Penalties, then bans, then top-k, then top-p of what top-k left, then min-p against the best that
// is left.
SampledToken draw_truncated(const SampleRow& row, const RowStats& stats,
                            std::span<const TileStats> tiles, std::span<float> logits) {
  std::vector<float> before;  // the penalties
  for (const Penalty& p : row.penalties) before.push_back(logits[static_cast<size_t>(p.token)]);
  const double lse = before.empty() ? stats.lse : penalise(row, logits);
  Candidates kept;
  find_candidates(row, tiles, logits, least_kept(row, stats, tiles, std::ssize(logits)), kept);
  if (kept.z.empty()) return kNoToken;
  if (row.top_k > 0) kept.keep_best(static_cast<size_t>(row.top_k));
  kept.weigh();
  if (row.top_p < 1.0f) {
    // Of equally likely tokens as many as there should be, where rounding leaves a trace less.
    constexpr double kRounding = 1e-12;
    const bool all = row.top_k == 0 && row.banned.empty();
    const double mass = all ? std::exp(lse - kept.best) : kept.total();
    kept.keep_nucleus(row.top_p * mass * (1.0 - kRounding));
  }
  if (row.min_p > 0.0f) {
    const double floor = min_p_floor(kept.best, row.min_p);
    const auto least = static_cast<float>(floor);
    kept.keep(least < floor ? std::nextafter(least, INFINITY) : least, kept.z.size());
  }
  const double mass = kept.total();
  const auto drawn = static_cast<size_t>(invert(std::ssize(kept.mass), row.uniform * mass,
                                                [&](int64_t i) -> double { return kept.mass[i]; }));
  const int32_t token = kept.tokens[drawn];
  const auto penalty = std::find_if(row.penalties.begin(), row.penalties.end(),
                                    [token](const Penalty& p) { return p.token == token; });
  const float z = penalty == row.penalties.end()
                      ? kept.z[drawn]
                      : before[static_cast<size_t>(penalty - row.penalties.begin())];
  const double of_all = mass * std::exp(kept.best - lse);
  return {token, static_cast<float>(z - stats.lse), static_cast<float>(std::min(1.0, of_all))};
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
  const int64_t vocab = head.rows(), tiles = vocab_tiles(vocab), cols = head.cols();
  std::vector<SampleRow> rows(requests.begin(), requests.end());
  std::transform(rows.begin(), rows.end(), rows.begin(), as_drawn);
  const bool any_truncated = std::any_of(rows.begin(), rows.end(), is_truncated);
  const int64_t at_once = any_truncated ? kTruncatedRows : kRowChunk;

  LogitRows packed;
  AlignedBuffer kept_logits;
  std::vector<float*> kept(static_cast<size_t>(at_once));  // [V] of a row to be truncated, or null
  std::vector<TileStats> stats(static_cast<size_t>(std::min(count, at_once) * tiles));
  for (int64_t first = 0; first < count; first += at_once) {
    const int64_t live = std::min(at_once, count - first);
    const auto row_of = [&](int64_t i) -> const SampleRow& {
      return rows[static_cast<size_t>(first + i)];
    };
    const auto stats_of = [&](int64_t i) {
      return std::span<TileStats>(stats.data() + i * tiles, static_cast<size_t>(tiles));
    };
    if (any_truncated) {
      float* next = kept_logits.reserve(live * tiles * kVocabTile);
      for (int64_t i = 0; i < live; ++i) {
        const bool keeps = is_truncated(row_of(i));
        kept[static_cast<size_t>(i)] = keeps ? next : nullptr;
        if (keeps) next += tiles * kVocabTile;
      }
    }
    packed.pack(live, cols, {hidden + first * cols, cols, 1}, kRowBlock, &pool, head.arithmetic());
    pool.run(packed.blocks() * tiles, [&](int64_t item, int) {
      thread_local AlignedBuffer buffer;
      float* logits = buffer.reserve(kRowBlock * kVocabTile);
      const int64_t tile = item / packed.blocks(), block = item % packed.blocks();
      const int64_t block_rows = packed.block_rows(block), panels = tile_panels(vocab, tile);
      tile_logits(packed, block, head, tile, hidden + (first + block * kRowBlock) * cols, logits);
      for (int64_t m = 0; m < block_rows; ++m) {
        const int64_t i = block * kRowBlock + m;
        finish_tile_row(vocab, tile, logits, block_rows, m, inverse_temperature(row_of(i)));
        cpu::kernels().tile_stats_row(logits, nullptr, block_rows, m, panels, &stats_of(i)[tile]);
        float* to = kept[static_cast<size_t>(i)];
        for (int64_t p = 0; to != nullptr && p < panels; ++p) {
          std::copy_n(logits + (p * block_rows + m) * cpu::kPanel, cpu::kPanel,
                      to + tile * kVocabTile + p * cpu::kPanel);
        }
      }
    });
    pool.run(live, [&](int64_t i, int) {
      const std::span<const TileStats> of_row = stats_of(i);
      const RowStats whole = merge_tiles(of_row.data(), tiles);
      float* logits = kept[static_cast<size_t>(i)];
      SampledToken& token = out[static_cast<size_t>(first + i)];
      if (!whole.valid()) {
        token = kNoToken;
      } else if (logits != nullptr) {
        token = draw_truncated(row_of(i), whole, of_row, {logits, static_cast<size_t>(vocab)});
      } else {
        token = draw_plain(head, hidden + (first + i) * cols, row_of(i), whole, of_row);
      }
    });
  }
}

}  // namespace alignpro::ops
