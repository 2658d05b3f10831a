// Model files, GGUF and safetensors: what loads, and what happens when they lie.
// Long because every family's file is written out here, for both formats.

#include "alignpro/model/checkpoint.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <filesystem>
#include <limits>
#include <numeric>

#include <doctest/doctest.h>
#include "alignpro/core/error.h"
#include "alignpro/io/gguf.h"
#include "alignpro/io/safetensors.h"
#include "model_file_builder.h"

using namespace alignpro;
using build::Gguf;
using build::JsonFields;
using build::raw;
using build::TempFolder;
using build::tiny_config;
using model::Checkpoint;
using model::LinearSite;
using model::ModelConfig;
using model::NormSite;

namespace {

// A llama of one layer: hidden 32, 2 heads of 16, 1 key-value head, MLP 32, vocabulary 5. A matrix
// in every format; q and k permuted as llama.cpp's converter does it.
Gguf tiny_gguf() {
  Gguf file;
  file.string("general.architecture", "llama")
      .u32("llama.block_count", 1)
      .u32("llama.context_length", 64)
      .u32("llama.embedding_length", 32)
      .u32("llama.feed_forward_length", 32)
      .u32("llama.attention.head_count", 2)
      .u32("llama.attention.head_count_kv", 1)
      .f32("llama.attention.layer_norm_rms_epsilon", 1e-5f)
      .u32("tokenizer.ggml.bos_token_id", 1)
      .u32("tokenizer.ggml.eos_token_id", 2);
  const auto rows = [](int64_t count, const std::string& row) {
    std::string out;
    for (int64_t r = 0; r < count; ++r) out += row;
    return out;
  };
  const std::string q8_row = raw<uint16_t>(0x3c00) + std::string(32, '\x02');  // 1.0 * 2
  const std::string q4_row = raw<uint16_t>(0x3c00) + std::string(16, '\x9a');  // low 10, high 9
  const std::string q41_row = raw<uint16_t>(0x3c00) + raw<uint16_t>(0xc000) + std::string(16, 0x21);
  file.tensors = {{"token_embd.weight", {32, 5}, 8, rows(5, q8_row)},
                  {"blk.0.attn_output.weight", {32, 32}, 2, rows(32, q4_row)},
                  {"blk.0.ffn_gate.weight", {32, 32}, 3, rows(32, q41_row)},
                  {"blk.0.ffn_up.weight", {32, 32}, 2, rows(32, q4_row)},
                  {"blk.0.ffn_down.weight", {32, 32}, 3, rows(32, q41_row)},
                  {"blk.0.attn_v.weight", {32, 16}, 8, rows(16, q8_row)}};
  const std::string ones = build::floats(std::vector<float>(32, 1.0f));
  for (const char* name :
       {"blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"}) {
    file.tensors.push_back({name, {32}, 0, ones});
  }
  // Row r of this house holds the value r: lane j * 8 + i of a head lies at 2 i + j in the file.
  std::string q, k;
  for (int row = 0; row < 32; ++row) {
    const int head = row / 16, i = row % 16 / 2, j = row % 2;
    const float value = static_cast<float>(head * 16 + j * 8 + i);
    for (int c = 0; c < 32; ++c) {
      q += raw(value);
      if (row < 16) k += raw(static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16));
    }
  }
  file.tensors.push_back({"blk.0.attn_q.weight", {32, 32}, 0, q});
  file.tensors.push_back({"blk.0.attn_k.weight", {32, 16}, 30, k});
  return file;
}

// Values count up from 0 through the file.
build::Safetensors tiny_safetensors() {
  build::Safetensors file;
  float next = 0;
  const auto add = [&](const char* name, std::vector<int64_t> shape) {
    const int64_t count =
        std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = next++;
    file.tensors.push_back({name, std::move(shape), std::move(values)});
  };
  add("model.embed_tokens.weight", {5, 4});
  add("model.layers.0.self_attn.q_proj.weight", {4, 4});
  add("model.layers.0.self_attn.k_proj.weight", {2, 4});
  add("model.layers.0.self_attn.v_proj.weight", {2, 4});
  add("model.layers.0.self_attn.o_proj.weight", {4, 4});
  add("model.layers.0.mlp.gate_proj.weight", {3, 4});
  add("model.layers.0.mlp.up_proj.weight", {3, 4});
  add("model.layers.0.mlp.down_proj.weight", {4, 3});
  add("model.layers.0.input_layernorm.weight", {4});
  add("model.layers.0.post_attention_layernorm.weight", {4});
  add("model.norm.weight", {4});
  add("lm_head.weight", {5, 4});
  return file;
}

