#pragma once

// LoRA matrices on the device. Ranks are padded with zeros to whole 16 bytes, which changes no bit.

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "alignpro/model/adapter.h"
#include "matrix_store.h"

namespace alignpro::cuda {

// The ranks of a site's update on a device, padding included; 0: there is none.
int64_t device_ranks(const model::Adapter& adapter, int64_t layer, model::LinearSite site,
                     DType dtype);

// One site's update: scale (x a^T) b^T. Without ranks there is none.
struct DeviceLowRank {
  Matrix a, b;  // [ranks, inputs], [outputs, ranks]
  float scale = 0.0f;

  int64_t ranks() const { return a.rows; }
};

class DeviceAdapter {
 public:
  DeviceAdapter(const model::Adapter& adapter, int64_t num_layers, DType dtype);

  const DeviceLowRank& update(int64_t layer, model::LinearSite site) const {
    return sites_[static_cast<size_t>(layer)][static_cast<size_t>(site)];
  }
  int64_t most_ranks() const { return most_ranks_; }  // of any one site
  uint64_t version() const { return version_; }

 private:
  uint64_t version_;
  int64_t most_ranks_ = 0;
  MatrixStore store_;
  std::vector<std::array<DeviceLowRank, 4>> sites_;
};

// A model's adapters, uploaded when first used; the least recently used go. Any thread.
class DeviceAdapters {
 public:
  DeviceAdapters(int64_t num_layers, DType dtype) : num_layers_(num_layers), dtype_(dtype) {}

  // Hold on to it until the work that reads it is done.
  std::shared_ptr<const DeviceAdapter> get(const model::Adapter& adapter);

 private:
  struct Entry {
    std::shared_ptr<const DeviceAdapter> adapter;
    uint64_t last_use;
  };

  const int64_t num_layers_;
  const DType dtype_;
  std::mutex mutex_;
  uint64_t clock_ = 0;
  std::map<uint64_t, Entry> by_version_;
};

}  // namespace alignpro::cuda
