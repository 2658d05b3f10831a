// What a trace span costs: off, where every op of every layer passes one, and on. Nanoseconds a
// span around work that the compiler cannot drop, less the work alone; the least of kRepeats.
//
//   cmake -S . -B build -DALIGNPRO_PYTHON=OFF -DALIGNPRO_TESTS=ON && cmake --build build
//   build/tests/bench/trace_bench

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <limits>

#include "alignpro/core/trace.h"

namespace {

namespace trace = alignpro::trace;

constexpr int kRepeats = 9;

volatile int64_t sink = 0;

template <typename Work>
double nanoseconds_each(int64_t count, const Work& work) {
  double least = std::numeric_limits<double>::max();
  for (int i = 0; i < kRepeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    for (int64_t n = 0; n < count; ++n) work(n);
    const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - start;
    least = std::min(least, took.count() / static_cast<double>(count));
  }
  return least;
}

}  // namespace

int main() {
  const auto bare = [](int64_t n) { sink = n; };
  const auto spanned = [](int64_t n) {
    const trace::Span span(trace::Level::kOps, "bench", [n] { return trace::Counts{.rows = n}; });
    sink = n;
  };
  constexpr int64_t kOff = 20'000'000, kOn = 200'000;
  const double off = nanoseconds_each(kOff, spanned) - nanoseconds_each(kOff, bare);
  trace::start(trace::Level::kOps);
  const double on = nanoseconds_each(kOn, spanned) - nanoseconds_each(kOn, bare);
  const trace::Recording recording = trace::stop();
  std::printf("off %.2f ns a span, on %.0f ns (%zu recorded, %ld dropped)\n", off, on,
              recording.events.size(), static_cast<long>(recording.dropped));
}