// Rows [begin, end), expanded.
std::vector<float> expand(const std::vector<ops::QuantizedRow>& rows, size_t begin, size_t end,
                          int64_t cols) {
  std::vector<float> out((end - begin) * static_cast<size_t>(cols));
  for (size_t row = begin; row < end; ++row) {
    dequantize(rows[row].dtype, rows[row].data, cols,
               out.data() + (row - begin) * static_cast<size_t>(cols));
  }
  return out;
}

std::vector<float> expand(const std::vector<ops::QuantizedRow>& rows, int64_t cols) {
  return expand(rows, 0, rows.size(), cols);
}

// Everything a checkpoint holds, expanded: under sanitizers this reads every byte promised.
double read_everything(const Checkpoint& checkpoint) {
  const ModelConfig& config = checkpoint.config();
  double sum = 0;
  const auto take = [&sum](const std::vector<float>& values) {
    for (const float value : values) sum += std::isfinite(value) ? value : 0;
  };
  take(expand(checkpoint.embedding_rows(), config.hidden_size));
  take(expand(checkpoint.head_rows(), config.hidden_size));
  take(checkpoint.read_final_norm());
  for (int64_t l = 0; l < config.num_layers; ++l) {
    for (const LinearSite site :
         {LinearSite::kQkv, LinearSite::kO, LinearSite::kGateUp, LinearSite::kDown}) {
      const std::vector<ops::QuantizedRow> rows = checkpoint.linear_rows(l, site);
      CHECK_EQ(static_cast<int64_t>(rows.size()), linear_shape(config, site).outputs);
      take(expand(rows, linear_shape(config, site).inputs));
    }
    take(checkpoint.read_norm(l, NormSite::kAttention));
    take(checkpoint.read_qkv_bias(l));
  }
  return sum;
}

// True when it loads, false on a FileError that names the file; anything else escapes and fails.
bool loads_or_explains(const std::filesystem::path& path, const std::filesystem::path& culprit) {
  try {
    read_everything(*Checkpoint::open(path));
    return true;
  } catch (const FileError& error) {
    const std::string message = error.what();
    CHECK(message.starts_with(culprit.string()));
    CHECK(message.find('\n') == std::string::npos);
    return false;
  }
}

// Applies `change` to the tiny GGUF and opens it; throws what open() throws.
template <typename Change>
ModelConfig open_changed(Change change) {
  const TempFolder folder;
  Gguf file = tiny_gguf();
  change(file);
  build::write(folder / "m.gguf", file.bytes());
  const auto checkpoint = Checkpoint::open(folder / "m.gguf");
  read_everything(*checkpoint);
  return checkpoint->config();
}

void write_model(const TempFolder& folder, const std::string& weights,
                 const JsonFields& config = tiny_config()) {
  build::write(folder / "config.json", build::json(config));
  build::write(folder / "model.safetensors", weights);
}

// Opens the tiny folder with a different safetensors header.
void open_header(const std::string& from, const std::string& to) {
  const TempFolder folder;
  const build::Safetensors file = tiny_safetensors();
  std::string header = file.header();
  const size_t at = header.find(from);
  CHECK(at != std::string::npos);
  header.replace(at, from.size(), to);
  write_model(folder, file.bytes(header));
  Checkpoint::open(folder.path);
}

}  // namespace

// ---- GGUF --------------------------------------------------------------------------------------

TEST_CASE("gguf config and weights") {
  const TempFolder folder;
  build::write(folder / "m.gguf", tiny_gguf().bytes());
  const auto checkpoint = Checkpoint::open(folder / "m.gguf");
  const ModelConfig& config = checkpoint->config();
  CHECK((config.family == model::Family::kLlama && config.tied_head && !config.qkv_bias));
  CHECK_EQ(config.vocab_size, 5);
  CHECK_EQ(config.head_dim, 16);
  CHECK_EQ(config.num_kv_heads, 1);
  CHECK_EQ(config.rope.rotary_dim, 16);
  CHECK_EQ(config.bos_id, 1);
  CHECK(config.eos_ids == std::vector<int32_t>{2});

  // q and k come back in order; v after them.
  const std::vector<float> qkv = expand(checkpoint->linear_rows(0, LinearSite::kQkv), 32);
  for (int row = 0; row < 64; ++row) {
    const float want = row < 32   ? static_cast<float>(row)
                       : row < 48 ? static_cast<float>(row - 32)
                                  : 2.0f;
    CHECK_EQ(qkv[static_cast<size_t>(row) * 32 + 31], want);
  }

  const std::vector<float> gate_up = expand(checkpoint->linear_rows(0, LinearSite::kGateUp), 32);
  CHECK_EQ(gate_up[0], -1.0f);            // 1 * 1 - 2
  CHECK_EQ(gate_up[16], 0.0f);            // 1 * 2 - 2
  CHECK_EQ(gate_up[32 * 32 + 15], 2.0f);  // 10 - 8
  CHECK_EQ(gate_up[32 * 32 + 16], 1.0f);  // 9 - 8
  CHECK_THROWS_WITH_AS((void)(checkpoint->linear_rows(1, LinearSite::kO)),
                       doctest::Contains("layer 1"), InvalidArgument);
  CHECK_THROWS_WITH_AS((void)(checkpoint->read_norm(0, NormSite::kQ)),
                       doctest::Contains("llama has no such norm"), InvalidArgument);
}

