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

class Ends {
 public:
  explicit Ends(int64_t vocab_size) : vocab_size_(vocab_size) {}

  void add(int64_t id) {
    if (id < 0 || id >= vocab_size_) return;
    const auto narrow = static_cast<int32_t>(id);
    if (std::ranges::find(ids_, narrow) == ids_.end()) ids_.push_back(narrow);
  }

  // A token of the vocabulary; adds it in finish() if it is a known end.
  void see(int64_t id, std::string_view text, bool is_control) {
    if (!is_one_of(kMarkers, text) && !(is_control && is_one_of(kControls, text)) &&
        text != "<|call|>") {
      return;
    }
    seen_.push_back({id, text});
  }

  std::vector<int32_t> finish() {
    const auto has = [this](std::string_view text) {
      return std::ranges::find(seen_, text, &Seen::text) != seen_.end();
    };
    // gpt-oss: <|end|> ends a message, after which the same turn goes on; <|call|> ends the turn.
    const bool harmony = has("<|return|>") && has("<|call|>");
    for (const auto& [id, text] : seen_) {
      if (text != (harmony ? "<|end|>" : "<|call|>")) add(id);
    }
    return std::move(ids_);
  }

 private:
  struct Seen {
    int64_t id;
    std::string_view text;
  };

  int64_t vocab_size_;
  std::vector<int32_t> ids_;
  std::vector<Seen> seen_;
};

// A member of an object, null where it is missing or null in the file, as transformers reads it.
const Json* member(const Json* object, std::string_view key) {
  const Json* value = object == nullptr ? nullptr : object->find(key);
  return value == nullptr || value->is_null() ? nullptr : value;
}

const std::string* text_of(const Json* object, std::string_view key) {
  const Json* value = member(object, key);
  return value == nullptr ? nullptr : value->string();
}

bool is_true(const Json& object, std::string_view key) {
  const Json* value = object.find(key);
  return value != nullptr && value->boolean() != nullptr && *value->boolean();
}

// The tokens of a folder by id: those added beside the vocabulary, by every file that lists them,
// and the vocabulary itself. What is damaged here is refused where the tokenizer is read.
class FolderTokens {
 public:
  FolderTokens(const Json* tokenizer, const Json* config) {
    if (const Json* added = member(tokenizer, "added_tokens"); added && added->array()) {
      for (const Json& entry : *added->array()) {
        if (const Json* id = entry.find("id"); id && id->integer()) add(*id->integer(), entry);
      }
    }
    if (const Json* added = member(config, "added_tokens_decoder"); added && added->object()) {
      for (const auto& [key, entry] : *added->object()) {
        int64_t id = -1;
        const char* end = key.data() + key.size();
        if (std::from_chars(key.data(), end, id).ptr == end) add(id, entry);
      }
    }
    vocabulary_ = member(member(tokenizer, "model"), "vocab");
  }

  std::optional<int64_t> find(std::string_view text) const {
    for (const auto& [id, known, special] : added_) {
      if (known == text) return id;
    }
    if (vocabulary_ == nullptr) return std::nullopt;
    if (const Json* id = vocabulary_->find(text)) {
      return id->integer() == nullptr ? std::nullopt : std::optional(*id->integer());
    }
    if (vocabulary_->array() == nullptr) return std::nullopt;
    const Json::Array& pairs = *vocabulary_->array();  // Unigram: [text, score] by id
    for (size_t id = 0; id < pairs.size(); ++id) {
      const Json::Array* pair = pairs[id].array();
      if (pair != nullptr && !pair->empty() && pair->front().string() != nullptr &&
          *pair->front().string() == text) {
        return static_cast<int64_t>(id);
      }
    }
    return std::nullopt;
  }

  void show(Ends& ends) const {
    for (const auto& [id, text, special] : added_) ends.see(id, text, special);
    for (const std::string_view text : kMarkers) {
      if (const std::optional<int64_t> id = find(text)) ends.see(*id, text, false);
    }
  }

 private:
  struct Added {
    int64_t id;
    std::string_view text;
    bool special;
  };

