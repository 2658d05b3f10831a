#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

// Where the time goes: named spans of work on the steady clock, with what they computed. Off, which
// is how a process starts, a span is one relaxed load: no clock, no allocation, no counting. The
// numbers of a computation never depend on it.
namespace alignpro::trace {

enum class Level : int {
  kOff = 0,
  kSteps = 1,  // the engine's steps and what they consist of
  kOps = 2,    // and every op
};

// What a span computed, by count: a multiply-add is two operations, bytes are those of the
// operands as they are stored.
struct Counts {
  int64_t rows = 0;
  int64_t flops = 0;
  int64_t bytes = 0;
  uint64_t key = 0;  // of rows of one request: its seed
};

struct Event {
  const char* name;
  int64_t begin_ns;  // std::chrono::steady_clock
  int64_t end_ns;    // begin_ns for a mark
  int64_t thread;    // gettid()
  Counts counts;
};

struct Recording {
  std::vector<Event> events;  // in the order in which they ended
  int64_t dropped = 0;        // events beyond the limit
};

inline constexpr int64_t kEventLimit = 1 << 21;  // address space of 128 MB, touched as it fills

// Records from now on, for all threads, the first `limit` events. Throws InvalidArgument where it
// is on already.
void start(Level level, int64_t limit = kEventLimit);

// Ends the recording and hands it over; spans still open are not in it. Throws InvalidArgument
// where it is off.
Recording stop();

namespace detail {

inline std::atomic<int> level{0};

int64_t now_ns();
void record(const char* name, int64_t begin_ns, int64_t end_ns, const Counts& counts);

}  // namespace detail

inline bool on(Level level) {
  return detail::level.load(std::memory_order_relaxed) >= static_cast<int>(level);
}

// A moment rather than a span: what a step was made of.
inline void mark(Level level, const char* name, const Counts& counts) {
  if (!on(level)) return;
  const int64_t now = detail::now_ns();
  detail::record(name, now, now, counts);
}

// Names are string literals: they are kept as pointers.
class Span {
 public:
  Span() = default;
  Span(Level level, const char* name) {
    begin(level, name, [] { return Counts{}; });
  }
  template <typename CountsOf>
  Span(Level level, const char* name, const CountsOf& counts_of) {
    begin(level, name, counts_of);
  }
  ~Span() { end(); }
  Span(const Span&) = delete;
  Span& operator=(const Span&) = delete;

  // Ends what is open and begins anew. `counts_of` is called only where recording is on, before the
  // clock is read.
  template <typename CountsOf>
  void begin(Level level, const char* name, const CountsOf& counts_of) {
    end();
    if (!on(level)) return;
    name_ = name;
    counts_ = counts_of();
    begin_ns_ = detail::now_ns();
  }
  void end() {
    if (name_ == nullptr) return;
    detail::record(name_, begin_ns_, detail::now_ns(), counts_);
    name_ = nullptr;
  }

 private:
  const char* name_ = nullptr;  // null: not open
  int64_t begin_ns_ = 0;
  Counts counts_;
};

}  // namespace alignpro::trace
