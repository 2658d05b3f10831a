// Python's expressions (guards.py), written out: each function says which one it matches.

#include "alignpro/prompter/guards.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "alignpro/prompter/unicode.h"

namespace alignpro::prompter {
namespace {

using Text = std::u32string_view;

bool is_word(char32_t code) { return is_letter(code) || is_number(code) || code == '_'; }

bool is_one_of(Text codes, char32_t code) { return codes.find(code) != codes.npos; }

Text stripped(Text text) {
  while (!text.empty() && is_stripped(text.front())) text.remove_prefix(1);
  while (!text.empty() && is_stripped(text.back())) text.remove_suffix(1);
  return text;
}

// The letter of ASCII that a character matches under re.IGNORECASE; other characters as they are.
char32_t ignoring_case(char32_t code) {
  if (code >= 'A' && code <= 'Z') return code + 32;
  if (code == 0x130 || code == 0x131) return 'i';
  if (code == 0x17f) return 's';
  return code == 0x212a ? 'k' : code;
}

// The end of a literal at `at`, in any case; 0 where it does not stand there.
size_t literal_end(Text text, size_t at, std::string_view literal) {
  if (text.size() - at < literal.size()) return 0;
  for (size_t i = 0; i < literal.size(); ++i) {
    if (ignoring_case(text[at + i]) != static_cast<unsigned char>(literal[i])) return 0;
  }
  return at + literal.size();
}

// Of a literal that ends a word: literal\b.
size_t word_end(Text text, size_t at, std::string_view literal) {
  const size_t end = literal_end(text, at, literal);
  return end < text.size() && is_word(text[end]) ? 0 : end;
}

// --- verbatim spans ---

struct Match {
  size_t end = 0;  // 0: none
  Text span;
};

// \[protected\]((?:(?!\[protected\]).)*?)\[/protected\]
Match protected_at(Text text, size_t at) {
  const size_t begin = literal_end(text, at, "[protected]");
  for (size_t end = begin; begin > 0 && end < text.size(); ++end) {
    if (const size_t after = literal_end(text, end, "[/protected]"); after > 0) {
      return {after, text.substr(begin, end - begin)};
    }
    if (literal_end(text, end, "[protected]") > 0) break;
  }
  return {};
}

// ```[^\n`]*\n(.*?)```
Match fence_at(Text text, size_t at) {
  if (!text.substr(at).starts_with(U"```")) return {};
  const size_t line_end = text.find_first_of(U"`\n", at + 3);
  if (line_end == text.npos || text[line_end] != '\n') return {};
  const size_t end = text.find(U"```", line_end + 1);
  if (end == text.npos) return {};
  return {end + 3, text.substr(line_end + 1, end - line_end - 1)};
}

// (?<!`)`([^`\n]+)`(?!`)
Match code_at(Text text, size_t at) {
  if (text[at] != '`' || (at > 0 && text[at - 1] == '`')) return {};
  const size_t end = text.find_first_of(U"`\n", at + 1);
  if (end == text.npos || end == at + 1 || text[end] == '\n') return {};
  if (end + 1 < text.size() && text[end + 1] == '`') return {};
  return {end + 1, text.substr(at + 1, end - at - 1)};
}

// (?:https?://|www\.)[^\s<>"'`)\]}]+
Match link_at(Text text, size_t at) {
  for (const Text begin : {Text(U"https://"), Text(U"http://"), Text(U"www.")}) {
    if (!text.substr(at).starts_with(begin)) continue;
    size_t end = at + begin.size();
    while (end < text.size() && !is_stripped(text[end]) && !is_one_of(U"<>\"'`)]}", text[end])) {
      ++end;
    }
    if (end == at + begin.size()) continue;
    const Text link = text.substr(at, end - at);
    return {end, link.substr(0, link.find_last_not_of(U".,;:!?") + 1)};
  }
  return {};
}

// (?<![\w.+-])[\w.+-]+@[\w-]+\.[\w.-]*\w
Match mail_at(Text text, size_t at) {
  const auto run_end = [&](size_t i, Text beside) {
    while (i < text.size() && (is_word(text[i]) || is_one_of(beside, text[i]))) ++i;
    return i;
  };
  const size_t end = text.size();
  if (at > 0 && (is_word(text[at - 1]) || is_one_of(U".+-", text[at - 1]))) return {};
  const size_t sign = run_end(at, U".+-");
  if (sign == at || sign == end || text[sign] != '@') return {};
  const size_t point = run_end(sign + 1, U"-");
  if (point == sign + 1 || point == end || text[point] != '.') return {};
  size_t last = run_end(point + 1, U".-");
  while (last > point + 1 && !is_word(text[last - 1])) --last;
  if (last == point + 1) return {};
  return {last, text.substr(at, last - at)};
}

// "([^"\n]{2,})" and other marks
Match quoted_at(Text text, size_t at) {
  const auto up_to = [&](Text closing, Text beside) -> Match {
    const size_t end = text.find_first_of(std::u32string(closing) + std::u32string(beside), at + 1);
    if (end == text.npos || !is_one_of(closing, text[end]) || end < at + 3) return {};
    return {end + 1, text.substr(at + 1, end - at - 1)};
  };
  if (text[at] == '"') return up_to(U"\"", U"\n");
  if (text[at] == 0x201c) return up_to(U"\u201d", U"\u201c\n");
  if (text[at] == 0xab) return up_to(U"\u00bb", U"\u00ab\n");
  return text[at] == 0x201e ? up_to(U"\u201c\u201d", U"\u201e\n") : Match{};
}

// What matches, from the left and without overlaps, stripped.
template <typename MatchAt>
void find_all(Text text, MatchAt match_at, std::vector<Text>* out) {
  for (size_t at = 0; at < text.size();) {
    const Match match = match_at(text, at);
    if (const Text span = stripped(match.span); !span.empty()) out->push_back(span);
    at = std::max(match.end, at + 1);
  }
}

std::vector<Text> verbatim_spans(Text text) {
  std::vector<Text> out;
  for (const auto match_at : {protected_at, fence_at, code_at, quoted_at}) {
    find_all(text, match_at, &out);
  }
  const auto address_at = [](Text t, size_t at) {
    const Match link = link_at(t, at);
    return link.end > 0 ? link : mail_at(t, at);
  };
  find_all(text, address_at, &out);
  return out;
}

// (?<![\w.,])[-+\u2212]?\d+(?:[.,:/]\d+)*(?:[eE][-+]?\d+)?%?
std::set<Text> numbers(Text text) {
  const auto is = [&](size_t i, Text codes) {
    return i < text.size() && is_one_of(codes, text[i]);
  };
  const auto digits_end = [&](size_t i) {
    while (i < text.size() && is_digit(text[i])) ++i;
    return i;
  };
  std::set<Text> out;
  for (size_t at = 0; at < text.size();) {
    const bool is_within = at > 0 && (is_word(text[at - 1]) || is(at - 1, U".,"));
    const size_t first = is(at, U"-+\u2212") ? at + 1 : at;
    size_t end = is_within ? first : digits_end(first);
    if (end == first) {
      ++at;
      continue;
    }
    while (is(end, U".,:/") && digits_end(end + 1) > end + 1) end = digits_end(end + 1);
    if (is(end, U"eE")) {
      const size_t power = is(end + 1, U"-+") ? end + 2 : end + 1;
      if (digits_end(power) > power) end = digits_end(power);
    }
    if (is(end, U"%")) ++end;
    out.insert(text.substr(at, end - at));
    at = end;
  }
  return out;
}

bool loses_spans(Text prompt, Text turn) {
  if (turn.find(prompt) != turn.npos) return false;  // append, and whatever keeps all of it
  const auto is_lost = [&](Text span) { return turn.find(span) == turn.npos; };
  return std::ranges::any_of(verbatim_spans(prompt), is_lost) ||
         !std::ranges::includes(numbers(turn), numbers(prompt));
}

// --- another language ---

enum Script {
  kUnknown,
  kOther,
  kLatin,
  kGreek,
  kCyrillic,
  kHebrew,
  kArabic,
  kDevanagari,
  kThai,
  kHangul,
  kCjk
};
struct ScriptRange {
  char32_t first, last;
  Script script;
};
constexpr ScriptRange kScripts[] = {
    // as in guards.py
    {0x41, 0x24f, kLatin},     {0x370, 0x3ff, kGreek},      {0x400, 0x52f, kCyrillic},
    {0x590, 0x5ff, kHebrew},   {0x600, 0x6ff, kArabic},     {0x750, 0x77f, kArabic},
    {0x8a0, 0x8ff, kArabic},   {0x900, 0x97f, kDevanagari}, {0xe00, 0xe7f, kThai},
    {0x1100, 0x11ff, kHangul}, {0x1e00, 0x1eff, kLatin},    {0x1f00, 0x1fff, kGreek},
    {0x3005, 0x30ff, kCjk},    {0x3130, 0x318f, kHangul},   {0x31f0, 0x31ff, kCjk},
    {0x3400, 0x9fff, kCjk},    {0xac00, 0xd7fb, kHangul},   {0xf900, 0xfaff, kCjk},
    {0xfb1d, 0xfb4f, kHebrew}, {0xfb50, 0xfdff, kArabic},   {0xfe70, 0xfeff, kArabic},
    {0xff21, 0xff5a, kLatin},  {0xff66, 0xff9f, kCjk},      {0x20000, 0x3ffff, kCjk},
};

// Frequent words of seven languages, as in guards.py.
constexpr Text kWords[] = {
    U" the and is are what how with this that which from does would should why when you your ",
    U" der die das und ist nicht ein eine wie mit auf für von wird sind warum ich sie auch dem ",
    U" le les des est une pour dans que qui avec sur comment pourquoi vous je pas ce cette du ",
    U" el los las es una para con por qué cómo y del que se cuál como está son más ",
    U" il gli che di è una per con come perché sono della nel non cosa più questo anche ",
    U" o os as é uma para com como não que em do da porque são mais você qual dos ",
    U" de het een en is van niet hoe met voor waarom zijn dat op wat ik je aan ook ",
};

// The script of most of the letters, where it can be told.
Script script_of(Text text) {
  std::map<Script, size_t> seen;
  size_t total = 0;
  for (const char32_t code : text) {
    if (!is_letter(code)) continue;
    const auto holds = [code](const ScriptRange& row) {
      return row.first <= code && code <= row.last;
    };
    const auto row = std::ranges::find_if(kScripts, holds);
    ++seen[row == std::end(kScripts) ? kOther : row->script];
    ++total;
  }
  for (const auto& [script, count] : seen) {
    const size_t enough = script == kCjk || script == kHangul ? 2 : 8;
    if (total >= enough && static_cast<double>(count) > 0.6 * static_cast<double>(total)) {
      return script;
    }
  }
  return kUnknown;
}

// The place in kWords of the language of the function words, where they tell; else their number.
size_t language_of(Text text) {
  std::array<size_t, std::size(kWords)> seen = {};
  const std::u32string folded = casefold(text);
  const auto is_within = [](char32_t code) {
    return is_letter(code) || (is_number(code) && !is_digit(code));
  };
  for (auto begin = folded.begin(); begin != folded.end();) {
    begin = std::find_if(begin, folded.end(), is_within);
    const auto end = std::find_if_not(begin, folded.end(), is_within);
    const std::u32string word = U' ' + std::u32string(begin, end) + U' ';
    for (size_t i = 0; i < seen.size(); ++i) seen[i] += kWords[i].find(word) != Text::npos;
    begin = end;
  }
  const auto most = std::ranges::max_element(seen);
  const size_t count = std::exchange(*most, 0);
  const bool tells = count >= 2 && count >= 2 * std::ranges::max(seen);
  return tells ? static_cast<size_t>(most - seen.begin()) : seen.size();
}

// With a space for each block of code.
std::u32string without_code(Text text) {
  std::u32string out;
  for (size_t at = 0; at < text.size();) {
    const size_t end = fence_at(text, at).end;
    out += end > 0 ? U' ' : text[at];
    at = std::max(end, at + 1);
  }
  return out;
}

bool is_other_language(Text prompt, Text text) {
  const std::u32string before = without_code(prompt), after = without_code(text);
  const auto differ = [](auto one, auto other, auto unknown) {
    return one != unknown && other != unknown && one != other;
  };
  return differ(script_of(before), script_of(after), kUnknown) ||
         differ(language_of(before), language_of(after), std::size(kWords));
}

// --- an answer instead of a rewrite ---

bool is_answer(Text text, Text prompt) {
  const size_t begin = text.find_first_not_of(U" \n\t\"'*");
  if (begin == text.npos) return false;
  size_t end = literal_end(text, begin, "answer:");
  for (const char* word :
       {"sure", "certainly", "of course", "absolutely", "yes", "no", "okay", "great question"}) {
    const size_t after = literal_end(text, begin, word);
    if (after > 0 && after < text.size() && is_one_of(U",!.:", text[after])) end = after + 1;
  }
  for (const char* words : {"here's",
                            "here is",
                            "here are",
                            "as an ai",
                            "i'm sorry",
                            "i'm an ai",
                            "i'm happy to",
                            "i am sorry",
                            "i am an ai",
                            "i am happy to",
                            "i can't",
                            "i cannot",
                            "the answer is",
                            "the answer to",
                            "the correct answer is",
                            "the correct answer to",
                            "the final answer is",
                            "the final answer to",
                            "to answer this",
                            "to answer your",
                            "in conclusion",
                            "there you go"}) {
    end = std::max(end, word_end(text, begin, words));
  }
  return end > 0 && casefold(prompt).find(casefold(text.substr(begin, end - begin))) == Text::npos;
}

// --- the template, or a chat's markers, in the rewrite ---

// <\|[a-z_]+\|>|\[/?INST\]|<</?SYS>>|^#{2,} ?(?:instruction|response|input)\b
// |^(?:user|assistant|system|human): , by lines
size_t marker_end(Text text, size_t at) {
  if (const size_t begin = literal_end(text, at, "<|"); begin > 0) {
    size_t end = begin;
    const auto is_name = [](char32_t c) { return (c >= 'a' && c <= 'z') || c == '_'; };
    while (end < text.size() && is_name(ignoring_case(text[end]))) ++end;
    const size_t after = end > begin ? literal_end(text, end, "|>") : 0;
    if (after > 0) return after;
  }
  for (const char* tag : {"[inst]", "[/inst]", "<<sys>>", "<</sys>>"}) {
    if (const size_t end = literal_end(text, at, tag); end > 0) return end;
  }
  if (at > 0 && text[at - 1] != '\n') return 0;
  size_t word = std::min(text.find_first_not_of('#', at), text.size());
  if (word >= at + 2) {
    if (word < text.size() && text[word] == ' ') ++word;
    for (const char* title : {"instruction", "response", "input"}) {
      if (const size_t end = word_end(text, word, title); end > 0) return end;
    }
  }
  for (const char* role : {"user: ", "assistant: ", "system: ", "human: "}) {
    if (const size_t end = literal_end(text, at, role); end > 0) return end;
  }
  return 0;
}

bool echoes(Text text, Text prompt, const PromptFormat& format) {
  constexpr size_t kShortest = 12;  // characters of a template's line; shorter ones are words
  const std::u32string folded_text = casefold(text), folded_prompt = casefold(prompt);
  const auto is_new = [&](Text part) { return folded_prompt.find(part) == Text::npos; };
  for (size_t at = 0; at < text.size(); ++at) {
    const size_t end = marker_end(text, at);
    if (end == 0) continue;
    if (is_new(casefold(text.substr(at, end - at)))) return true;
    break;  // the first one alone is looked at
  }
  for (const std::string& side : {format.template_before, format.template_after}) {
    const std::u32string lines = code_points(side);
    for (Text left = lines; !left.empty();) {
      const size_t end = std::min(left.find('\n'), left.size());
      const std::u32string line = casefold(stripped(left.substr(0, end)));
      left.remove_prefix(std::min(end + 1, left.size()));
      if (line.size() >= kShortest && folded_text.find(line) != Text::npos && is_new(line)) {
        return true;
      }
    }
  }
  return false;
}

}  // namespace

std::string_view broken_guard(const Candidate& candidate, const PromptFormat& format,
                              const Guards& guards) {
  const std::u32string prompt = code_points(candidate.prompt), turn = code_points(candidate.turn),
                       text = code_points(candidate.text);
  const auto is_too_long = [&] {
    const auto most = std::max(static_cast<double>(guards.free_characters),
                               *guards.max_growth * static_cast<double>(prompt.size()));
    return static_cast<double>(text.size()) > most;
  };
  if (guards.echo && echoes(text, prompt, format)) return "guard_echo";
  if (guards.answered && is_answer(text, prompt)) return "guard_answered";
  if (guards.max_growth && is_too_long()) return "guard_length";
  // An instruction behind a whole prompt may end early; a prompt may not.
  if (guards.cut && candidate.was_cut && !format.append) return "guard_cut";
  if (guards.language && is_other_language(prompt, text)) return "guard_language";
  if (guards.spans && loses_spans(prompt, turn)) return "guard_spans";
  return {};
}

}  // namespace alignpro::prompter
