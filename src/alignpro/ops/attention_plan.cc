#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include "alignpro/ops/attention.h"

namespace alignpro::ops {
namespace {

// Query rows (tokens x heads of a group) that share a pass over the keys, at most.
constexpr int64_t kQueryRows = 48;

// Consecutive tokens of one segment that are in one tile together.
struct Member {
  int64_t row, position, count;
  std::span<const int32_t> blocks;     // of positions [0, position + count)
  std::span<const int32_t> shareable;  // those that lie before its first token as a whole
};

int64_t common_blocks(const Member& a, const Member& b) {
  const auto [end, other] =
      std::mismatch(a.shareable.begin(), a.shareable.end(), b.shareable.begin(), b.shareable.end());
  return end - a.shareable.begin();
}

std::vector<Member> cut(std::span<const Segment> segments, int64_t most) {
  std::vector<Member> members;
  for (const Segment& segment : segments) {
    for (int64_t first = 0; first < segment.row_count; first += most) {
      const int64_t count = std::min(most, segment.row_count - first);
      const int64_t position = segment.position + first;
      const int64_t end = (position + count + kKvBlock - 1) / kKvBlock;
      members.push_back({segment.row_begin + first, position, count,
                         segment.blocks.first(static_cast<size_t>(end)),
                         segment.blocks.first(static_cast<size_t>(position / kKvBlock))});
    }
  }
  // Those that share the most become neighbours; what is a beginning of another comes before it.
  std::stable_sort(members.begin(), members.end(), [](const Member& a, const Member& b) {
    return std::lexicographical_compare(a.shareable.begin(), a.shareable.end(), b.shareable.begin(),
                                        b.shareable.end());
  });
  return members;
}

// The runs of sorted members that agree on their first `depth` blocks, the first of them being
// token `token` of its tile.
void add_runs(const AttentionShape& shape, std::span<const Member> members, int64_t depth,
              int64_t token, std::vector<AttentionPlan::Run>& runs) {
  const auto add = [&](std::span<const Member> those, int64_t end_block, int64_t key_end) {
    int64_t first_block = end_block, count = 0;
    for (const Member& m : those) {
      first_block = std::min(first_block, shape.first_visible(m.position) / kKvBlock);
      count += m.count;
    }
    first_block = std::max(first_block, depth);
    if (first_block == end_block) return;
    runs.push_back(
        {token, token + count, those.front().blocks.data(), first_block, end_block, key_end});
  };
  if (members.size() == 1) {
    const Member& m = members.front();
    add(members, static_cast<int64_t>(m.blocks.size()), m.position + m.count);
    return;
  }
  // Sorted: what the first and the last share, all share.
  const int64_t common = common_blocks(members.front(), members.back());
  if (common > depth) add(members, common, common * kKvBlock);
  const auto at = static_cast<size_t>(common);
  for (size_t begin = 0; begin < members.size();) {
    size_t end = begin + 1;
    if (members[begin].shareable.size() > at) {
      while (end < members.size() && members[end].shareable[at] == members[begin].shareable[at]) {
        ++end;
      }
    }
    add_runs(shape, members.subspan(begin, end - begin), common, token, runs);
    for (; begin < end; ++begin) token += members[begin].count;
  }
}

}  // namespace

AttentionPlan::AttentionPlan(const AttentionShape& shape, std::span<const Segment> segments,
                             int threads) {
  const int64_t heads = shape.num_kv_heads, group = shape.group();
  int64_t all = 0;
  for (const Segment& segment : segments) all += segment.row_count;
  // Few tokens are spread over the pool rather than gathered.
  const int64_t share = (all * heads + 2 * threads - 1) / (2 * threads);
  const int64_t most = std::clamp<int64_t>(share, 1, std::max<int64_t>(1, kQueryRows / group));
  const std::vector<Member> members = cut(segments, most);

  struct Bounds {
    size_t token_begin, token_end, run_begin, run_end;
  };
  std::vector<Bounds> bounds;
  for (size_t begin = 0; begin < members.size();) {
    const size_t token_begin = tokens.size(), run_begin = runs.size();
    size_t end = begin;
    int64_t count = 0;
    while (end < members.size() && count + members[end].count <= most &&
           (end == begin || common_blocks(members[end - 1], members[end]) > 0)) {
      const Member& m = members[end++];
      count += m.count;
      for (int64_t t = 0; t < m.count; ++t) tokens.push_back({m.row + t, m.position + t});
    }
    add_runs(shape, std::span(members).subspan(begin, end - begin), 0, 0, runs);
    bounds.push_back({token_begin, tokens.size(), run_begin, runs.size()});
    begin = end;
  }

  int64_t total = 0;  // of query rows x blocks
  for (const Bounds& b : bounds) {
    Tile tile{std::span<const Token>(tokens).subspan(b.token_begin, b.token_end - b.token_begin),
              std::span<const Run>(runs).subspan(b.run_begin, b.run_end - b.run_begin),
              runs[b.run_begin].first_block, 0};
    for (const Run& run : tile.runs) {
      tile.first_block = std::min(tile.first_block, run.first_block);
      tile.end_block = std::max(tile.end_block, run.end_block);
    }
    tiles.push_back(tile);
  }
  const auto cost = [](const Tile& tile) {
    return static_cast<int64_t>(tile.tokens.size()) * (tile.end_block - tile.first_block);
  };
  for (const Tile& tile : tiles) total += cost(tile) * heads;
  // The long ones first: the short ones fill what they leave.
  std::stable_sort(tiles.begin(), tiles.end(),
                   [&](const Tile& a, const Tile& b) { return cost(a) > cost(b); });
  for (const Tile& tile : tiles) {
    const int64_t chunks = tile.end_chunk() - tile.first_chunk();
    const bool is_split = threads > 1 && chunks > 1 && cost(tile) * 4 * threads > total;
    const int64_t floats =
        attention_partial_floats(static_cast<int64_t>(tile.tokens.size()) * group, shape.head_dim);
    for (int64_t head = 0; head < heads; ++head) {
      if (!is_split) {
        items.push_back({&tile, head, -1, 0});
        continue;
      }
      merges.push_back({&tile, head, partial_floats});
      for (int64_t chunk = tile.first_chunk(); chunk < tile.end_chunk(); ++chunk) {
        items.push_back({&tile, head, chunk, partial_floats});
        partial_floats += floats;
      }
    }
  }
}

}  // namespace alignpro::ops
