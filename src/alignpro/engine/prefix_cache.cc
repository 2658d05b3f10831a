#include "alignpro/engine/prefix_cache.h"

#include <algorithm>

namespace alignpro::engine {
namespace {

using model::kKvBlock;

uint64_t hash_block(uint64_t parent_id, std::span<const int32_t> tokens) {
  uint64_t hash = parent_id * 0x9E3779B97F4A7C15u + 0x632BE59BD9B4E019u;
  for (const int32_t token : tokens) {
    hash = (hash ^ static_cast<uint32_t>(token)) * 0xFF51AFD7ED558CCDu;
    hash ^= hash >> 32;
  }
  return hash;
}

// Idle blocks are a cache, not a claim on memory: at most a quarter of the pool, and 4096
// positions, which hold the prompts of a step or two.
constexpr int64_t kMaxIdleBlocks = 256;

int64_t common_prefix(std::span<const int32_t> a, std::span<const int32_t> b) {
  return std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin();
}

}  // namespace

PrefixCache::PrefixCache(int64_t capacity, bool sharing)
    : sharing_(sharing),
      nodes_(static_cast<size_t>(capacity)),
      max_unreferenced_(std::min(capacity / 4, kMaxIdleBlocks)) {
  free_.reserve(nodes_.size());
  for (int64_t block = capacity; block-- > 0;) {
    nodes_[static_cast<size_t>(block)].block = static_cast<int32_t>(block);
    free_.push_back(static_cast<int32_t>(block));
  }
}

PrefixCache::Match PrefixCache::match(uint64_t version, std::span<const int32_t> tokens) const {
  Match found;
  const auto start = roots_.find(version);
  if (!sharing_ || start == roots_.end()) return found;
  const Node* at = &start->second;
  while (tokens.size() >= kKvBlock) {
    Node* child = find_child(*at, tokens.first(kKvBlock));
    if (child == nullptr) break;
    found.path.push_back(child);
    at = child;
    tokens = tokens.subspan(kKvBlock);
  }
  for (Node* child : at->children) {
    const int64_t shared = common_prefix(child->text(), tokens);
    if (shared > found.partial_tokens) {
      found.partial = child;
      found.partial_tokens = shared;
    }
  }
  return found;
}

int64_t PrefixCache::cached_tokens(uint64_t version, std::span<const int32_t> tokens) const {
  const Match found = match(version, tokens);
  return static_cast<int64_t>(found.path.size()) * kKvBlock + found.partial_tokens;
}

std::optional<PrefixCache::BlockTable> PrefixCache::acquire(uint64_t version,
                                                            std::span<const int32_t> tokens,
                                                            int64_t blocks) {
  const Match found = match(version, tokens);
  const auto shared = static_cast<int64_t>(found.path.size());
  const auto idle = std::count_if(found.path.begin(), found.path.end(),
                                  [](const Node* node) { return node->references == 0; });
  if (blocks - shared > blocks_free() + unreferenced_ - idle) return std::nullopt;

  BlockTable block_table;
  if (sharing_) {
    block_table.root = &root(version);
    ++block_table.root->references;
  }
  for (Node* node : found.path) {
    hold(*node);
    block_table.path.push_back(node);
    block_table.blocks.push_back(node->block);
  }
  block_table.cached = shared * kKvBlock;
  // The block to copy from must not be evicted for its own copy; where memory is that short, the
  // few tokens are computed again.
  Node* source = found.partial;
  if (source != nullptr) hold(*source);
  if (source != nullptr && blocks - shared > blocks_free() + unreferenced_) {
    drop(*source);
    source = nullptr;
  }
  while (static_cast<int64_t>(block_table.blocks.size()) < blocks) {
    if (free_.empty()) evict_one();
    block_table.blocks.push_back(free_.back());
    free_.pop_back();
  }
  if (source != nullptr) {
    block_table.copy_from = source->block;
    block_table.copy_to = block_table.blocks[static_cast<size_t>(shared)];
    block_table.copy_slots = found.partial_tokens;
    block_table.cached += found.partial_tokens;
    drop(*source);
  }
  return block_table;
}

void PrefixCache::publish(BlockTable& block_table, std::span<const int32_t> computed,
                          bool is_prompt_end) {
  if (!sharing_) return;
  const auto parent_of = [&](size_t block) -> Node& {
    return block == 0 ? *block_table.root : *block_table.path[block - 1];
  };
  const auto end = computed.size() / kKvBlock;
  size_t block = block_table.path.size();
  if (block > 0 && block_table.path.back()->size < kKvBlock)
    --block;  // the prompt's tail, to be filled
  for (; block < end; ++block) {
    const auto tokens = computed.subspan(block * kKvBlock, kKvBlock);
    Node* own = block < block_table.path.size() ? block_table.path[block] : nullptr;
    Node* twin = find_child(parent_of(block), tokens);
    if (twin != nullptr) {
      hold(*twin);
      if (own != nullptr) {
        drop(*own);
        remove(*own);
        block_table.path.pop_back();
      } else {
        free_.push_back(block_table.blocks[block]);
      }
      block_table.blocks[block] = twin->block;
      block_table.path.push_back(twin);
    } else if (own != nullptr) {
      std::copy(tokens.begin(), tokens.end(), own->tokens.begin());
      own->size = static_cast<int32_t>(kKvBlock);
      index(*own);
    } else {
      block_table.path.push_back(insert(parent_of(block), tokens, block_table.blocks[block]));
    }
  }
  const auto tail = computed.subspan(end * kKvBlock);
  if (!is_prompt_end || tail.empty() || block_table.path.size() > end) return;
  Node& parent = parent_of(end);
  const bool known =
      std::any_of(parent.children.begin(), parent.children.end(), [&](const Node* child) {
        return common_prefix(child->text(), tail) == static_cast<int64_t>(tail.size());
      });
  if (!known) block_table.path.push_back(insert(parent, tail, block_table.blocks[end]));
}

void PrefixCache::release(BlockTable& block_table) {
  for (size_t block = block_table.path.size(); block < block_table.blocks.size(); ++block) {
    free_.push_back(block_table.blocks[block]);
  }
  // Leaf first, so that a path's end is older than its beginning.
  for (auto node = block_table.path.rbegin(); node != block_table.path.rend(); ++node) drop(**node);
  if (block_table.root != nullptr && --block_table.root->references == 0 &&
      block_table.root->children.empty()) {
    roots_.erase(block_table.root->version);
  }
  block_table = {};
  while (unreferenced_ > max_unreferenced_ && evict_one()) {
  }
}

PrefixCache::Node* PrefixCache::find_child(const Node& parent,
                                           std::span<const int32_t> tokens) const {
  const auto [begin, end] = index_.equal_range(hash_block(parent.id, tokens));
  for (auto at = begin; at != end; ++at) {
    Node* node = at->second;
    if (node->parent == &parent && std::ranges::equal(node->text(), tokens)) return node;
  }
  return nullptr;
}

PrefixCache::Node& PrefixCache::root(uint64_t version) {
  const auto [at, is_new] = roots_.try_emplace(version);
  if (is_new) {
    at->second.version = version;
    at->second.id = ++clock_;
  }
  return at->second;
}

PrefixCache::Node* PrefixCache::insert(Node& parent, std::span<const int32_t> tokens,
                                       int32_t block) {
  Node& node = nodes_[static_cast<size_t>(block)];
  node.references = 1;  // the sequence that computed it
  node.size = static_cast<int32_t>(tokens.size());
  std::copy(tokens.begin(), tokens.end(), node.tokens.begin());
  node.parent = &parent;
  node.id = ++clock_;
  node.last_use = clock_;
  parent.children.push_back(&node);
  if (node.size == kKvBlock) index(node);
  return &node;
}

void PrefixCache::index(Node& node) {
  index_.emplace(hash_block(node.parent->id, node.text()), &node);
}

void PrefixCache::remove(Node& node) {
  const auto [begin, end] = index_.equal_range(hash_block(node.parent->id, node.text()));
  for (auto at = begin; at != end; ++at) {
    if (at->second == &node) {
      index_.erase(at);
      break;
    }
  }
  evictable_.erase({node.last_use, &node});
  unreferenced_ -= node.references == 0 ? 1 : 0;
  Node& parent = *node.parent;
  std::erase(parent.children, &node);
  node.parent = nullptr;
  free_.push_back(node.block);
  if (!parent.children.empty() || parent.references > 0) return;
  if (parent.block < 0) {
    roots_.erase(parent.version);
  } else {
    evictable_.insert({parent.last_use, &parent});
  }
}

void PrefixCache::hold(Node& node) {
  if (node.references++ > 0) return;
  --unreferenced_;
  evictable_.erase({node.last_use, &node});
}

void PrefixCache::drop(Node& node) {
  if (--node.references > 0) return;
  ++unreferenced_;
  node.last_use = ++clock_;
  if (node.children.empty()) evictable_.insert({node.last_use, &node});
}

bool PrefixCache::evict_one() {
  if (evictable_.empty()) return false;
  remove(*evictable_.begin()->second);
  return true;
}

}  // namespace alignpro::engine