TEST_CASE("gguf metadata types") {
  const TempFolder folder;
  Gguf file;
  const std::string pair = raw<uint32_t>(0) + raw<uint64_t>(2) + "\x01\x02";
  file.set("u64", 10, raw(std::numeric_limits<uint64_t>::max()))
      .set("i8", 1, raw<int8_t>(-3))
      .set("bool", 7, "\x01")
      .set("f64", 12, raw(0.1))
      .set("strings", 9, raw<uint32_t>(8) + raw<uint64_t>(2) + Gguf::text("a") + Gguf::text(""))
      .set("nested", 9, raw<uint32_t>(9) + raw<uint64_t>(2) + pair + pair);
  build::write(folder / "m.gguf", file.bytes());
  const io::GgufFile got(folder / "m.gguf");
  CHECK_EQ(got.integer("i8"), -3);
  CHECK_EQ(got.number("f64"), 0.1);
  CHECK_EQ(*got.find_boolean("bool"), true);
  CHECK_EQ(*got.find("u64")->unsigned_integer(), std::numeric_limits<uint64_t>::max());
  CHECK(!got.find_integer("none"));
  CHECK_THROWS_WITH_AS((void)(got.integer("u64")),
                       doctest::Contains("'u64' must be an integer below 2^63"), FileError);
  CHECK_THROWS_WITH_AS((void)(got.string("i8")),
                       doctest::Contains("'i8' must be a string, it is of type int8"), FileError);
  CHECK_THROWS_WITH_AS((void)(got.integer("none")), doctest::Contains("'none' is missing"),
                       FileError);
  std::string joined;
  got.find("strings")->for_each(
      [&](const io::GgufValue& v) { joined += std::string(*v.string()) + ";"; });
  CHECK_EQ(joined, std::string("a;;"));
  int64_t sum = 0;
  got.find("nested")->for_each([&](const io::GgufValue& inner) {
    inner.for_each([&](const io::GgufValue& v) { sum += *v.integer(); });
  });
  CHECK_EQ(sum, 6);
}

TEST_CASE("gguf truncated at every byte") {
  const TempFolder folder;
  const std::string whole = tiny_gguf().bytes();
  for (size_t size = 1; size < whole.size(); ++size) {
    build::write(folder / "m.gguf", std::string_view(whole).substr(0, size));
    CHECK(!loads_or_explains(folder / "m.gguf", folder / "m.gguf"));
  }
}

TEST_CASE("gguf every header byte flipped") {
  const TempFolder folder;
  const Gguf file = tiny_gguf();
  const std::string whole = file.bytes();
  int refused = 0;
  for (size_t at = 0; at < file.header_bytes(); ++at) {
    for (const int mask : {0x01, 0x80, 0xff}) {
      std::string bytes = whole;
      bytes[at] = static_cast<char>(bytes[at] ^ mask);
      build::write(folder / "m.gguf", bytes);
      refused += loads_or_explains(folder / "m.gguf", folder / "m.gguf") ? 0 : 1;
    }
  }
  CHECK(refused > static_cast<int>(file.header_bytes()));
}

