#include "alignpro/core/trace.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <mutex>
#include <utility>

#include "alignpro/core/error.h"

namespace alignpro::trace {
namespace {

// Reserved whole at the start, so that recording never moves what is recorded.
struct Recorder {
  std::mutex mutex;  // guards what follows, and changes of detail::level
  Recording recording;
  int64_t limit = 0;
  int64_t started_ns = 0;
};

Recorder& recorder() {
  static Recorder one;
  return one;
}

int64_t thread_id() {
  thread_local const int64_t id = syscall(SYS_gettid);
  return id;
}

}  // namespace

void start(Level level, int64_t limit) {
  require(level != Level::kOff, "trace: expected a level above off; stop() turns it off");
  require(limit >= 1, "trace: expected a limit of at least 1 event, got ", limit);
  Recorder& r = recorder();
  const std::lock_guard lock(r.mutex);
  require(!on(Level::kSteps), "trace: it is on already; stop() it first");
  r.recording = {};
  r.recording.events.reserve(static_cast<size_t>(limit));
  r.limit = limit;
  r.started_ns = detail::now_ns();
  detail::level.store(static_cast<int>(level), std::memory_order_relaxed);
}

Recording stop() {
  Recorder& r = recorder();
  const std::lock_guard lock(r.mutex);
  require(on(Level::kSteps), "trace: it is not on; start() it first");
  detail::level.store(static_cast<int>(Level::kOff), std::memory_order_relaxed);
  return std::exchange(r.recording, {});
}

namespace detail {

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void record(const char* name, int64_t begin_ns, int64_t end_ns, const Counts& counts) {
  Recorder& r = recorder();
  const std::lock_guard lock(r.mutex);
  // Ended after its recording did, or begun before this one.
  if (!on(Level::kSteps) || begin_ns < r.started_ns) return;
  Recording& to = r.recording;
  if (static_cast<int64_t>(to.events.size()) == r.limit) {
    ++to.dropped;
  } else {
    to.events.push_back({name, begin_ns, end_ns, thread_id(), counts});
  }
}

}  // namespace detail
}  // namespace alignpro::trace
