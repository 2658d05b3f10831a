#include "device_adapter.h"

#include <algorithm>

#include "../checks.h"
#include "alignpro/model/weights.h"

namespace alignpro::cuda {
namespace {

constexpr size_t kKept = 8;

// A packed matrix with zeros up to `rows` x `cols`.
Matrix upload(MatrixStore& store, const ops::PackedMatrix& from, int64_t rows, int64_t cols) {
  std::vector<float> values(static_cast<size_t>(cols), 0.0f);
  return store.add(rows, cols, [&](int64_t row, std::byte* out) {
    if (row < from.rows()) {
      from.read_row(row, values.data());
    } else {
      std::fill(values.begin(), values.end(), 0.0f);
    }
    round_row(store.dtype(), values.data(), cols, out);
  });
}

}  // namespace

int64_t device_ranks(const model::Adapter& adapter, int64_t layer, model::LinearSite site,
                     DType dtype) {
  const ops::LowRank* update = adapter.update(layer, site);
  const int64_t pack = pack_size(dtype);
  return update == nullptr ? 0 : (update->ranks() + pack - 1) / pack * pack;
}

DeviceAdapter::DeviceAdapter(const model::Adapter& adapter, int64_t num_layers, DType dtype)
    : version_(adapter.version()), store_(dtype, nullptr), sites_(static_cast<size_t>(num_layers)) {
  for (int64_t l = 0; l < num_layers; ++l) {
    for (const model::LinearSite site : model::kLinearSites) {
      const ops::LowRank* update = adapter.update(l, site);
      if (update == nullptr) continue;
      const int64_t ranks = device_ranks(adapter, l, site, dtype);
      sites_[static_cast<size_t>(l)][static_cast<size_t>(site)] = {
          upload(store_, update->a, ranks, update->a.cols()),
          upload(store_, update->b, update->b.rows(), ranks), update->scale};
      most_ranks_ = std::max(most_ranks_, ranks);
    }
  }
  store_.finish();
}

std::shared_ptr<const DeviceAdapter> DeviceAdapters::get(const model::Adapter& adapter) {
  const std::lock_guard lock(mutex_);
  Entry& entry = by_version_[adapter.version()];
  if (entry.adapter == nullptr) {
    try {
      entry.adapter = std::make_shared<const DeviceAdapter>(adapter, num_layers_, dtype_);
    } catch (...) {
      by_version_.erase(adapter.version());
      throw;
    }
  }
  entry.last_use = ++clock_;
  const std::shared_ptr<const DeviceAdapter> found = entry.adapter;
  while (by_version_.size() > kKept) {
    by_version_.erase(std::min_element(
        by_version_.begin(), by_version_.end(),
        [](const auto& a, const auto& b) { return a.second.last_use < b.second.last_use; }));
  }
  return found;
}

}  // namespace alignpro::cuda