TEST_CASE("gguf lies by name") {
  const TempFolder folder;
  build::write(folder / "page.gguf", "<!DOCTYPE html><html><body>404</body></html>");
  CHECK_THROWS_WITH_AS((void)(Checkpoint::open(folder / "page.gguf")),
                       doctest::Contains("begins with \"<!DOCTYPE html><"), FileError);
  build::write(folder / "g.gguf", "GGUF");
  CHECK_THROWS_WITH_AS((void)(Checkpoint::open(folder / "g.gguf")),
                       doctest::Contains("truncated: the version"), FileError);
  CHECK_THROWS_WITH_AS((void)(Checkpoint::open(folder / "none.gguf")),
                       doctest::Contains("none.gguf: cannot be opened"), FileError);
  CHECK_THROWS_WITH_AS((void)(Checkpoint::open(folder / "model.safetensors")),
                       doctest::Contains("give the folder"), FileError);

  const auto refuses = [](auto change, const char* text) {
    CHECK_THROWS_WITH_AS((void)(open_changed(change)), doctest::Contains(text), FileError);
  };
  constexpr uint64_t kHuge = uint64_t{1} << 62;
  refuses([](Gguf& f) { f.version = 1; }, "GGUF version 1 is not supported");
  refuses([](Gguf& f) { f.version = 3u << 24; }, "big-endian");
  refuses([](Gguf& f) { f.string("general.architecture", "mamba"); }, "architecture 'mamba'");
  refuses([](Gguf& f) { f.metadata.erase(f.metadata.begin() + 1); },
          "'llama.block_count' is missing");
  refuses([](Gguf& f) { f.metadata.push_back(f.metadata.back()); }, "appears twice");
  refuses([](Gguf& f) { f.set("x", 13, ""); }, "unknown metadata type 13");
  refuses([](Gguf& f) { f.set("x", 7, "\x02"); }, "neither 0 nor 1");
  refuses([](Gguf& f) { f.string(std::string(65536, 'k'), ""); }, "over the limit of 65535");
  refuses([](Gguf& f) { f.set("x", 9, raw<uint32_t>(10) + raw(kHuge)); }, "promises");
  refuses([](Gguf& f) { f.set("x", 9, raw<uint32_t>(8) + raw(~uint64_t{0})); }, "promises");
  refuses([](Gguf& f) { f.set("x", 8, raw(~uint64_t{0})); }, "truncated");
  refuses(
      [](Gguf& f) {
        std::string nest;
        for (int i = 0; i < 20; ++i) nest += raw<uint32_t>(9) + raw<uint64_t>(1);
        f.set("x", 9, nest);
      },
      "nests arrays too deeply");
  refuses([](Gguf& f) { f.u32("general.alignment", 48); }, "alignment is 48");
  refuses([](Gguf& f) { f.u32("general.alignment", 0); }, "alignment is 0");
  refuses([](Gguf& f) { f.tensor("token_embd.weight").dims = {0, 5}; }, "dimension 0 is 0");
  refuses([](Gguf& f) { f.tensor("token_embd.weight").dims = {}; }, "has 0 dimensions");
  refuses([](Gguf& f) { f.tensor("token_embd.weight").dims = {1, 1, 1, 1, 1}; }, "5 dimensions");
  refuses([](Gguf& f) { f.tensor("token_embd.weight").dims = {kHuge, kHuge}; }, "overflow");
  refuses([](Gguf& f) { f.tensor("token_embd.weight").dims = {32, ~uint64_t{0}}; }, "dimension 1");
  refuses([](Gguf& f) { f.tensor("output_norm.weight").dims = {kHuge}; }, "overflows");
  refuses([](Gguf& f) { f.tensor("token_embd.weight").dims = {33, 5}; }, "block of 32");
  refuses([](Gguf& f) { f.tensor("token_embd.weight").type = 16; }, "has type IQ2_XXS");
  refuses([](Gguf& f) { f.tensor("token_embd.weight").type = 10; }, "Q2_K's block of 256");
  refuses([](Gguf& f) { f.tensor("token_embd.weight").type = 12; },
          "no multiple of Q4_K's block of 256");
  refuses([](Gguf& f) { f.tensor("token_embd.weight").type = 999; }, "has type number 999");
  refuses([](Gguf& f) { f.tensor("output_norm.weight").offset = 1 << 20; }, "truncated: tensor");
  refuses([](Gguf& f) { f.tensor("output_norm.weight").offset = int64_t{1} << 62; }, "truncated");
  refuses([](Gguf& f) { f.tensor("output_norm.weight").offset = 8; }, "multiple of the alignment");
  refuses([](Gguf& f) { f.tensor("output_norm.weight").offset = 0; }, "overlap");
  refuses([](Gguf& f) { f.tensors.push_back(f.tensors.back()); }, "appears twice");
  refuses([](Gguf& f) { f.tensors.pop_back(); },
          "'blk.0.attn_k.weight' of shape [16, 32] is missing");
  refuses([](Gguf& f) { f.tensor("blk.0.attn_v.weight").dims = {16 * 32}; }, "expected [16, 32]");
  refuses([](Gguf& f) { f.tensors.push_back({"blk.0.attn_q.bias", {1}, 0, raw(0.0f)}); },
          "unknown tensor 'blk.0.attn_q.bias'");
  refuses([](Gguf& f) { f.u32("llama.vocab_size", 6); }, "vocab_size is 6");
  refuses([](Gguf& f) { f.u32("llama.block_count", 0); }, "number of layers is 0");
  refuses([](Gguf& f) { f.u32("llama.block_count", 1u << 31); }, "number of layers");
  refuses([](Gguf& f) { f.u32("llama.attention.head_count", 0); }, "head_count 0");
  refuses([](Gguf& f) { f.u32("llama.attention.head_count_kv", 3); }, "key-value heads");
  refuses([](Gguf& f) { f.string("llama.block_count", "one"); }, "must be an integer");
  refuses([](Gguf& f) { f.u32("llama.rope.dimension_count", 8); }, "expected the head dimension");
  refuses([](Gguf& f) { f.u32("llama.expert_count", 8); }, "mixtures of experts");
  refuses([](Gguf& f) { f.u32("split.count", 2); }, "split GGUF");
  refuses([](Gguf& f) { f.string("llama.rope.scaling.type", "su"); }, "rope scaling 'su'");
}

