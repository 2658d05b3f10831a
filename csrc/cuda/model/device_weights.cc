#include "device_weights.h"

#include <cstring>
#include <numeric>
#include <vector>

#include "../checks.h"
#include "../products.h"
#include "alignpro/core/error.h"
#include "alignpro/model/rope_angles.h"
#include "alignpro/model/transformer.h"
#include "alignpro/model/weights.h"
#include "alignpro/ops/kv_view.h"

namespace alignpro::cuda {
namespace {

// Of the checkpoint in so wide values, without the small vectors.
int64_t matrix_bytes(const model::ModelConfig& c, int64_t width) {
  int64_t values = c.vocab_size * c.hidden_size * (c.tied_head ? 1 : 2);
  for (const model::LinearSite site : model::kLinearSites) {
    const model::LinearShape shape = model::linear_shape(c, site);
    values += c.num_layers * shape.outputs * shape.inputs;
  }
  return values * width;
}

// What cannot run says so before anything is loaded. Returns the config.
const model::ModelConfig& runnable(const model::ModelConfig& c, DType dtype) {
  if (const std::string reason = unavailable_reason(); !reason.empty()) {
    throw Unavailable(cat("device cuda: ", reason));
  }
  (void)products();
  require(dtype == DType::kF32 || dtype == DType::kBF16,
          "compute: expected bfloat16 or float32 on device cuda, got ", dtype_name(dtype));
  const int64_t pack = pack_size(dtype);
  const auto whole = [&](const char* name, int64_t size) {
    require(size % pack == 0, "device cuda: ", name, ": expected a multiple of ", pack, " in ",
            dtype_name(dtype), ", the model has ", size, "; use device cpu");
  };
  whole("hidden_size", c.hidden_size);
  whole("intermediate_size", c.intermediate_size);
  whole("head_dim", c.head_dim);
  require(c.head_dim <= kMaxHeadDim, "device cuda: head_dim: expected at most ", kMaxHeadDim,
          ", the model has ", c.head_dim, "; use device cpu");
  require(c.vocab_size <= kMaxVocabulary, "device cuda: vocab_size: expected at most ",
          kMaxVocabulary, ", the model has ", c.vocab_size, "; use device cpu");
  const int64_t wanted = matrix_bytes(c, block_bytes(dtype)), free = free_memory();
  if (wanted > free) {
    throw Unavailable(cat("device cuda: the weights need ", wanted >> 20, " MB in ",
                          dtype_name(dtype), ", ", free >> 20, " MB of ", device_name(),
                          " are free; free some, or use device cpu"));
  }
  return c;
}

Matrix upload(MatrixStore& store, const std::vector<ops::QuantizedRow>& rows, int64_t cols) {
  const DType dtype = store.dtype();
  return store.add(static_cast<int64_t>(rows.size()), cols, [&](int64_t row, std::byte* out) {
    const ops::QuantizedRow& from = rows[static_cast<size_t>(row)];
    if (from.dtype == dtype) {
      std::memcpy(out, from.data, static_cast<size_t>(row_bytes(dtype, cols)));
      return;
    }
    thread_local std::vector<float> values;
    values.resize(static_cast<size_t>(cols));
    dequantize(from.dtype, from.data, cols, values.data());
    round_row(dtype, values.data(), cols, out);
  });
}

}  // namespace

DeviceWeights::DeviceWeights(const model::Checkpoint& checkpoint, DType dtype_,
                             int64_t context_length_, ThreadPool& pool, const Mode& mode)
    : config(runnable(checkpoint.config(), dtype_)),
      context_length(context_length_),
      dtype(dtype_),
      device(current_device()),
      fast(mode.fast ? open_fast_library(mode.library_folders) : nullptr),
      store_(dtype, &pool) {
  embedding = head = upload(store_, checkpoint.embedding_rows(), config.hidden_size);
  if (!config.tied_head) head = upload(store_, checkpoint.head_rows(), config.hidden_size);
  final_norm = store_.add(checkpoint.read_final_norm());
  for (int64_t l = 0; l < config.num_layers; ++l) {
    DeviceLayer& layer = layers.emplace_back();
    for (const model::LinearSite site : model::kLinearSites) {
      layer.linears[static_cast<size_t>(site)] =
          upload(store_, checkpoint.linear_rows(l, site), model::linear_shape(config, site).inputs);
    }
    const auto norm = [&](model::NormSite site) {
      return store_.add(checkpoint.read_norm(l, site));
    };
    layer.attention_norm = norm(model::NormSite::kAttention);
    layer.mlp_norm = norm(model::NormSite::kMlp);
    layer.q_norm = config.qk_norm ? norm(model::NormSite::kQ) : nullptr;
    layer.k_norm = config.qk_norm ? norm(model::NormSite::kK) : nullptr;
    const std::vector<float> bias = checkpoint.read_qkv_bias(l);
    layer.qkv_bias = bias.empty() ? nullptr : store_.add(bias);
  }
  bytes_ = store_.bytes();
  const model::RopeAngles angles(config.rope, context_length);
  std::vector<int32_t> positions(static_cast<size_t>(context_length));
  std::iota(positions.begin(), positions.end(), 0);
  std::vector<float> cosines(static_cast<size_t>(context_length * angles.half()));
  std::vector<float> sines(cosines.size());
  angles.compute(positions, cosines.data(), sines.data());
  cos = store_.add_float32(cosines);
  sin = store_.add_float32(sines);
  store_.finish();
}

AttentionShape DeviceWeights::attention() const {
  const ops::AttentionShape shape = model::attention_shape(config);
  return {shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.sliding_window, shape.scale};
}

int64_t DeviceWeights::streamed_bytes() const {
  const int64_t table = config.vocab_size * config.hidden_size * block_bytes(dtype);
  return bytes() - (config.tied_head ? 0 : table);
}

PagedKv DeviceWeights::kv_layer(void* pool, int64_t count, int64_t layer) const {
  const int64_t half = ops::kKvBlock * config.head_dim, own = config.num_kv_heads * 2 * half;
  return {at(pool, layer * own * block_bytes(dtype)), count * own, 2 * half, half};
}

int64_t DeviceWeights::kv_block_bytes() const {
  return config.num_layers * config.num_kv_heads * 2 * config.head_dim * ops::kKvBlock *
         block_bytes(dtype);
}

}  // namespace alignpro::cuda
