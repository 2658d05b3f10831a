#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string_view>
#include <vector>

#include "alignpro/model/model_files.h"

namespace alignpro::model {

// The ids that end a text, for engine, tokenizer and warm start alike, the tokenizer's own EOS
// first. They are what the files name (tokenizer, generation_config.json, config.json;
// tokenizer.ggml.eos_token_id, eot and eom), and the end tokens of known chat templates, found in
// the vocabulary by their exact text: files often name one end alone, and a chat model ends a turn
// with another. Ids outside the vocabulary are left out: no logit reaches them (configurations of
// shrunken models keep the ids of their parents). Throws FileError for ids that are no integers.
std::vector<int32_t> end_of_text_ids(const ModelFiles& files);

// The tokenizer keys of a GGUF file's metadata, wherever they lie.
struct GgufVocabulary {
  std::function<std::optional<int64_t>(std::string_view key)> find_id;
  std::vector<std::string_view> tokens;
  std::vector<int64_t> types;  // as many, or none
  int64_t size = 0;            // ids are below it
};
std::vector<int32_t> end_of_text_ids(const GgufVocabulary& vocabulary);

}  // namespace alignpro::model