TEST_CASE("gguf rope") {
  ModelConfig config = open_changed([](Gguf& f) {
    f.f32("llama.rope.scaling.factor", 4.0f).f32("llama.rope.freq_base", 5e5f);
    f.tensors.push_back({"rope_freqs.weight", {8}, 0, build::floats(std::vector<float>(8, 2.0f))});
  });
  CHECK(config.rope.scaling == model::RopeScaling::kLinear);
  CHECK_EQ(config.rope.factor, 4.0);
  CHECK_EQ(config.rope.theta, 5e5);
  CHECK(config.rope.freq_factors == std::vector<double>(8, 2.0));

  config = open_changed([](Gguf& f) {
    f.string("llama.rope.scaling.type", "yarn").f32("llama.rope.scaling.factor", 4.0f);
    f.u32("llama.rope.scaling.original_context_length", 16);
    f.f32("llama.rope.scaling.yarn_beta_fast", 16.0f).f32("llama.rope.scaling.attn_factor", 0.5f);
  });
  CHECK(config.rope.scaling == model::RopeScaling::kYarn);
  CHECK((config.rope.original_context == 16 && config.rope.factor == 4.0));
  CHECK((config.rope.beta_fast == 16.0 && config.rope.beta_slow == 1.0));
  CHECK(std::abs(config.rope.attention_factor - 0.5 * (0.1 * std::log(4.0) + 1.0)) < 1e-12);

  config = open_changed([](Gguf& f) {
    f.u32("llama.rope.scaling.original_context_length", 16);
    f.tensors.push_back(
        {"rope_factors_long.weight", {8}, 0, build::floats(std::vector<float>(8, 3.0f))});
    f.tensors.push_back(
        {"rope_factors_short.weight", {8}, 0, build::floats(std::vector<float>(8, 1.5f))});
  });
  CHECK(config.rope.scaling == model::RopeScaling::kLongrope);
  CHECK_EQ(config.rope.original_context, 16);
  CHECK_EQ(config.rope.long_factors[7], 3.0);
  CHECK_EQ(config.rope.short_factors[0], 1.5);
  // sqrt(1 + ln 4 / ln 16) = sqrt(1.5)
  CHECK(std::abs(config.rope.attention_factor - std::sqrt(1.5)) < 1e-12);
  CHECK_THROWS_WITH_AS((void)(open_changed([](Gguf& f) {
                         f.tensors.push_back({"rope_freqs.weight", {4}, 0, std::string(16, 1)});
                       })),
                       doctest::Contains("'rope_freqs.weight' has shape [4], expected [8]"),
                       FileError);
}

