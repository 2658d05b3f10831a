#include "alignpro/model/prefix_tree.h"

#include <algorithm>
#include <numeric>

namespace alignpro::model {
namespace {

int64_t inputs(std::span<const int32_t> sequence) {
  return static_cast<int64_t>(sequence.size()) - 1;
}

}  // namespace

PrefixTree::PrefixTree(std::span<const std::span<const int32_t>> sequences)
    : leaf_(sequences.size(), -1) {
  std::vector<int64_t> sorted(sequences.size());
  std::iota(sorted.begin(), sorted.end(), 0);
  const auto by_inputs = [&](int64_t a, int64_t b) {
    const auto x = sequences[static_cast<size_t>(a)].first(
        static_cast<size_t>(inputs(sequences[static_cast<size_t>(a)])));
    const auto y = sequences[static_cast<size_t>(b)].first(
        static_cast<size_t>(inputs(sequences[static_cast<size_t>(b)])));
    return std::lexicographical_compare(x.begin(), x.end(), y.begin(), y.end());
  };
  std::stable_sort(sorted.begin(), sorted.end(), by_inputs);
  // Sequences of one token have no input.
  const auto first = std::find_if(sorted.begin(), sorted.end(), [&](int64_t s) {
    return inputs(sequences[static_cast<size_t>(s)]) > 0;
  });
  grow(sequences, {first, sorted.end()}, 0, -1);
  for (Node& node : nodes_) {  // nodes_ no longer moves: spans may point into it
    batch_.segments.push_back({node.row_begin, node.row_count, node.position, node.path_blocks});
    segment_rows_.push_back({node.row_begin, node.row_count, node.position, node.path_rows});
  }
}

void PrefixTree::grow(std::span<const std::span<const int32_t>> sequences,
                      std::span<const int64_t> sorted, int64_t depth, int64_t parent) {
  // Members agree on their first `depth` inputs. Split by the next one; a member without one ends.
  size_t begin = 0;
  while (begin < sorted.size() && inputs(sequences[static_cast<size_t>(sorted[begin])]) == depth) {
    leaf_[static_cast<size_t>(sorted[begin++])] = parent;
  }
  while (begin < sorted.size()) {
    const auto first = sequences[static_cast<size_t>(sorted[begin])];
    size_t end = begin + 1;
    while (end < sorted.size() &&
           sequences[static_cast<size_t>(sorted[end])][static_cast<size_t>(depth)] ==
               first[static_cast<size_t>(depth)]) {
      ++end;
    }
    // Sorted: what the first and the last share, all share.
    const auto last = sequences[static_cast<size_t>(sorted[end - 1])];
    const int64_t limit = std::min(inputs(first), inputs(last));
    int64_t common = depth + 1;
    while (common < limit &&
           first[static_cast<size_t>(common)] == last[static_cast<size_t>(common)]) {
      ++common;
    }
    const int64_t node =
        add_node(first.subspan(static_cast<size_t>(depth), static_cast<size_t>(common - depth)),
                 depth, parent);
    grow(sequences, sorted.subspan(begin, end - begin), common, node);
    begin = end;
  }
}

int64_t PrefixTree::add_node(std::span<const int32_t> tokens, int64_t position, int64_t parent) {
  Node node;
  node.row_begin = batch_.rows();
  node.row_count = static_cast<int64_t>(tokens.size());
  node.position = position;
  if (parent >= 0) {
    node.path_rows = nodes_[static_cast<size_t>(parent)].path_rows;
    node.path_blocks = nodes_[static_cast<size_t>(parent)].path_blocks;
  }
  // A block that the parent filled in part is copied: its rows are written here too.
  const int64_t shared = position % ops::kKvBlock;
  if (shared > 0) {
    node.path_blocks.back() = next_block_++;
    for (int64_t slot = 0; slot < shared; ++slot) {
      batch_.kv_writes.push_back({node.path_rows[static_cast<size_t>(position - shared + slot)],
                                  node.path_blocks.back(), static_cast<int32_t>(slot)});
    }
  }
  for (size_t i = 0; i < tokens.size(); ++i) {
    const int64_t at = position + static_cast<int64_t>(i);
    const auto row = static_cast<int32_t>(batch_.rows());
    if (at % ops::kKvBlock == 0) node.path_blocks.push_back(next_block_++);
    batch_.tokens.push_back(tokens[i]);
    batch_.positions.push_back(static_cast<int32_t>(at));
    batch_.kv_writes.push_back(
        {row, node.path_blocks.back(), static_cast<int32_t>(at % ops::kKvBlock)});
    node.path_rows.push_back(row);
  }
  nodes_.push_back(std::move(node));
  return static_cast<int64_t>(nodes_.size()) - 1;
}

}  // namespace alignpro::model
