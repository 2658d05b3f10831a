#include "alignpro/model/end_of_text.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <limits>
#include <string>

#include "alignpro/core/error.h"

namespace alignpro::model {
namespace {

using io::Json;

// With what chat templates end a turn or a text. These are markers that no text spells: they count
// whatever type the file gives them, because exporters often type them as ordinary tokens. The list
// is what llama.cpp's users know, without the separators of code completion (<|file_sep|>), which
// end no turn of a chat.
constexpr std::array<std::string_view, 17> kMarkers = {
    "<|endoftext|>",          // GPT-2, Qwen, Phi: between documents
    "<|end_of_text|>",        // Llama 3, Granite
    "<|eot_id|>",             // Llama 3
    "<|eom_id|>",             // Llama 3.1: the result of a tool follows
    "<|eot|>",                // Llama 4
    "<|eom|>",                // Llama 4
    "<|im_end|>",             // ChatML
    "<|end|>",                // Phi-3
    "<|return|>",             // gpt-oss
    "<|end_of_turn|>",        // OpenChat
    "<|END_OF_TURN_TOKEN|>",  // Command R
    "<|assistant_end|>",      // Apertus
    "[|endofturn|]",          // EXAONE
    "<seed:eos>",             // Seed-OSS
    "<end_of_turn>",          // Gemma
    "<end_of_utterance>",     // SmolVLM
    // DeepSeek: fullwidth bars, and U+2581 in the place of spaces.
    "<\xef\xbd\x9c"
    "end\xe2\x96\x81of\xe2\x96\x81sentence\xef\xbd\x9c>",
};
// May be ordinary words of a vocabulary ("</s>" is HTML): they count as control tokens alone.
constexpr std::array<std::string_view, 6> kControls = {"</s>",   "<eos>", "<EOT>",
                                                       "_<EOT>", "[EOT]", "[EOS]"};

bool is_one_of(std::span<const std::string_view> texts, std::string_view text) {
  return std::ranges::find(texts, text) != texts.end();
}

struct Token {
  int64_t id;
  std::string_view text;
  bool is_control;
};

// The ids that are named, and those of the tokens that are known as ends.
std::vector<int32_t> ends(std::span<const int64_t> named, std::span<const Token> tokens,
                          int64_t vocab_size) {
  std::vector<int32_t> ids;
  const auto add = [&](int64_t id) {
    if (id < 0 || id >= vocab_size) return;
    const auto narrow = static_cast<int32_t>(id);
    if (std::ranges::find(ids, narrow) == ids.end()) ids.push_back(narrow);
  };
  for (const int64_t id : named) add(id);
  const auto has = [&](std::string_view text) {
    return std::ranges::find(tokens, text, &Token::text) != tokens.end();
  };
  // gpt-oss: <|end|> ends a message, after which the same turn goes on; <|call|> ends the turn.
  const bool harmony = has("<|return|>") && has("<|call|>");
  for (const auto& [id, text, is_control] : tokens) {
    const bool known = is_one_of(kMarkers, text) || (is_control && is_one_of(kControls, text));
    if (harmony ? text == "<|call|>" || (known && text != "<|end|>") : known) add(id);
  }
  return ids;
}

// A member of an object; null where it is missing or null in the file, as transformers reads it.
const Json* member(const Json* object, std::string_view key) {
  const Json* value = object == nullptr ? nullptr : object->find(key);
  return value == nullptr || value->is_null() ? nullptr : value;
}

// A special token is written as its text, or as an object that holds it.
const std::string* text_of(const Json* token) {
  const Json* inner = token == nullptr ? nullptr : token->find("content");
  return inner != nullptr ? inner->string() : token == nullptr ? nullptr : token->string();
}

// Tokens of a folder: those added beside the vocabulary, by every file that lists them, and those
// of the vocabulary itself. What is damaged here is refused where the tokenizer is read.
std::vector<Token> folder_tokens(const Json* tokenizer, const Json* settings) {
  std::vector<Token> tokens;
  const auto add = [&tokens](int64_t id, const Json& entry) {
    const Json* special = member(&entry, "special");
    const bool is_control = special != nullptr && special->boolean() && *special->boolean();
    if (const std::string* text = text_of(&entry)) tokens.push_back({id, *text, is_control});
  };
  if (const Json* added = member(tokenizer, "added_tokens"); added && added->array()) {
    for (const Json& entry : *added->array()) {
      if (const Json* id = entry.find("id"); id && id->integer()) add(*id->integer(), entry);
    }
  }
  if (const Json* added = member(settings, "added_tokens_decoder"); added && added->object()) {
    for (const auto& [key, entry] : *added->object()) {
      int64_t id = -1;
      const char* end = key.data() + key.size();
      if (std::from_chars(key.data(), end, id).ptr == end) add(id, entry);
    }
  }
  const Json* vocabulary = member(member(tokenizer, "model"), "vocab");
  if (vocabulary != nullptr && vocabulary->object()) {
    for (const auto& [text, id] : *vocabulary->object()) {
      if (id.integer()) tokens.push_back({*id.integer(), text, false});
    }
  } else if (vocabulary != nullptr && vocabulary->array()) {  // Unigram: [text, score] by id
    int64_t id = 0;
    for (const Json& pair : *vocabulary->array()) {
      const bool has_text =
          pair.array() && !pair.array()->empty() && pair.array()->front().string();
      if (has_text) tokens.push_back({id, *pair.array()->front().string(), false});
      ++id;
    }
  }
  return tokens;
}

// eos_token_id of config.json or generation_config.json: an id or a list of them.
void add_eos_token_id(const ModelFiles& files, std::string_view name, std::vector<int64_t>& named) {
  const Json* value = member(files.json(name), "eos_token_id");
  if (value == nullptr) return;
  const Json::Array single{*value};
  for (const Json& id : value->array() != nullptr ? *value->array() : single) {
    require<FileError>(id.integer() != nullptr, (files.path() / name).string(),
                       ": \"eos_token_id\" must be an integer or a list of them, it is ",
                       id.kind());
    named.push_back(*id.integer());
  }
}

std::vector<int32_t> ends_of_folder(const ModelFiles& files) {
  const Json* size = member(files.json("config.json"), "vocab_size");
  std::vector<int64_t> named;
  const Json* settings = files.json("tokenizer_config.json");
  const std::vector<Token> tokens = folder_tokens(files.json("tokenizer.json"), settings);
  for (const Json* file : {settings, files.json("special_tokens_map.json")}) {
    const std::string* text = text_of(member(file, "eos_token"));
    if (text == nullptr) continue;
    const auto found = std::ranges::find(tokens, std::string_view(*text), &Token::text);
    if (found != tokens.end()) named.push_back(found->id);
  }
  add_eos_token_id(files, "generation_config.json", named);
  add_eos_token_id(files, "config.json", named);
  return ends(named, tokens,
              size != nullptr && size->integer() != nullptr ? *size->integer()
                                                            : std::numeric_limits<int32_t>::max());
}

std::vector<int32_t> ends_of_gguf(const io::GgufFile& file) {
  const auto each = [&file](std::string_view key, const auto& fn) {
    const io::GgufValue* value = file.find(key);
    if (value != nullptr && value->type() == io::GgufType::kArray) value->for_each(fn);
  };
  std::vector<int64_t> named, types;
  for (const char* key : kGgufEndKeys) named.push_back(file.find_integer(key).value_or(-1));
  std::vector<std::string_view> tokens;
  each("tokenizer.ggml.tokens",
       [&](const io::GgufValue& token) { tokens.push_back(token.string().value_or("")); });
  each("tokenizer.ggml.token_type",
       [&](const io::GgufValue& type) { types.push_back(type.integer().value_or(0)); });
  const auto embedding = file.tensors().find("token_embd.weight");
  return end_of_text_ids(named, tokens, types,
                         embedding != file.tensors().end() ? embedding->second.shape.front()
                                                           : static_cast<int64_t>(tokens.size()));
}

}  // namespace

std::vector<int32_t> end_of_text_ids(std::span<const int64_t> named,
                                     std::span<const std::string_view> tokens,
                                     std::span<const int64_t> types, int64_t vocab_size) {
  constexpr int64_t kControl = 3;
  std::vector<Token> seen;
  for (size_t id = 0; id < tokens.size(); ++id) {
    seen.push_back(
        {static_cast<int64_t>(id), tokens[id], id < types.size() && types[id] == kControl});
  }
  return ends(named, seen, vocab_size);
}

std::vector<int32_t> end_of_text_ids(const ModelFiles& files) {
  return files.gguf() != nullptr ? ends_of_gguf(*files.gguf()) : ends_of_folder(files);
}

}  // namespace alignpro::model
