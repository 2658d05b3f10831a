// What tokenizer and guards are made of, on text from outside. Ids are compared with Python's in
// tests/prompter, and guards in tests/test_guards.py.

#include <string>
#include <string_view>
#include <vector>

#include <doctest/doctest.h>
#include "alignpro/core/utf8.h"
#include "alignpro/prompter/guards.h"
#include "alignpro/prompter/unicode.h"
#include "alignpro/prompter/words.h"

using namespace alignpro;
using namespace alignpro::prompter;

namespace {

using Words = std::vector<std::string_view>;

const std::string kBad = "\xef\xbf\xbd";  // U+FFFD

}  // namespace

TEST_CASE("bytes that are no UTF-8 are replaced as Python replaces them") {
  CHECK(replace_invalid_utf8("a\xc3\xa9\xf0\x9f\x99\x82") == "a\xc3\xa9\xf0\x9f\x99\x82");
  CHECK(replace_invalid_utf8("\x80") == kBad);
  CHECK(replace_invalid_utf8("\xf0\x9f\x99") == kBad);     // the beginning of a character
  CHECK(replace_invalid_utf8("\xf0\x9fz") == kBad + "z");  // and one that breaks off
  CHECK(replace_invalid_utf8("\xc0\xaf") == kBad + kBad);  // longer than needed
  CHECK(replace_invalid_utf8("\xed\xa0\x80") == kBad + kBad + kBad);  // a surrogate
  CHECK(replace_invalid_utf8("\xf4\x90\x80\x80") == kBad + kBad + kBad + kBad);
}

TEST_CASE("white space at the ends") {
  CHECK(strip(" \t\x1c a b\xe3\x80\x80\n") == "a b");
  CHECK(strip("\xc2\xa0").empty());
  CHECK(strip("").empty());
}

TEST_CASE("form NFC") {
  CHECK(to_nfc("e\xcc\x81") == "\xc3\xa9");
  CHECK(to_nfc("e\xcc\x81\xcc\xa7") == "\xc8\xa9\xcc\x81");  // the cedilla comes first
  CHECK(to_nfc("\xe1\x84\x80\xe1\x85\xa1\xe1\x86\xa8") == "\xea\xb0\x81");  // Hangul
  CHECK(to_nfc("\xcc\x81") == "\xcc\x81");
  CHECK(to_nfc("\xe2\x84\xab") == "\xc3\x85");  // the angstrom sign
}

TEST_CASE("words") {
  const WordRule *gpt2 = find_word_rule("gpt-2"), *smollm = find_word_rule("smollm"),
                 *llama = find_word_rule("llama-bpe"), *qwen = find_word_rule("qwen2");
  REQUIRE(find_word_rule("no such rule") == nullptr);
  CHECK(split_words("it's 1234  x\n", *gpt2) == Words{"it", "'s", " 1234", " ", " x", "\n"});
  CHECK(split_words("a 12 ", *smollm) == Words{"a", " ", "1", "2", " "});
  CHECK(split_words("IT'S 1234", *llama) == Words{"IT", "'S", " ", "123", "4"});
  CHECK(split_words("12!\n\n  x", *qwen) == Words{"1", "2", "!\n\n", " ", " x"});
  const WordRule *tekken = find_word_rule("tekken"), *gpt4o = find_word_rule("gpt-4o");
  CHECK(split_words("aBcD 12 IT's/", *tekken) ==
        Words{"a", "Bc", "D", " ", "1", "2", " IT", "'s", "/"});
  CHECK(split_words("aBcD 1234 IT's/\n", *gpt4o) ==
        Words{"a", "Bc", "D", " ", "123", "4", " IT's", "/\n"});
  CHECK(split_words("", *gpt2).empty());
  CHECK(split_words("'", *qwen) == Words{"'"});
}

TEST_CASE("case is folded as Python folds it") {
  CHECK(casefold(U"Stra\u00dfe \u0130\u03a3\u03c2 \u0100\u0101\u212a") ==
        U"strasse i\u0307\u03c3\u03c3 \u0101\u0101k");
  CHECK(casefold(U"\u0390") == U"\u03b9\u0308\u0301");
}

TEST_CASE("the first guard that is broken") {
  PromptFormat format;
  format.template_before = "Rewrite the request below.\n";
  format.append = false;
  const auto broken = [&](std::string_view prompt, std::string_view text, Guards guards = {}) {
    return broken_guard({prompt, text, text, false}, format, guards);
  };
  CHECK(broken("Why?", "Explain why.").empty());
  CHECK(broken("Why?", "rewrite THE request below. Why?") == "guard_echo");
  CHECK(broken("Why?", "\"Sure! It is so.") == "guard_answered");
  CHECK(broken("Why?", std::string(401, 'a')) == "guard_length");
  CHECK(broken_guard({"Why?", "Tell", "Tell", true}, format, {}) == "guard_cut");
  CHECK(broken("Pourquoi est-ce que le ciel est bleu ?", "Why is the sky?") == "guard_language");
  CHECK(broken("Write to ada@b.org", "Write to Ada.") == "guard_spans");
  CHECK(broken("Add 2 and 3", "Sum 2 and 30") == "guard_spans");
  Guards off;
  off.spans = false;
  CHECK(broken("Add 2 and 3", "Sum 2 and 30", off).empty());
}
