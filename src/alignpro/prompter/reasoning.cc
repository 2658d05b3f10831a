#include "alignpro/prompter/reasoning.h"

#include <algorithm>
#include <array>

#include "alignpro/prompter/unicode.h"

namespace alignpro::prompter {
namespace {

struct Tags {
  std::string_view open, close;
};
constexpr std::array kTags = {
    Tags{"<think>", "</think>"},     Tags{"<thinking>", "</thinking>"},
    Tags{"<thought>", "</thought>"}, Tags{"<reasoning>", "</reasoning>"},
    Tags{"[THINK]", "[/THINK]"},     Tags{"<seed:think>", "</seed:think>"},
};

}  // namespace

bool is_reasoning_tag(std::string_view text) {
  return std::ranges::any_of(kTags, [&](Tags t) { return text == t.open || text == t.close; });
}

std::string_view answer_of(std::string_view text, std::string_view prompt) {
  const std::string_view begun = strip_left(text), read = strip(prompt);
  auto tags = std::ranges::find_if(kTags, [&](Tags t) { return begun.starts_with(t.open); });
  if (tags == kTags.end()) {
    tags = std::ranges::find_if(kTags, [&](Tags t) { return read.ends_with(t.open); });
  }
  if (tags == kTags.end()) return text;
  const size_t closed = text.rfind(tags->close);
  return closed == text.npos ? "" : strip_left(text.substr(closed + tags->close.size()));
}

}  // namespace alignpro::prompter
