// Spans: what is recorded, by whom, and that nothing is where recording is off. What ops count is
// checked against numbers worked out by hand.

#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <map>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include <doctest/doctest.h>
#include "alignpro/core/error.h"
#include "alignpro/core/trace.h"
#include "alignpro/ops/lora_stack.h"
#include "alignpro/ops/op_counts.h"

namespace alignpro {
namespace {

using trace::Counts;
using trace::Level;
using trace::Recording;
using trace::Span;

TEST_CASE("spans nest") {
  trace::start(Level::kOps);
  {
    const Span outer(Level::kSteps, "outer", [] { return Counts{1, 2, 3, 4}; });
    const Span inner(Level::kOps, "inner");
    trace::mark(Level::kSteps, "mark", {.rows = 7, .key = ~uint64_t{0}});
  }
  const Recording got = trace::stop();
  CHECK_EQ(got.dropped, 0);
  CHECK_EQ(got.events.size(), size_t{3});  // in the order in which they ended
  const auto &mark = got.events[0], &inner = got.events[1], &outer = got.events[2];
  CHECK_EQ(std::string(mark.name), "mark");
  CHECK_EQ(std::string(inner.name), "inner");
  CHECK_EQ(std::string(outer.name), "outer");
  CHECK((outer.begin_ns <= inner.begin_ns && inner.begin_ns <= mark.begin_ns));
  CHECK((mark.end_ns == mark.begin_ns && mark.end_ns <= inner.end_ns));
  CHECK(inner.end_ns <= outer.end_ns);
  CHECK((outer.counts.rows == 1 && outer.counts.flops == 2 && outer.counts.bytes == 3));
  CHECK((outer.counts.key == 4 && mark.counts.rows == 7 && mark.counts.key == ~uint64_t{0}));
  CHECK_EQ(outer.thread, static_cast<int64_t>(syscall(SYS_gettid)));
}

TEST_CASE("one span may be begun again") {
  trace::start(Level::kOps);
  Span op;
  op.begin(Level::kOps, "first", [] { return Counts{.rows = 1}; });
  op.begin(Level::kOps, "second", [] { return Counts{}; });
  op.end();
  op.end();
  const Recording got = trace::stop();
  CHECK_EQ(got.events.size(), size_t{2});
  CHECK(got.events[0].end_ns <= got.events[1].begin_ns);
  CHECK((got.events[0].counts.rows == 1 && got.events[1].counts.rows == 0));
}

TEST_CASE("off records nothing and counts nothing") {
  int counted = 0;
  const auto count = [&counted] {
    ++counted;
    return Counts{};
  };
  {
    const Span span(Level::kSteps, "off", count);
  }
  trace::start(Level::kSteps);
  {
    const Span op(Level::kOps, "above the level", count);
    trace::mark(Level::kOps, "above the level", {});
  }
  const Recording got = trace::stop();
  {
    const Span span(Level::kSteps, "off again", count);
  }
  trace::start(Level::kOps);
  const Recording empty = trace::stop();
  CHECK((got.events.empty() && empty.events.empty() && counted == 0));
}

TEST_CASE("a span belongs to the recording that holds all of it") {
  Span before(Level::kSteps, "before");
  trace::start(Level::kSteps);
  before.end();
  Span across(Level::kSteps, "across");
  CHECK(trace::stop().events.empty());
  trace::start(Level::kSteps);
  across.end();
  CHECK(trace::stop().events.empty());
}

TEST_CASE("what is beyond the limit is counted") {
  trace::start(Level::kSteps, 3);
  for (int i = 0; i < 5; ++i) trace::mark(Level::kSteps, "mark", {.rows = i});
  const Recording got = trace::stop();
  CHECK_EQ(got.events.size(), size_t{3});
  CHECK_EQ(got.dropped, 2);
  CHECK_EQ(got.events[2].counts.rows, 2);  // the first ones are kept
  trace::start(Level::kSteps, 3);
  CHECK_EQ(trace::stop().dropped, 0);
}

TEST_CASE("threads record side by side") {
  constexpr int kThreads = 4, kSpans = 500;
  trace::start(Level::kSteps, kThreads * kSpans);
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([t] {
      for (int i = 0; i < kSpans; ++i) {
        const Span span(Level::kSteps, "work", [t] { return Counts{.rows = t}; });
      }
    });
  }
  for (auto& thread : threads) thread.join();
  const Recording got = trace::stop();
  CHECK_EQ(got.dropped, 0);
  std::map<int64_t, std::vector<trace::Event>> by_thread;
  for (const auto& event : got.events) by_thread[event.thread].push_back(event);
  CHECK_EQ(by_thread.size(), size_t{kThreads});
  for (const auto& [id, events] : by_thread) {
    CHECK_EQ(events.size(), size_t{kSpans});
    for (const auto& event : events) CHECK_EQ(event.counts.rows, events[0].counts.rows);
  }
}

TEST_CASE("starting and stopping out of turn") {
  CHECK_THROWS_WITH_AS((void)(trace::stop()), doctest::Contains("not on"), InvalidArgument);
  CHECK_THROWS_WITH_AS((void)(trace::start(Level::kOff)), doctest::Contains("above off"),
                       InvalidArgument);
  CHECK_THROWS_WITH_AS((void)(trace::start(Level::kOps, 0)),
                       doctest::Contains("at least 1 event, got 0"), InvalidArgument);
  trace::start(Level::kSteps);
  CHECK_THROWS_WITH_AS((void)(trace::start(Level::kOps)), doctest::Contains("on already"),
                       InvalidArgument);
  trace::stop();
}

TEST_CASE("counts of a linear") {
  const std::vector<float> source(32 * 48);
  const auto w = ops::PackedMatrix::pack(32, 48, source.data());
  const auto plain = ops::linear_counts(5, w, {}, {});
  CHECK_EQ(plain.rows, 5);
  CHECK_EQ(plain.flops, 2 * 5 * 32 * 48);
  CHECK_EQ(plain.bytes, w.bytes() + 4 * 5 * (32 + 48));
  const float some = 0.0f;
  const ops::Epilogue all{.bias = &some, .residual = &some};
  const auto with = ops::linear_counts(5, w, all, {});
  CHECK_EQ(with.bytes - plain.bytes, 4 * (32 + 5 * 32));
}

TEST_CASE("counts of an adapter are those of its rows") {
  const std::vector<float> values(32 * 16);  // enough for each matrix
  // q and v, of rank 3 each.
  const ops::LowRank update = ops::LowRank::pack({.ranks = 6,
                                                  .inputs = 16,
                                                  .outputs = 32,
                                                  .a = values,
                                                  .b = values,
                                                  .scale = 1.0f,
                                                  .modules = {{0, 16, 0, 3}, {24, 8, 3, 3}}});
  const auto w = ops::PackedMatrix::pack(32, 16, values.data());
  const std::array<ops::LowRankRows, 1> updates = {{{2, 6, &update, nullptr}}};
  const auto plain = ops::linear_counts(9, w, {}, {});
  const auto with = ops::linear_counts(9, w, {}, updates);
  // q: 16 outputs, v: 8, each of rank 3 on 16 inputs, for 4 rows.
  const int64_t weights = 3 * (16 + 16) + 3 * (16 + 8);
  CHECK_EQ(with.flops - plain.flops, 2 * 4 * weights);
  CHECK_EQ(with.bytes - plain.bytes, 4 * weights);
}

TEST_CASE("counts of attention") {
  ops::AttentionShape shape{
      .num_heads = 4, .num_kv_heads = 2, .head_dim = 8, .sliding_window = 0, .scale = 1.0f};
  const std::vector<int32_t> first = {7, 1, 4}, second = {7, 1, 5}, third = {2, 3, 8};
  const std::array<ops::Segment, 3> segments = {
      {{0, 3, 35, first}, {3, 1, 40, second}, {4, 1, 33, third}}};
  // Rows see 36, 37, 38, 41 and 34 positions, in blocks 1 to 5, 7 and 8.
  const auto counts_as = [&](DType dtype) {
    return ops::attention_counts(shape, ops::AttentionPlan(shape, segments, 2), dtype);
  };
  auto counts = counts_as(DType::kF32);
  CHECK_EQ(counts.rows, 5);
  CHECK_EQ(counts.flops, 4 * (36 + 37 + 38 + 41 + 34) * 4 * 8);
  CHECK_EQ(counts.bytes, 4 * (2 * 7 * 16 * 2 * 8 + 2 * 5 * 4 * 8));
  CHECK_EQ(counts.bytes - counts_as(DType::kF16).bytes, 2 * (2 * 7 * 16 * 2 * 8));
  // A window of 7 begins after the first block, which all but the third's row then leave out.
  shape.sliding_window = 7;
  counts = counts_as(DType::kF32);
  CHECK_EQ(counts.flops, 4 * 5 * 7 * 4 * 8);
  CHECK_EQ(counts.bytes, 4 * (2 * 5 * 16 * 2 * 8 + 2 * 5 * 4 * 8));
  CHECK_EQ(ops::kv_write_counts(shape, 3, DType::kF32).bytes, 2 * 4 * 2 * 3 * 2 * 8);
}

TEST_CASE("counts of the other ops") {
  const auto norm = ops::rms_norm_counts(3, 10);
  CHECK((norm.rows == 3 && norm.flops == 120 && norm.bytes == 4 * 70));
  const auto rope = ops::rope_counts(3, 2, 8);
  CHECK((rope.rows == 3 && rope.flops == 3 * 48 && rope.bytes == 4 * (2 * 48 + 3 * 8)));
  const auto swiglu = ops::swiglu_counts(3, 10);
  CHECK((swiglu.rows == 3 && swiglu.flops == 150 && swiglu.bytes == 4 * 90));
  const auto geglu = ops::geglu_counts(3, 10);
  CHECK((geglu.rows == 3 && geglu.flops == 270 && geglu.bytes == 4 * 90));
  const std::vector<float> source(64 * 16);
  const auto head = ops::PackedMatrix::pack(64, 16, source.data());
  const auto sample = ops::head_sample_counts(3, head);
  CHECK((sample.flops == 2 * 3 * 64 * 16 && sample.bytes == head.bytes() + 4 * 3 * 16));
  const auto embedding = ops::embedding_counts(3, head);
  CHECK((embedding.flops == 0 && embedding.bytes == 3 * (head.bytes() / 64 + 4 * 16)));
}

}  // namespace
}  // namespace alignpro
