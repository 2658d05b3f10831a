#include "device_model.h"

#include <utility>

#include "alignpro/core/error.h"
#include "alignpro/core/parallel.h"
#include "device_session.h"

namespace alignpro::cuda {

DeviceModel::DeviceModel(std::shared_ptr<const DeviceWeights> weights)
    : weights_(std::move(weights)),
      adapters_(std::make_shared<DeviceAdapters>(weights_->config.num_layers, weights_->dtype)) {}

std::shared_ptr<DeviceModel> DeviceModel::load(const model::ModelFiles& files, DType compute,
                                               int64_t context_length, int threads,
                                               const Mode& mode) {
  return from(*model::Checkpoint::open(files), compute, context_length, threads, mode);
}

std::shared_ptr<DeviceModel> DeviceModel::from(const model::Checkpoint& checkpoint, DType compute,
                                               int64_t context_length, int threads,
                                               const Mode& mode) {
  const int64_t context = model::choose_context(checkpoint.config(), context_length);
  ThreadPool pool(threads);
  return std::shared_ptr<DeviceModel>(new DeviceModel(
      std::make_shared<const DeviceWeights>(checkpoint, compute, context, pool, mode)));
}

int64_t DeviceModel::kv_share_bytes() const {
  const DeviceScope scope(weights_->device);
  return free_memory() / 2;
}

std::unique_ptr<engine::Session> DeviceModel::make_session(int64_t kv_blocks) const {
  const DeviceScope scope(weights_->device);
  return std::make_unique<DeviceSession>(weights_, adapters_, kv_blocks);
}

}  // namespace alignpro::cuda
