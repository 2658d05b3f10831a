#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace alignpro::model {

enum class Family { kLlama, kMistral, kQwen2, kQwen3, kPhi3, kSmolLm3, kGemma3 };

std::string_view family_name(Family family);

enum class RopeScaling { kNone, kLinear, kLlama3, kLongrope, kYarn };

// Rotary position embedding, half-split convention: lane i pairs with lane i + rotary_dim / 2.
struct RopeConfig {
  double theta = 10000.0;
  int64_t rotary_dim = 0;  // head_dim unless the family rotates only a part
  RopeScaling scaling = RopeScaling::kNone;
  double factor = 1.0;                // linear, llama3, yarn
  double low_freq_factor = 1.0;       // llama3
  double high_freq_factor = 4.0;      // llama3
  int64_t original_context = 0;       // llama3, longrope, yarn: positions of pre-training
  std::vector<double> short_factors;  // longrope, [rotary_dim / 2]
  std::vector<double> long_factors;   // longrope, [rotary_dim / 2]
  double attention_factor = 1.0;      // longrope, yarn: multiplies cos and sin
  // yarn (arXiv 2309.00071): lanes that turn more often than beta_fast within original_context keep
  // their frequency, below beta_slow it is divided by factor; the bounds are whole lanes or not.
  double beta_fast = 32.0;
  double beta_slow = 1.0;
  bool whole_lanes = true;
  std::vector<double> freq_factors;  // [rotary_dim / 2] divisors stored in the file; empty: none
};

// What every family reduces to. Anything a file asks for that is not expressed here is refused by
// name when the file is read, never ignored.
struct ModelConfig {
  Family family = Family::kLlama;
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_layers = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t context_length = 0;  // positions the model was made for
  int64_t sliding_window = 0;  // a token sees this many positions, itself included; 0: all
  double rms_eps = 1e-5;
  bool tied_head = false;
  bool qkv_bias = false;
  bool qk_norm = false;            // RMSNorm over head_dim on q and k before rope (Qwen3)
  bool fused_projections = false;  // one file matrix for QKV and one for gate-up (Phi-3)
  bool output_norms = false;       // RMSNorm on what attention and MLP add to the stream (Gemma 3)
  bool gelu = false;               // of the gate, where others have SiLU (Gemma 3)
  bool scaled_embedding = false;   // the embedding times sqrt(hidden_size) (Gemma 3)
  bool with_images = false;        // an encoder of images lies beside, and is left out (Gemma 3)
  double query_scalar = 0.0;       // scores are over its square root; 0: head_dim
  RopeConfig rope;
  std::vector<int64_t> unrotated_layers;  // whose q and k rope leaves as they are (SmolLM3)
  // Gemma 3: these see sliding_window positions and turn by local_rope, the others see all. Empty:
  // all layers have the window, or none.
  std::vector<int64_t> local_layers;
  RopeConfig local_rope;
  int32_t bos_id = -1;           // -1: none
  std::vector<int32_t> eos_ids;  // every id that ends a text (end_of_text.h)

  // Of attention_kinds(): 1 for an unrotated or a local layer.
  size_t attention_kind(int64_t layer) const {
    const auto names = [layer](const std::vector<int64_t>& layers) {
      return std::ranges::find(layers, layer) != layers.end();
    };
    return names(unrotated_layers) || names(local_layers) ? 1 : 0;
  }
  int64_t q_size() const { return num_heads * head_dim; }
  int64_t kv_size() const { return num_kv_heads * head_dim; }
  int64_t qkv_size() const { return q_size() + 2 * kv_size(); }
};

// Throws FileError beginning with `source` unless sizes are positive, bounded and consistent.
void validate(const ModelConfig& config, const std::string& source);

// Positions that a model is loaded for: `wanted`, or with 0 its own (for longrope, those of
// pre-training). Throws InvalidArgument for more than it was made for.
int64_t choose_context(const ModelConfig& config, int64_t wanted);

}  // namespace alignpro::model