TEST_CASE("gguf end of text") {
  using Token =
      std::pair<std::string, int32_t>;  // text and type: 1 normal, 3 control, 4 the user's
  const auto eos_of = [](const std::vector<Token>& vocabulary,
                         const std::map<std::string, uint32_t>& keys = {}) {
    return open_changed([&](Gguf& f) {
             const auto count = static_cast<uint64_t>(vocabulary.size());
             std::string tokens = raw<uint32_t>(8) + raw(count);
             std::string types = raw<uint32_t>(5) + raw(count);
             for (const auto& [text, type] : vocabulary) {
               tokens += Gguf::text(text);
               types += raw(type);
             }
             f.set("tokenizer.ggml.tokens", 9, tokens).set("tokenizer.ggml.token_type", 9, types);
             for (const auto& [key, id] : keys) f.u32("tokenizer.ggml." + key, id);
           })
        .eos_ids;
  };
  using Ids = std::vector<int32_t>;
  const Token word = {"t", 1};
  // The file names token 2.
  for (const int32_t type : {1, 3, 4}) {
    CHECK_EQ(eos_of({word, {"<|end|>", type}, word, word}), Ids{2, 1});
  }
  CHECK_EQ(eos_of({word, {"</s>", 3}, word}), Ids{2, 1});
  CHECK_EQ(eos_of({word, {"</s>", 1}, word}), Ids{2});  // HTML, as far as one can tell
  CHECK_EQ(eos_of({word, {"<|END|>", 3}, word, {"<|Im_End|>", 3}}), Ids{2});
  CHECK_EQ(
      eos_of({{"<|im_end|>", 1}, word, word, word}, {{"eot_token_id", 3}, {"eom_token_id", 1}}),
      Ids{2, 3, 1, 0});
  CHECK_EQ(eos_of({word}, {{"eot_token_id", 4000}}), Ids{2});  // beyond the vocabulary
  // gpt-oss goes on after the end of a message.
  CHECK_EQ(eos_of({{"<|end|>", 3}, {"<|call|>", 3}, word, {"<|return|>", 3}}), Ids{2, 1, 3});
  CHECK_EQ(eos_of({{"<|end|>", 3}, {"<|call|>", 3}, word}), Ids{2, 0});
}

// ---- safetensors -------------------------------------------------------------------------------

TEST_CASE("safetensors folder") {
  const TempFolder folder;
  write_model(folder, tiny_safetensors().bytes());
  const auto checkpoint = Checkpoint::open(folder.path);
  CHECK(!checkpoint->config().tied_head);
  const std::vector<float> qkv = expand(checkpoint->linear_rows(0, LinearSite::kQkv), 4);
  CHECK_EQ(qkv.size(), size_t{8 * 4});
  for (size_t i = 0; i < qkv.size(); ++i) CHECK_EQ(qkv[i], static_cast<float>(20 + i));
  const std::vector<float> row = expand(checkpoint->head_rows(), 4, 5, 4);
  CHECK_EQ(row[3], 135.0f);  // the last value of the file
  CHECK_EQ(checkpoint->read_final_norm()[0], 112.0f);
}

TEST_CASE("safetensors head beside a tied config") {
  const TempFolder folder;
  JsonFields config = tiny_config();
  config["tie_word_embeddings"] = "true";
  build::Safetensors file = tiny_safetensors();
  const auto named = [&file](const char* name) -> auto& {
    return *std::ranges::find_if(file.tensors, [&](const auto& t) { return t.name == name; });
  };
  write_model(folder, file.bytes(), config);
  {
    const auto checkpoint = Checkpoint::open(folder.path);
    CHECK(!checkpoint->config().tied_head);
    // The last value of the file, which is not the embedding's.
    CHECK_EQ(expand(checkpoint->head_rows(), 4, 5, 4)[3], 135.0f);
  }
  named("lm_head.weight").values = named("model.embed_tokens.weight").values;
  write_model(folder, file.bytes(), config);
  CHECK(Checkpoint::open(folder.path)->config().tied_head);
  std::erase_if(file.tensors, [](const auto& t) { return t.name == "lm_head.weight"; });
  write_model(folder, file.bytes(), config);
  const auto checkpoint = Checkpoint::open(folder.path);
  CHECK(checkpoint->config().tied_head);
  CHECK_EQ(expand(checkpoint->head_rows(), 0, 1, 4)[1], 1.0f);
}

