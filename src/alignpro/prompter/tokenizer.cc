#include "alignpro/prompter/tokenizer.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <optional>
#include <queue>
#include <tuple>
#include <utility>

#include "alignpro/core/error.h"
#include "alignpro/core/utf8.h"
#include "alignpro/io/gguf.h"
#include "alignpro/model/end_of_text.h"
#include "alignpro/prompter/reasoning.h"
#include "alignpro/prompter/unicode.h"

namespace alignpro::prompter {
namespace {

using io::GgufFile;
using io::GgufType;
using io::GgufValue;
using io::printable;

// What SentencePiece writes for a space.
constexpr std::string_view kSpace = "\xe2\x96\x81";

// tokenizer.ggml.token_type
constexpr int64_t kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5;

// GPT-2's spelling of bytes: printable Latin-1 stands for itself, the other bytes, in order, for
// the characters from U+0100 on.
struct Alphabet {
  std::array<std::string, 256> spelled;
  std::unordered_map<char32_t, char> bytes;

  Alphabet() {
    char32_t next = 0x100;
    for (int byte = 0; byte < 256; ++byte) {
      const bool is_printable = (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte != 0xad);
      const char32_t code = is_printable ? static_cast<char32_t>(byte) : next++;
      std::string& text = spelled[static_cast<size_t>(byte)];
      if (code < 0x80) {
        text = static_cast<char>(code);
      } else {
        text = {static_cast<char>(0xc0 | code >> 6), static_cast<char>(0x80 | (code & 0x3f))};
      }
      bytes[code] = static_cast<char>(byte);
    }
  }
};

const Alphabet& alphabet() {
  static const Alphabet made;
  return made;
}

std::string spell(std::string_view bytes) {
  std::string out;
  for (const char byte : bytes) out += alphabet().spelled[static_cast<unsigned char>(byte)];
  return out;
}

// Outside of the alphabet: a token that was added as plain text.
std::string unspell(std::string_view text) {
  std::string out;
  for (size_t at = 0; at < text.size();) {
    const Decoded next = decode_utf8(text.substr(at));
    const auto byte = alphabet().bytes.find(next.code);
    if (byte == alphabet().bytes.end()) return std::string(text);
    out += byte->second;
    at += next.bytes;
  }
  return out;
}

std::string replace_all(std::string_view text, std::string_view from, std::string_view to) {
  std::string out;
  for (size_t at; (at = text.find(from)) != text.npos; text.remove_prefix(at + from.size())) {
    out.append(text.substr(0, at)).append(to);
  }
  return out.append(text);
}

// SentencePiece's token of a byte.
std::string byte_token(int byte) {
  constexpr std::string_view kDigits = "0123456789ABCDEF";
  std::string out = "<0x00>";
  out[3] = kDigits[static_cast<size_t>(byte / 16)];
  out[4] = kDigits[static_cast<size_t>(byte % 16)];
  return out;
}

// The format has no key for it: Phi-3's control tokens swallow the white space behind them, and its
// template writes line ends there. Phi-4 has the architecture, and a byte-level tokenizer.
bool has_phi3_markers(const GgufFile& file) {
  std::string name = file.find_string("general.name").value_or("");
  for (char& c : name) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c;
  return file.find_string("general.architecture") == "phi3" || name.find("phi-3") != name.npos ||
         name.find("phi3") != name.npos;
}

bool is_phi3_marker(std::string_view text, int64_t type) {
  const bool is_kept = text == "<unk>" || text == "<s>" || text == "<|endoftext|>";
  return text == "</s>" || (type == kControl && !is_kept);
}

// Whether `text` is `open`, one or more characters that are neither white space nor in `without`,
// and `close`.
bool is_enclosed(std::string_view text, std::string_view open, std::string_view close,
                 std::u32string_view without) {
  if (text.size() <= open.size() + close.size() || !text.starts_with(open) ||
      !text.ends_with(close)) {
    return false;
  }
  text = text.substr(open.size(), text.size() - open.size() - close.size());
  while (!text.empty()) {
    const Decoded next = decode_utf8(text);
    if (is_space(next.code) || without.find(next.code) != without.npos) return false;
    text.remove_prefix(next.bytes);
  }
  return true;
}

// A marker of a chat template.
bool is_marker(std::string_view text) {
  constexpr std::u32string_view kOuter = U"<>|\uff5c";
  const auto word = [&](std::string_view open, std::string_view close) {
    if (!is_enclosed(text, open, close, U"")) return false;
    text = text.substr(open.size(), text.size() - open.size() - close.size());
    while (!text.empty()) {
      const Decoded next = decode_utf8(text);
      if (!is_letter(next.code) && !is_number(next.code) && next.code != '_') return false;
      text.remove_prefix(next.bytes);
    }
    return true;
  };
  return is_enclosed(text, "<|", "|>", kOuter) ||
         is_enclosed(text, "<\xef\xbd\x9c", "\xef\xbd\x9c>", kOuter) || word("<start_of_", ">") ||
         word("<end_of_", ">") || word("[|", "|]");
}

// What may be an ordinary word ("</s>" is HTML), and is a marker where the file names it as its BOS
// or an end.
bool is_named_marker(std::string_view text) {
  return is_enclosed(text, "<", ">", U"<>") || is_enclosed(text, "_<", ">", U"<>") ||
         is_enclosed(text, "[", "]", U"[]");
}

const GgufValue& array_of(const GgufFile& file, std::string_view key) {
  const GgufValue* value = file.find(key);
  require<FileError>(value != nullptr && value->type() == GgufType::kArray, file.name(),
                     ": expected a list ", key, "; the file holds no tokenizer that can be read");
  return *value;
}

std::vector<std::string_view> texts(const GgufFile& file, std::string_view key) {
  std::vector<std::string_view> out;
  array_of(file, key).for_each([&](const GgufValue& item) {
    const std::optional<std::string_view> text = item.string();
    require<FileError>(text.has_value(), file.name(), ": ", key, ": expected a list of texts");
    out.push_back(*text);
  });
  return out;
}

uint64_t pair_key(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

void require_utf8(std::string_view text) {
  for (size_t at = 0; at < text.size();) {
    const Decoded next = decode_utf8(text.substr(at));
    require(next.well_formed, "prompt: expected UTF-8, got another byte at ", at);
    at += next.bytes;
  }
}

}  // namespace

Tokenizer::Tokenizer(const model::ModelFiles& files) {
  const GgufFile* file = files.gguf();
  require<FileError>(file != nullptr, files.path().string(),
                     ": expected a GGUF file, whose tokenizer can be read without Python; this is "
                     "a folder");
  const std::string kind = file->string("tokenizer.ggml.model");
  require<FileError>(kind == "gpt2" || kind == "llama", file->name(),
                     ": tokenizer.ggml.model: expected gpt2 (byte-level BPE) or llama "
                     "(SentencePiece's), got ",
                     printable(kind));
  if (kind == "gpt2") {
    const std::string name = file->find_string("tokenizer.ggml.pre").value_or("default");
    rule_ = find_word_rule(name);
    require<FileError>(rule_ != nullptr, file->name(), ": tokenizer.ggml.pre: words cut as ",
                       printable(name), " are not known here; expected ", kWordRules);
  } else {
    space_before_ = file->find_boolean("tokenizer.ggml.add_space_prefix").value_or(true);
  }
  const Listed listed = add_tokens(files);
  for (int byte = 0; byte < 256; ++byte) {
    const auto at = static_cast<size_t>(byte);
    const auto found = ids_.find(rule_ ? alphabet().spelled[at] : byte_token(byte));
    byte_ids_[at] = found == ids_.end() ? -1 : found->second;
    require<FileError>(rule_ != nullptr || byte_ids_[at] >= 0, file->name(),
                       ": tokenizer.ggml.tokens: no ", byte_token(byte),
                       "; expected a token for every byte");
    if (rule_ == nullptr) pieces_[static_cast<size_t>(byte_ids_[at])] = static_cast<char>(byte);
  }
  if (rule_ == nullptr) {
    add_scored_merges(*file, listed);
  } else {
    add_merges(*file, listed);
  }
}

Tokenizer::Listed Tokenizer::add_tokens(const model::ModelFiles& files) {
  const GgufFile& file = *files.gguf();
  Listed listed{texts(file, "tokenizer.ggml.tokens"), {}};
  auto& [tokens, types] = listed;
  if (file.find("tokenizer.ggml.token_type") == nullptr) {
    types.assign(tokens.size(), kNormal);
  } else {
    array_of(file, "tokenizer.ggml.token_type").for_each([&](const GgufValue& type) {
      types.push_back(type.integer().value_or(kNormal));
    });
  }
  require<FileError>(!tokens.empty() && tokens.size() == types.size(), file.name(), ": ",
                     tokens.size(), " tokens and ", types.size(), " token types; expected as many");
  const std::vector<int32_t> ends = model::end_of_text_ids(files);
  const int64_t bos = file.find_integer("tokenizer.ggml.bos_token_id").value_or(-1);
  const bool is_phi3 = rule_ == nullptr && has_phi3_markers(file);
  const auto bytes_of = [this](const std::string& text) {
    return rule_ ? unspell(text) : replace_all(text, kSpace, " ");
  };
  pieces_.resize(tokens.size());
  ids_.reserve(tokens.size());
  for (size_t i = 0; i < tokens.size(); ++i) {
    const auto id = static_cast<int32_t>(i);
    const std::string text(tokens[i]);
    const bool is_end = std::ranges::find(ends, id) != ends.end();
    int64_t& type = types[i];
    // Some exporters type markers as ordinary tokens, and text would turn into them.
    if (type == kNormal && (is_marker(text) || ((is_end || id == bos) && is_named_marker(text)))) {
      type = kControl;
    }
    if (type != kControl && type != kUserDefined) {
      ids_[text] = id;
      pieces_[i] = bytes_of(text);
    }
    if (text.empty() || (type != kControl && type != kUserDefined && type != kUnknown)) continue;
    const bool special = type != kUserDefined || is_end;
    added_[static_cast<unsigned char>(text[0])].push_back(
        {text, id, special || is_marker(text), is_phi3 && is_phi3_marker(text, type)});
    const bool is_hidden = special && !is_reasoning_tag(text);
    pieces_[i] = is_hidden ? "" : rule_ ? text : bytes_of(text);
  }
  for (std::vector<Added>& group : added_) {
    std::ranges::stable_sort(group, std::greater(), [](const Added& a) { return a.text.size(); });
  }
  return listed;
}

void Tokenizer::add_merges(const GgufFile& file, const Listed& listed) {
  const std::vector<std::string_view> merges = texts(file, "tokenizer.ggml.merges");
  std::unordered_map<std::string_view, int32_t> words;  // added ones
  for (size_t i = 0; i < listed.tokens.size(); ++i) {
    if (listed.types[i] == kUserDefined) words[listed.tokens[i]] = static_cast<int32_t>(i);
  }
  merges_.reserve(merges.size());
  int32_t rank = 0;
  for (const std::string_view merge : merges) {
    const size_t space = merge.find(' ');
    const std::string left(merge.substr(0, space));
    const std::string right(space == merge.npos ? "" : merge.substr(space + 1));
    if (const auto word = words.find(left + right); word != words.end()) {
      ids_.emplace(left + right, word->second);
    }
    const auto a = ids_.find(left), b = ids_.find(right), both = ids_.find(left + right);
    require<FileError>(a != ids_.end() && b != ids_.end() && both != ids_.end(), file.name(),
                       ": tokenizer.ggml.merges: expected two tokens that make a third, got ",
                       printable(merge));
    merges_[pair_key(a->second, b->second)] = {rank++, both->second};
  }
}

// Those behind a SentencePiece vocabulary: every way to make a token of two others, the better
// score first, then the earlier piece.
void Tokenizer::add_scored_merges(const GgufFile& file, const Listed& listed) {
  const auto& [tokens, types] = listed;
  std::vector<double> scores;
  array_of(file, "tokenizer.ggml.scores").for_each([&](const GgufValue& score) {
    const double value = score.number().value_or(std::nan(""));
    require<FileError>(!std::isnan(value), file.name(),
                       ": tokenizer.ggml.scores: expected a list of numbers");
    scores.push_back(value);
  });
  require<FileError>(scores.size() == tokens.size(), file.name(), ": ", tokens.size(),
                     " tokens and ", scores.size(), " scores; expected as many");
  std::unordered_map<std::string_view, int32_t> normal;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (types[i] == kNormal || types[i] == kUnused) normal[tokens[i]] = static_cast<int32_t>(i);
  }
  std::vector<std::tuple<double, int32_t, int32_t, int32_t>> merges;  // (-score, both, left, right)
  for (const auto& [text, id] : normal) {
    for (size_t cut = 0; cut < text.size();) {
      cut += decode_utf8(text.substr(cut)).bytes;
      const auto left = normal.find(text.substr(0, cut)), right = normal.find(text.substr(cut));
      if (left == normal.end() || right == normal.end()) continue;
      merges.emplace_back(-scores[static_cast<size_t>(id)], id, left->second, right->second);
    }
  }
  std::ranges::sort(merges);
  merges_.reserve(merges.size());
  const auto symbol = [&](int32_t id) {
    return ids_.at(std::string(tokens[static_cast<size_t>(id)]));
  };
  int32_t rank = 0;
  for (const auto& [score, both, left, right] : merges) {
    merges_[pair_key(symbol(left), symbol(right))] = {rank++, symbol(both)};
  }
}

// Of the added tokens at `at`, the longest; control tokens only where they do not lie within
// [begin, end).
const Tokenizer::Added* Tokenizer::added_at(std::string_view text, size_t at, size_t begin,
                                            size_t end) const {
  for (const Added& token : added_[static_cast<unsigned char>(text[at])]) {
    const bool within = at >= begin && at + token.text.size() <= end;
    if (text.substr(at).starts_with(token.text) && !(token.control && within)) return &token;
  }
  return nullptr;
}

std::vector<int32_t> Tokenizer::encode(std::string_view before, std::string_view text,
                                       std::string_view after, std::optional<size_t> most) const {
  require_utf8(before);
  require_utf8(text);
  require_utf8(after);
  constexpr size_t kBytes = 8;  // of a token, more than most
  // What follows a beginning changes at most how its last words are cut, and twice as many ids
  // leave room for that.
  for (size_t size = most ? kBytes * std::max<size_t>(*most, 1) : text.size(); size < text.size();
       size *= 4) {
    size_t end = size;
    while ((text[end] & 0xC0) == 0x80) --end;  // the bytes of a character stay together
    std::vector<int32_t> ids = encode_all(before, text.substr(0, end), "");
    if (ids.size() > 2 * *most) return ids;
  }
  return encode_all(before, text, after);
}

std::vector<int32_t> Tokenizer::encode_all(std::string_view before, std::string_view text,
                                           std::string_view after) const {
  const std::string whole = cat(before, text, after);
  std::vector<int32_t> ids;
  size_t begin = 0;  // of what no added token has been found in
  for (size_t at = 0; at < whole.size();) {
    const Added* token = added_at(whole, at, before.size(), before.size() + text.size());
    if (token == nullptr) {
      ++at;
      continue;
    }
    encode_words(std::string_view(whole).substr(begin, at - begin), &ids);
    ids.push_back(token->id);
    at += token->text.size();
    if (token->strips_right) {
      at = whole.size() - strip_left(std::string_view(whole).substr(at)).size();
    }
    begin = at;
  }
  encode_words(std::string_view(whole).substr(begin), &ids);
  return ids;
}

void Tokenizer::encode_words(std::string_view text, std::vector<int32_t>* ids) const {
  if (rule_ == nullptr) return encode_sentence(text, ids);
  std::string normal;
  if (rule_->nfc) text = normal = to_nfc(text);
  for (const std::string_view word : split_words(text, *rule_)) encode_word(word, ids);
}

void Tokenizer::encode_word(std::string_view word, std::vector<int32_t>* ids) const {
  if (rule_->ignore_merges) {
    const auto whole = ids_.find(spell(word));
    if (whole != ids_.end()) {
      ids->push_back(whole->second);
      return;
    }
  }
  std::vector<int32_t> symbols;
  for (const char byte : word) {
    const int32_t id = byte_ids_[static_cast<unsigned char>(byte)];
    if (id >= 0) symbols.push_back(id);  // a byte that the vocabulary lacks is left out
  }
  merge(symbols, ids);
}

void Tokenizer::encode_sentence(std::string_view text, std::vector<int32_t>* ids) const {
  if (text.empty()) return;
  const std::string written = cat(space_before_ ? kSpace : "", replace_all(text, " ", kSpace));
  std::vector<int32_t> symbols;
  for (std::string_view left = written; !left.empty();) {
    const std::string character(left.substr(0, decode_utf8(left).bytes));
    left.remove_prefix(character.size());
    if (const auto found = ids_.find(character); found != ids_.end()) {
      symbols.push_back(found->second);
      continue;
    }
    for (const char byte : character) {
      symbols.push_back(byte_ids_[static_cast<unsigned char>(byte)]);
    }
  }
  merge(symbols, ids);
}

void Tokenizer::merge(std::span<const int32_t> symbol_ids, std::vector<int32_t>* ids) const {
  // Symbols as a list, in which the pair of the lowest rank is merged, the leftmost of equals.
  struct Symbol {
    int32_t id;  // -1: merged into the one before it
    int64_t previous, next;
  };
  std::vector<Symbol> symbols;
  for (const int32_t id : symbol_ids) {
    const auto at = static_cast<int64_t>(symbols.size());
    symbols.push_back({id, at - 1, at + 1});
  }
  const auto count = static_cast<int64_t>(symbols.size());
  const auto symbol = [&](int64_t at) -> Symbol& { return symbols[static_cast<size_t>(at)]; };
  using Candidate = std::tuple<int32_t, int64_t, int32_t>;  // rank, left symbol, merged id
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
  const auto merge_at = [&](int64_t left) -> const Merge* {
    if (left < 0 || symbol(left).id < 0 || symbol(left).next >= count) return nullptr;
    const auto found = merges_.find(pair_key(symbol(left).id, symbol(symbol(left).next).id));
    return found == merges_.end() ? nullptr : &found->second;
  };
  const auto offer = [&](int64_t left) {
    if (const Merge* merge = merge_at(left)) queue.emplace(merge->rank, left, merge->id);
  };
  for (int64_t at = 0; at + 1 < count; ++at) offer(at);
  while (!queue.empty()) {
    const auto left = std::get<1>(queue.top());
    const int32_t id = std::get<2>(queue.top());
    queue.pop();
    const Merge* merge = merge_at(left);
    if (merge == nullptr || merge->id != id) continue;  // one of the two has been merged since
    const int64_t right = symbol(left).next;
    symbol(left) = {id, symbol(left).previous, symbol(right).next};
    if (symbol(right).next < count) symbol(symbol(right).next).previous = left;
    symbol(right).id = -1;
    offer(symbol(left).previous);
    offer(left);
  }
  for (const Symbol& each : symbols) {
    if (each.id >= 0) ids->push_back(each.id);
  }
}

std::string Tokenizer::join_bytes(std::span<const int32_t> tokens) const {
  std::string out;
  for (const int32_t token : tokens) {
    const auto id = static_cast<size_t>(token);
    if (token >= 0 && id < pieces_.size()) out += pieces_[id];
  }
  return out;
}

}  // namespace alignpro::prompter
