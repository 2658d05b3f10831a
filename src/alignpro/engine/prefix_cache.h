#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <set>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "alignpro/model/kv_pool.h"

namespace alignpro::engine {

// Who owns which KV block. A trie whose edges are blocks of tokens: a node's block holds the KV of
// its tokens after those of its ancestors, under one root per weight version (contract 5: versions
// are never reused, so what an old adapter left cannot be reached, only evicted). Sequences hold
// references on whole paths; what nobody holds stays as a cache until its block is needed.
// Knows block ids and tokens, never a float. One thread at a time.
class PrefixCache {
 public:
  struct Node {
    int32_t block = -1;  // -1: a root
    int32_t references = 0;
    int32_t size = 0;  // tokens; kKvBlock, or fewer for the tail of a prompt (never has children)
    std::array<int32_t, model::kKvBlock> tokens{};
    Node* parent = nullptr;
    std::vector<Node*> children;
    uint64_t version = 0;  // roots: the weights
    uint64_t id = 0;       // unique for ever: a path's identity in the index
    uint64_t last_use = 0;

    std::span<const int32_t> text() const { return {tokens.data(), static_cast<size_t>(size)}; }
  };

  // The blocks of one sequence, from acquire() to release().
  struct BlockTable {
    Node* root = nullptr;         // null when sharing is off
    std::vector<Node*> path;      // nodes of the leading blocks, all visible to others
    std::vector<int32_t> blocks;  // every block, in order; those past `path` are private
    int64_t cached = 0;           // leading positions whose KV need not be computed
    // To be copied before anything is written: the first copy_slots positions of a block.
    int32_t copy_from = -1;
    int32_t copy_to = -1;
    int64_t copy_slots = 0;
  };

  PrefixCache(int64_t capacity, bool sharing);

  // Positions of `tokens` that acquire() would find computed.
  int64_t cached_tokens(uint64_t version, std::span<const int32_t> tokens) const;

  // Room for `blocks` blocks, beginning with what is cached of `tokens`; nothing when they do not
  // fit beside the sequences that run now. `blocks` <= capacity always fits once nobody else runs.
  std::optional<BlockTable> acquire(uint64_t version, std::span<const int32_t> tokens,
                                    int64_t blocks);

  // Makes a block_table's blocks visible up to `computed`, its tokens whose KV has been written:
  // whole blocks, and the tail too if the prompt ends there (its samples then copy it). Where
  // another sequence published the same tokens first, the block_table changes to that block: the
  // bits are equal (contract 2).
  void publish(BlockTable& block_table, std::span<const int32_t> computed, bool is_prompt_end);

  void release(BlockTable& block_table);

  int64_t capacity() const { return static_cast<int64_t>(nodes_.size()); }
  int64_t blocks_in_use() const { return capacity() - blocks_free() - blocks_cached(); }
  int64_t blocks_cached() const { return unreferenced_; }
  int64_t blocks_free() const { return static_cast<int64_t>(free_.size()); }

 private:
  struct Match {
    std::vector<Node*> path;  // whole blocks
    Node* partial = nullptr;  // begins with the next partial_tokens tokens
    int64_t partial_tokens = 0;
  };

  Match match(uint64_t version, std::span<const int32_t> tokens) const;
  Node* find_child(const Node& parent, std::span<const int32_t> tokens) const;
  Node& root(uint64_t version);
  Node* insert(Node& parent, std::span<const int32_t> tokens, int32_t block);
  void index(Node& node);
  void remove(Node& node);  // from the trie; its block becomes free
  void hold(Node& node);
  void drop(Node& node);
  bool evict_one();

  const bool sharing_;
  std::vector<Node> nodes_;    // by block id; in the trie where parent is set
  std::vector<int32_t> free_;  // last in, first out: keeps touched pages in use
  std::unordered_map<uint64_t, Node> roots_;
  std::unordered_multimap<uint64_t, Node*> index_;  // whole blocks by hash of (parent, tokens)
  std::set<std::pair<uint64_t, Node*>> evictable_;  // unreferenced leaves by last use
  int64_t unreferenced_ = 0;
  int64_t max_unreferenced_;
  uint64_t clock_ = 0;
};

}  // namespace alignpro::engine
