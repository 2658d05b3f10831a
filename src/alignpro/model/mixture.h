#pragma once

#include <concepts>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace alignpro::model {

class Adapter;

// What one of several weights contributes to a draw.
struct Lane {
  std::shared_ptr<const Adapter> adapter;  // null: base weights
  uint64_t version = 0;                    // of the adapter; 0: base weights
  float weight = 1.0f;
};

// prod_k rho_k^w_k, token by token, of models that differ by their adapters alone, or one of them.
// They share the head, so it is the head's softmax of sum_k w_k h_k, the sum of their normed final
// states (MOD, Shi et al. 2024, equation 7; here without any logits but the mixture's own).
class Mixture {
 public:
  struct Member {
    std::shared_ptr<const Adapter> adapter;  // null: base weights
    double weight;
  };

  // Real weights, negative ones too, that sum to 1. Throws InvalidArgument for others, or none.
  explicit Mixture(const std::vector<Member>& members);
  // One alone.
  template <std::convertible_to<std::shared_ptr<const Adapter>> T>
  Mixture(T adapter) : Mixture(std::vector<Member>{{std::move(adapter), 1.0}}) {}

  // Of distinct weights, in the order in which they are summed: members that are one are one lane,
  // and those of weight 0 none. One alone has the weight 1.
  const std::vector<Lane>& lanes() const { return lanes_; }

 private:
  std::vector<Lane> lanes_;
};

}  // namespace alignpro::model