TEST_CASE("safetensors files that count") {
  const TempFolder folder;
  const auto put = [&](const char* name, const std::string& text = "x") {
    build::write(folder / name, text);
  };
  const auto files = [&] { return io::list_weight_files(folder.path); };
  using Names = std::vector<std::string>;
  CHECK_THROWS_WITH_AS((void)files(), doctest::Contains("found none"), FileError);
  put("consolidated.safetensors");
  put("consolidated-00001-of-00001.safetensors");
  put("adapter_model.safetensors");
  CHECK_THROWS_WITH_AS((void)files(), doctest::Contains("found none"), FileError);
  put("part.safetensors");
  CHECK_EQ(files(), Names{"part.safetensors"});
  put("model-00002-of-00002.safetensors");
  CHECK_THROWS_WITH_AS((void)files(), doctest::Contains("shard 1 of 2 is missing"), FileError);
  put("model-00001-of-00002.safetensors");
  const Names shards = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"};
  CHECK_EQ(files(), shards);
  put("model-00001-of-00003.safetensors");
  CHECK_THROWS_WITH_AS((void)files(), doctest::Contains("shards of two builds"), FileError);
  put("model.safetensors.index.json",
      R"({"weight_map": {"a": "model-00001-of-00002.safetensors",
                         "b": "model-00002-of-00002.safetensors"}})");
  CHECK_EQ(files(), shards);
  std::filesystem::remove(folder / "model-00002-of-00002.safetensors");
  CHECK_THROWS_WITH_AS((void)files(), doctest::Contains("00002-of-00002.safetensors' is missing"),
                       FileError);
  put("model.safetensors");  // beside an index of which not every shard is there
  CHECK_EQ(files(), Names{"model.safetensors"});
}

TEST_CASE("safetensors shards") {
  const TempFolder folder;
  build::Safetensors first = tiny_safetensors(), second;
  second.tensors.assign(first.tensors.begin() + 6, first.tensors.end());
  first.tensors.resize(6);
  build::write(folder / "config.json", build::json(tiny_config()));
  build::write(folder / "a.safetensors", first.bytes());
  build::write(folder / "b.safetensors", second.bytes());
  const double want = read_everything(*Checkpoint::open(folder.path));  // no index

  const auto write_index = [&](const std::string& norm_file) {
    JsonFields map;
    for (const auto& t : first.tensors) map[t.name] = "\"a.safetensors\"";
    for (const auto& t : second.tensors) map[t.name] = "\"b.safetensors\"";
    map["model.norm.weight"] = norm_file;
    build::write(folder / "model.safetensors.index.json",
                 "{\"metadata\":{\"total_size\":1},\"weight_map\":" + build::json(map) + "}");
  };
  write_index("\"b.safetensors\"");
  CHECK_EQ(read_everything(*Checkpoint::open(folder.path)), want);
  write_index("\"a.safetensors\"");
  CHECK_THROWS_WITH_AS((void)(Checkpoint::open(folder.path)),
                       doctest::Contains("'model.norm.weight' is not in shard 'a.safetensors'"),
                       FileError);
  write_index("\"c.safetensors\"");
  CHECK_THROWS_WITH_AS((void)(Checkpoint::open(folder.path)),
                       doctest::Contains("shard 'c.safetensors' is missing"), FileError);
  for (const char* escape : {"\"../a.safetensors\"", "\"/etc/passwd\"", "\"..\"", "\"\"", "7"}) {
    write_index(escape);
    CHECK_THROWS_WITH_AS((void)(Checkpoint::open(folder.path)),
                         doctest::Contains("expected a file name in the same folder"), FileError);
  }
  std::filesystem::remove(folder / "model.safetensors.index.json");
  build::write(folder / "c.safetensors", second.bytes());
  CHECK_THROWS_WITH_AS((void)(Checkpoint::open(folder.path)),
                       doctest::Contains("is also in 'b.safetensors'"), FileError);
}

TEST_CASE("safetensors truncated and flipped") {
  const TempFolder folder;
  const build::Safetensors file = tiny_safetensors();
  const std::string whole = file.bytes();
  write_model(folder, whole);
  const auto weights = folder / "model.safetensors";
  for (size_t size = 1; size < whole.size(); ++size) {
    build::write(weights, std::string_view(whole).substr(0, size));
    CHECK(!loads_or_explains(folder.path, weights));
  }
  int refused = 0;
  const size_t header = 8 + file.header().size();
  for (size_t at = 0; at < header; ++at) {
    for (const int mask : {0x01, 0x04, 0x80}) {
      std::string bytes = whole;
      bytes[at] = static_cast<char>(bytes[at] ^ mask);
      build::write(weights, bytes);
      refused += loads_or_explains(folder.path, folder.path) ? 0 : 1;
    }
  }
  CHECK(refused > static_cast<int>(2 * header));
}

