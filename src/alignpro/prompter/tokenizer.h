#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "alignpro/model/model_files.h"
#include "alignpro/prompter/words.h"

namespace alignpro::prompter {

// BPE from the metadata of a GGUF file (Sennrich et al. 2016), byte-level (GPT-2's) or
// SentencePiece's: the ids that alignpro.Tokenizer gives. Constant; any number of threads may use
// one.
class Tokenizer {
 public:
  // Throws FileError: a folder, a tokenizer of another kind, a rule for words that is not known.
  explicit Tokenizer(const model::ModelFiles& files);

  // Ids of before + text + after. Control tokens are matched where `before` and `after`, which a
  // chat template wrote, have a part in them; in `text` they are ordinary characters (contract 7).
  // most: ids that are of interest. A text that has more than twice as many may be encoded only so
  // far that it shows: 1.4 MB of a chat take half a second.
  // Throws InvalidArgument for what is not UTF-8.
  std::vector<int32_t> encode(std::string_view before, std::string_view text,
                              std::string_view after, std::optional<size_t> most = {}) const;
  std::vector<int32_t> encode(std::string_view text) const { return encode("", text, ""); }

  // What each id adds to a text; nothing for control tokens.
  const std::vector<std::string>& token_bytes() const { return pieces_; }

  // The bytes of the text of token ids; ids that there are not add nothing.
  std::string join_bytes(std::span<const int32_t> tokens) const;

 private:
  struct Added {
    std::string text;
    int32_t id;
    bool control;
    bool strips_right;  // swallows the white space behind it
  };
  struct Merge {
    int32_t rank;
    int32_t id;
  };

  struct Listed {  // in the file, one of each an id
    std::vector<std::string_view> tokens;
    std::vector<int64_t> types;
  };

  Listed add_tokens(const model::ModelFiles& files);
  void add_merges(const io::GgufFile& file, const Listed& listed);
  void add_scored_merges(const io::GgufFile& file, const Listed& listed);
  std::vector<int32_t> encode_all(std::string_view before, std::string_view text,
                                  std::string_view after) const;
  const Added* added_at(std::string_view text, size_t at, size_t begin, size_t end) const;
  void encode_words(std::string_view text, std::vector<int32_t>* ids) const;
  void encode_word(std::string_view word, std::vector<int32_t>* ids) const;
  void encode_sentence(std::string_view text, std::vector<int32_t>* ids) const;
  void merge(std::span<const int32_t> symbols, std::vector<int32_t>* ids) const;

  const WordRule* rule_ = nullptr;  // null: SentencePiece's, which cuts no words
  bool space_before_ = false;       // SentencePiece: a text begins with a space of its own
  std::unordered_map<std::string, int32_t> ids_;  // as the file spells them
  std::array<int32_t, 256> byte_ids_{};           // of the symbols of bytes; -1: none
  std::unordered_map<uint64_t, Merge> merges_;    // of two ids
  std::array<std::vector<Added>, 256> added_;     // by their first byte, longer ones first
  std::vector<std::string> pieces_;
};

}  // namespace alignpro::prompter
