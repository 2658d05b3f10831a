#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "alignpro/model/model_files.h"

namespace alignpro::model {

// The ids that end a text, for engine, tokenizer and warm start alike, the tokenizer's own EOS
// first. They are what the files name, and the end tokens of known chat templates, found in the
// vocabulary by their exact text: files often name one end alone, and a chat model ends a turn with
// another. Ids outside the vocabulary are left out: no logit reaches them (configurations of
// shrunken models keep the ids of their parents). Throws FileError for ids that are no integers.
std::vector<int32_t> end_of_text_ids(const ModelFiles& files);

// The same of a GGUF vocabulary: the ids that its metadata names under these keys, and its tokens
// with their types (as many, or none).
inline constexpr const char* kGgufEndKeys[] = {
    "tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"};
std::vector<int32_t> end_of_text_ids(std::span<const int64_t> named,
                                     std::span<const std::string_view> tokens,
                                     std::span<const int64_t> types, int64_t vocab_size);

}  // namespace alignpro::model
