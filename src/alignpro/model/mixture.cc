#include "alignpro/model/mixture.h"

#include <algorithm>
#include <cmath>

#include "alignpro/core/error.h"
#include "alignpro/model/adapter.h"

namespace alignpro::model {

Mixture::Mixture(const std::vector<Member>& members) {
  require(!members.empty(), "mixture: expected at least one member, got none");
  double sum = 0.0;
  std::vector<double> weights;
  for (const Member& member : members) {
    require(std::isfinite(member.weight), "mixture: expected finite weights, got ", member.weight);
    sum += member.weight;
    const uint64_t version = member.adapter == nullptr ? 0 : member.adapter->version();
    const auto known = std::ranges::find(lanes_, version, &Lane::version);
    if (known != lanes_.end()) {
      weights[static_cast<size_t>(known - lanes_.begin())] += member.weight;
    } else {
      lanes_.push_back({member.adapter, version});
      weights.push_back(member.weight);
    }
  }
  require(std::abs(sum - 1.0) <= 1e-6, "mixture: expected weights that sum to 1, got a sum of ",
          sum);
  for (size_t i = 0; i < lanes_.size(); ++i) lanes_[i].weight = static_cast<float>(weights[i]);
  std::erase_if(lanes_, [](const Lane& lane) { return lane.weight == 0.0f; });
  if (lanes_.size() == 1) lanes_.front().weight = 1.0f;
}

}  // namespace alignpro::model
