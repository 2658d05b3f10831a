#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <span>
#include <unordered_map>
#include <vector>

#include "alignpro/engine/step_costs.h"

namespace alignpro::engine {

// Tokens that may be a sequence's next, to be verified in one step.
struct Draft {
  enum class Source { kOwn, kRemembered };

  std::vector<int32_t> tokens;
  Source source = Source::kOwn;
  int64_t match = 0;  // tokens before them that were the same there
};

// Of one sequence's drafts: tokens that were compared with what was drawn, and those that were it.
struct DraftRecord {
  int64_t verified = 0;
  int64_t accepted = 0;
};

// Drafts a sequence's next tokens: what followed its last ones before, in its own prompt and text
// or in a text that ended under the same weights (a version is never reused, so what an old adapter
// wrote cannot be found). Drafts decide how fast tokens come, never which (contract 2). Knows
// tokens, never a tensor. One thread at a time.
class Lookup {
 public:
  // The rows of a step, and the tokens that it is expected to bring.
  struct Step {
    int64_t rows;
    double tokens;
  };

  explicit Lookup(ops::RowCost row_cost) : costs_(row_cost) {}

  // A step of `rows` sequences without a draft.
  static Step step_of(int64_t rows) { return {rows, static_cast<double>(rows)}; }

  // What may follow `tokens`: at most `most` tokens, none of `stop_ids` (ascending) and no soft row
  // (below 0), as many as make `step`, which they are added to, bring most tokens for its cost.
  // `record` is of the sequence's drafts until now.
  Draft draft(uint64_t version, std::span<const int32_t> tokens, std::span<const int32_t> stop_ids,
              int64_t most, const DraftRecord& record, Step& step);

  // `result` is of this draft alone: its tokens are verified from the first on.
  void learn(const Draft& draft, const DraftRecord& result);

  // Of a step that drew a token behind each of its rows.
  void took(int64_t rows, double seconds) { costs_.learn(rows, seconds); }

  // A text for later drafts: what was written, behind a few tokens that led to it. The oldest are
  // forgotten beyond kMostRemembered tokens.
  void remember(uint64_t version, std::span<const int32_t> prompt,
                std::span<const int32_t> written);

  static constexpr int64_t kLongestMatch = 16;
  static constexpr int64_t kMostRemembered = int64_t{1} << 15;
  int64_t remembered() const { return remembered_; }  // tokens

 private:
  struct Text {
    uint64_t version;
    std::vector<int32_t> tokens;
  };
  struct Place {
    uint64_t text;  // its number, counted from the first that was remembered
    size_t next;    // the token behind the match
  };
  struct Match {
    std::span<const int32_t> tokens;  // in which it is
    size_t next = 0;
    int64_t length = 0;  // 0: none
  };
  using Odds = std::array<double, kLongestMatch + 1>;  // of acceptance, by the match's length

  Match in_own(std::span<const int32_t> tokens) const;
  Match in_remembered(uint64_t version, std::span<const int32_t> tokens) const;
  void forget_oldest();
  double& odds(Draft::Source source, int64_t match);

  StepCosts costs_;
  std::array<Odds, 2> odds_ = {initial_odds(), initial_odds()};
  std::deque<Text> texts_;
  uint64_t forgotten_ = 0;  // texts
  int64_t remembered_ = 0;
  std::unordered_map<uint64_t, Place> places_;  // the last of each n-gram's, by its hash

  static Odds initial_odds();
};

}  // namespace alignpro::engine