  void add(int64_t id, const Json& entry) {
    if (const std::string* text = text_of(&entry, "content")) {
      added_.push_back({id, *text, is_true(entry, "special")});
    }
  }

  std::vector<Added> added_;
  const Json* vocabulary_;
};

// eos_token_id of config.json or generation_config.json: an id or a list of them.
void add_eos_token_id(const ModelFiles& files, std::string_view name, Ends& ends) {
  const Json* value = member(files.json(name), "eos_token_id");
  if (value == nullptr) return;
  const Json::Array single{*value};
  for (const Json& id : value->array() != nullptr ? *value->array() : single) {
    if (id.integer() == nullptr) {
      throw FileError(cat((files.path() / name).string(),
                          ": \"eos_token_id\" must be an integer or a list of them, it is ",
                          id.kind()));
    }
    ends.add(*id.integer());
  }
}

std::vector<int32_t> ends_of_folder(const ModelFiles& files) {
  const Json* size = member(files.json("config.json"), "vocab_size");
  Ends ends(size != nullptr && size->integer() != nullptr ? *size->integer()
                                                          : std::numeric_limits<int32_t>::max());
  const Json* settings = files.json("tokenizer_config.json");
  const FolderTokens tokens(files.json("tokenizer.json"), settings);
  for (const Json* file : {settings, files.json("special_tokens_map.json")}) {
    // A special token is written as its text, or as an object that holds it.
    const std::string* text = text_of(file, "eos_token");
    if (text == nullptr) text = text_of(member(file, "eos_token"), "content");
    if (text == nullptr) continue;
    if (const std::optional<int64_t> id = tokens.find(*text)) ends.add(*id);
  }
  add_eos_token_id(files, "generation_config.json", ends);
  add_eos_token_id(files, "config.json", ends);
  tokens.show(ends);
  return ends.finish();
}

std::vector<int32_t> ends_of_gguf(const io::GgufFile& file) {
  const auto array = [&file](std::string_view key) -> const io::GgufValue* {
    const io::GgufValue* value = file.find(key);
    return value != nullptr && value->type() == io::GgufType::kArray ? value : nullptr;
  };
  GgufVocabulary vocabulary{
      .find_id = [&file](auto key) { return file.find_integer(key); }, .tokens = {}, .types = {}};
  if (const io::GgufValue* tokens = array("tokenizer.ggml.tokens")) {
    tokens->for_each([&vocabulary](const io::GgufValue& token) {
      vocabulary.tokens.push_back(token.string().value_or(""));
    });
  }
  if (const io::GgufValue* types = array("tokenizer.ggml.token_type")) {
    types->for_each([&vocabulary](const io::GgufValue& type) {
      vocabulary.types.push_back(type.integer().value_or(0));
    });
  }
  const auto embedding = file.tensors().find("token_embd.weight");
  vocabulary.size = embedding != file.tensors().end()
                        ? embedding->second.shape.front()
                        : static_cast<int64_t>(vocabulary.tokens.size());
  return end_of_text_ids(vocabulary);
}

}  // namespace

std::vector<int32_t> end_of_text_ids(const GgufVocabulary& vocabulary) {
  Ends ends(vocabulary.size);
  for (const char* key : {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id",
                          "tokenizer.ggml.eom_token_id"}) {
    if (const std::optional<int64_t> id = vocabulary.find_id(key)) ends.add(*id);
  }
  constexpr int64_t kControl = 3;
  const bool typed = vocabulary.types.size() == vocabulary.tokens.size();
  for (size_t id = 0; id < vocabulary.tokens.size(); ++id) {
    ends.see(static_cast<int64_t>(id), vocabulary.tokens[id],
             typed && vocabulary.types[id] == kControl);
  }
  return ends.finish();
}

std::vector<int32_t> end_of_text_ids(const ModelFiles& files) {
  return files.gguf() != nullptr ? ends_of_gguf(*files.gguf()) : ends_of_folder(files);
}

}  // namespace alignpro::model
