#include "alignpro/engine/lookup.h"

#include <algorithm>

namespace alignpro::engine {
namespace {

// N-grams by which remembered texts are found, the longest first: one that tells prompts apart
// behind a template's common end, and one that finds a phrase.
constexpr size_t kGrams[] = {16, 3};

// Odds follow about so many drafts; where they say that a draft does not pay, they come back to
// what they were at first, slowly: now and then a draft finds out whether that still holds.
constexpr double kLearned = 1.0 / 8, kForgotten = 1.0 / 512;

// Where one token alone is repeated, the next one seldom is; where a phrase is, mostly.
double initial(int64_t match) {
  const auto square = static_cast<double>(match * match);
  return square / (square + 40);
}

// Odds and costs are estimates: drafts that would gain less than this are as likely to lose.
constexpr double kLeastGain = 1.02;

// What all sequences taught counts as so many tokens of one's own.
constexpr double kOthers = 4.0;

uint64_t hash_gram(uint64_t version, std::span<const int32_t> gram) {
  uint64_t hash = version * 0x9E3779B97F4A7C15u + gram.size();
  for (const int32_t token : gram) {
    hash = (hash ^ static_cast<uint32_t>(token)) * 0xFF51AFD7ED558CCDu;
    hash ^= hash >> 32;
  }
  return hash;
}

// How many tokens before a[a_end] and b[b_end] are the same, as far as that matters: none beyond a
// soft row, which is no token.
int64_t common_suffix(std::span<const int32_t> a, size_t a_end, std::span<const int32_t> b,
                      size_t b_end) {
  const auto most = std::min({a_end, b_end, static_cast<size_t>(Lookup::kLongestMatch)});
  size_t length = 0;
  while (length < most && a[a_end - 1 - length] >= 0 &&
         a[a_end - 1 - length] == b[b_end - 1 - length]) {
    ++length;
  }
  return static_cast<int64_t>(length);
}

}  // namespace

Lookup::Odds Lookup::initial_odds() {
  Odds all;
  for (int64_t match = 0; match <= kLongestMatch; ++match) {
    all[static_cast<size_t>(match)] = initial(match);
  }
  return all;
}

double& Lookup::odds(Draft::Source source, int64_t match) {
  return odds_[static_cast<size_t>(source)][static_cast<size_t>(std::min(match, kLongestMatch))];
}

Draft Lookup::draft(uint64_t version, std::span<const int32_t> tokens,
                    std::span<const int32_t> stop_ids, int64_t most, const DraftRecord& record,
                    Step& step) {
  Match match = in_own(tokens);
  Draft draft;
  if (const Match other = in_remembered(version, tokens);
      other.length > 0 && (match.length == 0 || odds(Draft::Source::kRemembered, other.length) >
                                                    odds(Draft::Source::kOwn, match.length))) {
    match = other;
    draft.source = Draft::Source::kRemembered;
  }
  draft.match = match.length;
  if (match.length == 0) return draft;
  double accepted = 1.0;  // the probability that a row's token is needed
  // A longer draft may pay where a shorter one does not: all are compared.
  const auto worth = [this](const Step& s) { return s.tokens / costs_.of(s.rows); };
  const Step without = step;
  Step longer = step;
  double best = worth(step);
  size_t kept = 0;
  for (size_t at = match.next; static_cast<int64_t>(draft.tokens.size()) < most; ++at) {
    // What repeats goes on in its own draft.
    const size_t beyond = at - std::min(at, match.tokens.size());
    if (at >= match.tokens.size() &&
        (draft.source == Draft::Source::kRemembered || beyond >= draft.tokens.size())) {
      break;
    }
    const int32_t token = at < match.tokens.size() ? match.tokens[at] : draft.tokens[beyond];
    if (token < 0 || std::binary_search(stop_ids.begin(), stop_ids.end(), token)) break;
    const auto behind = static_cast<int64_t>(draft.tokens.size());
    accepted *= (kOthers * odds(draft.source, match.length + behind) +
                 static_cast<double>(record.accepted)) /
                (kOthers + static_cast<double>(record.verified));
    draft.tokens.push_back(token);
    longer.tokens += accepted;
    ++longer.rows;
    if (worth(longer) <= best) continue;
    step = longer;
    best = worth(step);
    kept = draft.tokens.size();
  }
  if (best < kLeastGain * worth(without)) {
    step = without;
    kept = 0;
  }
  if (kept == 0 && !draft.tokens.empty()) {
    double& declined = odds(draft.source, match.length);
    declined += (initial(match.length) - declined) * kForgotten;
  }
  draft.tokens.resize(kept);
  return draft;
}

void Lookup::learn(const Draft& draft, const DraftRecord& result) {
  for (int64_t i = 0; i < result.verified; ++i) {
    double& at = odds(draft.source, draft.match + i);
    at += ((i < result.accepted ? 1.0 : 0.0) - at) * kLearned;
  }
}

// The longest, the latest of equals. A scan: a context's tokens take microseconds, a step
// milliseconds.
Lookup::Match Lookup::in_own(std::span<const int32_t> tokens) const {
  Match best{tokens};
  for (size_t next = tokens.size(); --next > 0 && best.length < kLongestMatch;) {
    const int64_t length = common_suffix(tokens, next, tokens, tokens.size());
    if (length > best.length) best = {tokens, next, length};
  }
  return best;
}

Lookup::Match Lookup::in_remembered(uint64_t version, std::span<const int32_t> tokens) const {
  for (const size_t gram : kGrams) {
    if (tokens.size() < gram) continue;
    const auto found = places_.find(hash_gram(version, tokens.last(gram)));
    if (found == places_.end()) continue;
    const Text& text = texts_[found->second.text - forgotten_];
    const size_t next = found->second.next;
    const int64_t length = common_suffix(text.tokens, next, tokens, tokens.size());
    // Hashes may collide.
    if (text.version == version && length >= static_cast<int64_t>(gram)) {
      return {text.tokens, next, length};
    }
  }
  return {};
}

void Lookup::remember(uint64_t version, std::span<const int32_t> prompt,
                      std::span<const int32_t> written) {
  if (written.empty()) return;
  const auto lead = prompt.last(std::min(prompt.size(), static_cast<size_t>(kLongestMatch)));
  written = written.first(std::min(written.size(), static_cast<size_t>(kMostRemembered) / 4));
  Text text{version, {lead.begin(), lead.end()}};
  text.tokens.insert(text.tokens.end(), written.begin(), written.end());
  const uint64_t number = forgotten_ + texts_.size();
  for (const size_t gram : kGrams) {
    for (size_t next = std::max(gram, lead.size()); next < text.tokens.size(); ++next) {
      places_[hash_gram(version, std::span(text.tokens).subspan(next - gram, gram))] = {number,
                                                                                        next};
    }
  }
  remembered_ += static_cast<int64_t>(text.tokens.size());
  texts_.push_back(std::move(text));
  while (remembered_ > kMostRemembered) forget_oldest();
}

void Lookup::forget_oldest() {
  const Text& text = texts_.front();
  for (const size_t gram : kGrams) {
    for (size_t next = gram; next < text.tokens.size(); ++next) {
      const auto found =
          places_.find(hash_gram(text.version, std::span(text.tokens).subspan(next - gram, gram)));
      if (found != places_.end() && found->second.text == forgotten_) places_.erase(found);
    }
  }
  remembered_ -= static_cast<int64_t>(text.tokens.size());
  texts_.pop_front();
  ++forgotten_;
}

}  // namespace alignpro::engine
