#include "alignpro/model/model.h"

#include <utility>

#include "alignpro/model/checkpoint.h"
#include "alignpro/model/kv_pool.h"
#include "alignpro/model/session.h"

namespace alignpro::model {

Model::Model(std::unique_ptr<ops::Device> device, Weights weights, int64_t context_length)
    : device_(std::move(device)), weights_(std::move(weights)), context_length_(context_length) {}

std::shared_ptr<Model> Model::load(const ModelFiles& files, std::unique_ptr<ops::Device> device,
                                   int64_t context_length) {
  return from(*Checkpoint::open(files), std::move(device), context_length);
}

std::shared_ptr<Model> Model::from(const Checkpoint& checkpoint,
                                   std::unique_ptr<ops::Device> device, int64_t context_length) {
  const int64_t context = choose_context(checkpoint.config(), context_length);
  Weights weights = Weights::load(checkpoint, *device, context);
  return std::shared_ptr<Model>(new Model(std::move(device), std::move(weights), context));
}

int64_t Model::kv_block_bytes() const {
  const ModelConfig& c = config();
  return KvPool::block_bytes(c.num_layers, c.num_kv_heads, c.head_dim, device_->kv_dtype());
}

int64_t Model::kv_share_bytes() const {
  const ops::Device::Scope scope(*device_);
  return device_->kv_share_bytes();
}

std::unique_ptr<Session> Model::make_session(int64_t kv_blocks) const {
  const ops::Device::Scope scope(*device_);
  return std::make_unique<ModelSession>(*this, kv_blocks);
}

}  // namespace alignpro::model