TEST_CASE("safetensors lies by name") {
  const std::string norm = "\"model.norm.weight\":{\"dtype\":\"F32\",\"shape\":[4]";
  const auto replaced = [&](const std::string& to) { return "\"model.norm.weight\":{" + to; };
  CHECK_THROWS_WITH_AS((void)(open_header(norm, replaced("\"dtype\":\"I8\",\"shape\":[16]"))),
                       doctest::Contains("has dtype I8, which is not supported"), FileError);
  CHECK_THROWS_WITH_AS((void)(open_header(norm, replaced("\"dtype\":\"F32\",\"shape\":[0]"))),
                       doctest::Contains("1 or more"), FileError);
  CHECK_THROWS_WITH_AS((void)(open_header(norm, replaced("\"dtype\":\"F32\",\"shape\":[-4]"))),
                       doctest::Contains("1 or more"), FileError);
  CHECK_THROWS_WITH_AS((void)(open_header(norm, replaced("\"dtype\":\"F32\",\"shape\":[4.0]"))),
                       doctest::Contains("integers"), FileError);
  CHECK_THROWS_WITH_AS(
      (void)(open_header(norm, replaced("\"dtype\":\"F32\",\"shape\":[4294967296,4294967296]"))),
      doctest::Contains("overflow"), FileError);
  CHECK_THROWS_WITH_AS((void)(open_header(norm, replaced("\"dtype\":\"F32\",\"shape\":[5]"))),
                       doctest::Contains("span 16 bytes, shape [5] of F32 needs 20"), FileError);
  CHECK_THROWS_WITH_AS((void)(open_header(norm, replaced("\"dtype\":\"F32\",\"shape\":[2,2]"))),
                       doctest::Contains("has shape [2, 2], expected [4]"), FileError);
  CHECK_THROWS_WITH_AS((void)(open_header(norm, replaced("\"shape\":[4]"))),
                       doctest::Contains("has no \"dtype\""), FileError);
  CHECK_THROWS_WITH_AS((void)(open_header("[0,80]", "[4,84]")),
                       doctest::Contains("an overlap or a gap"), FileError);
  CHECK_THROWS_WITH_AS((void)(open_header("[464,544]", "[464,99999]")),
                       doctest::Contains("may be truncated"), FileError);
  CHECK_THROWS_WITH_AS((void)(open_header("[464,544]", "[464,9223372036854775807]")),
                       doctest::Contains("do not lie"), FileError);
  CHECK_THROWS_WITH_AS((void)(open_header("[464,544]", "[544,464]")),
                       doctest::Contains("do not lie"), FileError);
  CHECK_THROWS_WITH_AS((void)(open_header("[464,544]", "[512]")), doctest::Contains("two integers"),
                       FileError);
  CHECK_THROWS_WITH_AS((void)(open_header("model.norm", "model.norn")),
                       doctest::Contains("'model.norm.weight' of shape [4]"), FileError);
  CHECK_THROWS_WITH_AS((void)(open_header("model.norm.weight", "lm_head.weight")),
                       doctest::Contains("duplicate key"), FileError);
  open_header("{\"model.embed", "{\"__metadata__\":{\"format\":\"pt\"},\"model.embed");  // loads

  const TempFolder folder;
  build::Safetensors file = tiny_safetensors();
  file.tensors.push_back({"model.layers.0.self_attn.rotary_emb.inv_freq", {1}, {1.0f}});
  write_model(folder, file.bytes());
  Checkpoint::open(folder.path);  // a buffer, not a weight
  file.tensors.push_back({"model.layers.0.self_attn.q_proj.bias", {4}, {1, 2, 3, 4}});
  write_model(folder, file.bytes());
  CHECK_THROWS_WITH_AS((void)(Checkpoint::open(folder.path)),
                       doctest::Contains("unknown tensor 'model.layers.0.self_attn.q_proj.bias'"),
                       FileError);
  build::write(folder / "model.safetensors", "<html>not found</html>");
  CHECK_THROWS_WITH_AS((void)(Checkpoint::open(folder.path)),
                       doctest::Contains("begins with \"<html>not found<\""), FileError);
  build::write(folder / "model.safetensors", raw<uint64_t>(uint64_t{1} << 60) + "{}");
  CHECK_THROWS_WITH_AS((void)(Checkpoint::open(folder.path)),
                       doctest::Contains("the header claims 1152921504606846976"), FileError);
  std::filesystem::remove(folder / "model.safetensors");
  CHECK_THROWS_WITH_AS((void)(Checkpoint::open(folder.path)),
                       doctest::Contains("expected model.safetensors or its shards, found none"),
                       FileError);
  std::filesystem::remove(folder / "config.json");
  CHECK_THROWS_WITH_AS((void)(Checkpoint::open(folder.path)),
                       doctest::Contains("config.json: no such file"), FileError);
}
