// Drafts, from hand-written texts.

#include <cstdint>
#include <random>
#include <vector>

#include <doctest/doctest.h>
#include "alignpro/engine/lookup.h"

namespace alignpro::engine {
namespace {

using Tokens = std::vector<int32_t>;

// Rows that cost nothing: what matches is drafted.
constexpr ops::RowCost kCheap{0.0, false};

Draft draft_of(Lookup& lookup, const Tokens& tokens, int64_t most, uint64_t version = 0,
               const Tokens& stop_ids = {}) {
  Lookup::Step step = Lookup::step_of(1);
  return lookup.draft(version, tokens, stop_ids, most, {}, step);
}

TEST_CASE("a draft goes on as the longest match did, the latest of equals") {
  Lookup lookup(kCheap);
  CHECK(draft_of(lookup, {5}, 4).tokens.empty());
  CHECK(draft_of(lookup, {1, 2, 3, 4}, 4).tokens.empty());
  // "2 3" was followed by 4 5 before, "3" alone by 9.
  const Draft longest = draft_of(lookup, {1, 2, 3, 4, 5, 3, 9, 2, 3}, 3);
  CHECK_EQ(longest.tokens, Tokens{4, 5, 3});
  CHECK_EQ(longest.match, 2);
  CHECK(longest.source == Draft::Source::kOwn);
  CHECK_EQ(draft_of(lookup, {7, 1, 7, 2, 7}, 2).tokens, Tokens{2, 7});
  CHECK_EQ(draft_of(lookup, {1, 2, 3, 4, 5, 2, 3}, 1).tokens, Tokens{4});
  CHECK(draft_of(lookup, {1, 2, 3, 4, 5, 2, 3}, 0).tokens.empty());
}

TEST_CASE("a repetition goes on in its own draft") {
  Lookup lookup(kCheap);
  CHECK_EQ(draft_of(lookup, {8, 6, 6}, 4).tokens, Tokens{6, 6, 6, 6});
  CHECK_EQ(draft_of(lookup, {1, 2, 3, 1, 2, 3}, 7).tokens, Tokens{1, 2, 3, 1, 2, 3, 1});
}

TEST_CASE("a stop id is not drafted") {
  Lookup lookup(kCheap);
  CHECK_EQ(draft_of(lookup, {2, 3, 4, 5, 6, 2, 3}, 9, 0, {1, 5}).tokens, Tokens{4});
  CHECK(draft_of(lookup, {2, 3, 4, 5, 6, 2, 3}, 9, 0, {4}).tokens.empty());
}

TEST_CASE("soft rows are not drafted, and no match goes through them") {
  Lookup lookup(kCheap);
  CHECK_EQ(draft_of(lookup, {2, 3, 4, -1, 6, 2, 3}, 9).tokens, Tokens{4});
  CHECK(draft_of(lookup, {-2, -1, 5, -2, -1}, 9).tokens.empty());
  CHECK_EQ(draft_of(lookup, {-1, 2, 5, 7, -1, 2}, 1).match, 1);
  lookup.remember(1, Tokens{-3, -2, -1}, Tokens{13, 14, 15, 16});
  CHECK(draft_of(lookup, {-3, -2, -1}, 3, 1).tokens.empty());
  CHECK(draft_of(lookup, {-2, -1, 13}, 3, 1).tokens.empty());  // one token: shorter than an n-gram
  CHECK_EQ(draft_of(lookup, {-1, 13, 14, 15}, 3, 1).tokens, Tokens{16});
}

TEST_CASE("texts are remembered by version and forgotten from the oldest") {
  Lookup lookup(kCheap);
  lookup.remember(1, Tokens{10, 11, 12}, Tokens{13, 14, 15, 16});
  const Draft draft = draft_of(lookup, {40, 10, 11, 12}, 3, 1);
  CHECK_EQ(draft.tokens, Tokens{13, 14, 15});
  CHECK_EQ(draft.match, 3);
  CHECK(draft.source == Draft::Source::kRemembered);
  CHECK_EQ(draft_of(lookup, {13, 14, 15}, 3, 1).tokens, Tokens{16});  // and there it ended
  CHECK(draft_of(lookup, {10, 11, 12}, 3, 2).tokens.empty());         // other weights
  CHECK(draft_of(lookup, {11, 12}, 3, 1).tokens.empty());             // shorter than an n-gram

  // What a prompt's own end tells apart, behind a common one.
  Tokens one, other;
  for (int32_t i = 0; i < 12; ++i) one.push_back(100 + i), other.push_back(200 + i);
  for (const int32_t token : {1, 2, 3, 4}) one.push_back(token), other.push_back(token);
  lookup.remember(1, one, Tokens{50, 51});
  lookup.remember(1, other, Tokens{60, 61});
  CHECK_EQ(draft_of(lookup, one, 2, 1).tokens, Tokens{50, 51});
  CHECK_EQ(draft_of(lookup, other, 2, 1).tokens, Tokens{60, 61});

  for (int32_t text = 0; text < 10; ++text) {
    lookup.remember(2, {}, Tokens(1 << 12, text));
    CHECK(lookup.remembered() <= Lookup::kMostRemembered);
  }
  CHECK(draft_of(lookup, {10, 11, 12}, 3, 1).tokens.empty());
  CHECK_EQ(draft_of(lookup, {30, 9, 9, 9}, 1, 2).tokens, Tokens{9});
  lookup.remember(3, {}, Tokens(1 << 20, 1));
  CHECK(lookup.remembered() <= Lookup::kMostRemembered);
}

TEST_CASE("what is forgotten leaves what was written since") {
  Lookup lookup(kCheap);
  std::mt19937 random(3);
  for (int round = 0; round < 3000; ++round) {
    Tokens text;
    for (int i = 0; i < 50; ++i) text.push_back(static_cast<int32_t>(random() % 4));
    lookup.remember(round % 3, std::span(text).first(10), std::span(text).subspan(10));
    CHECK(lookup.remembered() <= Lookup::kMostRemembered);
    // The last text is found from anywhere in it: an odd token before it keeps out its own matches.
    Tokens beginning = {99};
    beginning.insert(beginning.end(), text.begin(), text.begin() + 30);
    const Draft draft = draft_of(lookup, beginning, 3, round % 3);
    if (draft.source != Draft::Source::kRemembered) continue;
    CHECK_EQ(draft.match, 16);
    CHECK_EQ(draft.tokens, Tokens(text.begin() + 30, text.begin() + 33));
  }
}

TEST_CASE("drafts grow with what is accepted and stop where they cost more than they bring") {
  const Tokens copy = {1,  2,  3,  4,  5,  6, 7, 8, 9, 10, 11, 12, 13,
                       14, 15, 16, 17, 18, 1, 2, 3, 4, 5,  6,  7,  8};
  constexpr ops::RowCost kDear{0.4, false};
  Lookup dear(kDear), cheap({0.1, false}), never({1.0, false});
  CHECK(draft_of(never, copy, 15).tokens.empty());
  const auto first = draft_of(dear, copy, 15).tokens.size();
  CHECK((first >= 1 && first < draft_of(cheap, copy, 15).tokens.size()));

  for (int i = 0; i < 100; ++i) {
    const Draft draft = draft_of(dear, copy, 15);
    dear.learn(draft, {std::ssize(draft.tokens), std::ssize(draft.tokens)});
  }
  CHECK(draft_of(dear, copy, 15).tokens.size() > first);

  // Where nothing is ever accepted, few drafts are made, and some: it may change.
  int drafts = 0;
  for (int i = 0; i < 1200; ++i) {
    const Draft draft = draft_of(dear, copy, 15);
    if (draft.tokens.empty()) continue;
    dear.learn(draft, {1, 0});
    drafts += i < 200 ? 0 : 1;
  }
  CHECK((drafts > 5 && drafts < 50));

  // A sequence's own record counts more than what others taught.
  Lookup fresh(kDear);
  Lookup::Step own = Lookup::step_of(1), others = own;
  CHECK(fresh.draft(0, copy, {}, 15, {8, 0}, own).tokens.empty());
  CHECK(fresh.draft(0, copy, {}, 15, {8, 8}, others).tokens.size() > first);

  // Several sequences share what a step costs: a row must be likelier to be needed.
  Lookup shared(kDear);
  Lookup::Step step = Lookup::step_of(4);
  CHECK(shared.draft(0, copy, {}, 15, {}, step).tokens.size() < first);
}

// Nine rows open a second tile: the ninth is dear, and those behind it are not.
double tile_cost(int64_t rows) { return rows <= 8 ? 1.0 + 0.02 * static_cast<double>(rows) : 2.5; }

TEST_CASE("costs are learnt from what steps take, whatever the machine's speed") {
  StepCosts costs({0.4, true}), told({0.4, false});
  std::mt19937 random(5);
  double speed = 3e-3;
  for (int i = 0; i < 4000; ++i) {
    if (i % 200 == 0) speed = i % 400 == 0 ? 3e-3 : 9e-3;  // a neighbour comes and goes
    const auto rows = static_cast<int64_t>(1 + random() % 10);
    const double noise = random() % 50 == 0 ? 5.0 : 1.0 + 0.05 * static_cast<double>(random() % 3);
    costs.learn(rows, speed * noise * tile_cost(rows));
    told.learn(rows, speed * tile_cost(rows));
  }
  for (int64_t rows = 1; rows <= 10; ++rows) {
    CHECK(costs.of(rows) == doctest::Approx(tile_cost(rows) / tile_cost(1)).epsilon(0.1));
    CHECK(told.of(rows) == doctest::Approx(1.0 + 0.4 * static_cast<double>(rows - 1)));
  }
  CHECK(costs.of(14) == doctest::Approx(costs.of(10) + 4 * 0.4));
}

TEST_CASE("between numbers of rows that were seen lies a line, and an interruption is forgotten") {
  StepCosts costs({0.2, true});
  for (int i = 0; i < 20; ++i) costs.learn(1, 1e-3);
  for (int i = 0; i < 20; ++i) costs.learn(5, 2e-3);
  CHECK(costs.of(3) == doctest::Approx(1.5).epsilon(0.02));
  CHECK(costs.of(6) == doctest::Approx(2.2).epsilon(0.02));
  costs.learn(6, 90e-3);
  CHECK(costs.of(6) > 4.0);
  costs.learn(0, 1.0), costs.learn(StepCosts::kMostRows + 1, 1.0);
  costs.learn(7, 1e-5);  // no model's step
  for (int i = 0; i < 600; ++i) costs.learn(i % 2 == 0 ? 1 : 5, i % 2 == 0 ? 1e-3 : 2e-3);
  CHECK(costs.of(6) == doctest::Approx(2.2).epsilon(0.02));
}

TEST_CASE("a draft passes over a dear row where those behind it pay") {
  const Tokens copy = {1,  2,  3,  4,  5,  6, 7, 8, 9, 10, 11, 12, 13,
                       14, 15, 16, 17, 18, 1, 2, 3, 4, 5,  6,  7,  8};
  Lookup lookup({0.01, true});
  for (int i = 0; i < 40; ++i) {
    lookup.took(1, 1e-3);
    for (const int64_t rows : {2, 3, 12, 13, 16}) {
      lookup.took(rows, rows <= 2 ? 1.9e-3 : 2e-3);  // one more row nearly doubles a step
    }
  }
  for (int i = 0; i < 100; ++i) {
    const Draft draft = draft_of(lookup, copy, 15);
    CHECK(draft.tokens.size() > 2);
    lookup.learn(draft, {std::ssize(draft.tokens), std::ssize(draft.tokens)});
  }
  CHECK_EQ(draft_of(lookup, copy, 15).tokens.size(), 15);
  CHECK(draft_of(lookup, copy, 1).tokens.size() <= 1);
}

}  // namespace
}  // namespace alignpro::engine
