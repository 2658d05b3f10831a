#include "alignpro/core/parallel.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "alignpro/core/cgroup.h"
#include "alignpro/core/error.h"

namespace alignpro {
namespace {

int affinity_cpus() {
  // The kernel refuses a mask smaller than its own, so grow until it fits.
  for (int bits = 1024; bits <= 1 << 20; bits *= 2) {
    cpu_set_t* set = CPU_ALLOC(static_cast<size_t>(bits));
    if (set == nullptr) break;
    const size_t bytes = CPU_ALLOC_SIZE(static_cast<size_t>(bits));
    CPU_ZERO_S(bytes, set);
    const bool ok = sched_getaffinity(0, bytes, set) == 0;
    const int count = ok ? CPU_COUNT_S(bytes, set) : 0;
    CPU_FREE(set);
    if (ok) return std::max(count, 1);
  }
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// Counts forks on the way from the first process to this one. Threads do not survive a fork, so a
// pool whose number is not the current one has no workers any more.
std::atomic<uint32_t> fork_count{0};

void watch_forks() {
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { fork_count.fetch_add(1, std::memory_order_relaxed); });
  (void)registered;
}

inline void cpu_relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// True as soon as `ready()` is; false after about 30 microseconds: longer than the gap between two
// products of a layer, shorter than what a sleep and a wake-up cost.
template <typename Ready>
bool spin_until(const Ready& ready) {
  const auto give_up = std::chrono::steady_clock::now() + std::chrono::microseconds(30);
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      cpu_relax();
    }
  } while (std::chrono::steady_clock::now() < give_up);
  return false;
}

using Work = std::function<void(int64_t, int)>;

// What the caller and its workers share. A job is open while items remain; a worker takes part by
// raising the count while the job is open, so one that wakes late costs the caller nothing.
// gate = epoch | open | count of workers inside, in one word that a futex can wait on.
struct Workers {
  static constexpr uint32_t kCountMask = 0xFFF;
  static constexpr uint32_t kOpen = 0x1000;
  static constexpr uint32_t kEpoch = 0x2000;

  explicit Workers(int threads)
      : size(threads), forks(fork_count.load(std::memory_order_relaxed)) {}

  const int size;
  const uint32_t forks;  // fork_count when it was made
  std::mutex turn;       // one caller at a time
  std::vector<std::thread> workers;

  alignas(64) std::atomic<uint32_t> gate{0};
  std::atomic<bool> stopping{false};
  alignas(64) std::atomic<uint32_t> drained{0};  // bumped when the last worker leaves a closed job
  alignas(64) std::atomic<int64_t> next{0};
  int64_t items = 0;
  const Work* work = nullptr;
  std::mutex error_mutex;
  std::exception_ptr error;

  void start_workers() {
    while (static_cast<int>(workers.size()) < size - 1) {
      const int worker = static_cast<int>(workers.size()) + 1;
      workers.emplace_back([this, worker] { worker_loop(worker); });
    }
  }

  void take_items(int worker) {
    try {
      for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) {
        (*work)(item, worker);
      }
    } catch (...) {
      next.store(items, std::memory_order_relaxed);  // hand out nothing more
      const std::lock_guard lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  }

  // Enters the open job unless it was `last` already; false when there is none to enter.
  bool enter(uint32_t& last) {
    uint32_t seen = gate.load(std::memory_order_acquire);
    while ((seen & kOpen) != 0 && seen / kEpoch != last) {
      if (gate.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) {
        last = seen / kEpoch;
        return true;
      }
    }
    return false;
  }

  void worker_loop(int worker) {
    uint32_t last = 0;  // epoch of the last job done; the first job's is 1
    while (!stopping.load(std::memory_order_acquire)) {
      if (!spin_until([&] { return enter(last); })) {
        const uint32_t seen = gate.load(std::memory_order_acquire);
        const bool idle = (seen & kOpen) == 0 || seen / kEpoch == last;
        if (idle && !stopping.load(std::memory_order_acquire)) gate.wait(seen);
        continue;
      }
      take_items(worker);
      const uint32_t left = gate.fetch_sub(1) - 1;
      if ((left & (kOpen | kCountMask)) == 0) {
        drained.fetch_add(1);
        drained.notify_all();
      }
    }
  }

  void run(int64_t count, const Work& fn) {
    const std::lock_guard lock(turn);
    if (count == 1 || size == 1) {
      for (int64_t item = 0; item < count; ++item) fn(item, 0);
      return;
    }
    start_workers();
    items = count;
    work = &fn;
    error = nullptr;
    next.store(0, std::memory_order_relaxed);
    const uint32_t epoch = gate.load() / kEpoch + 1;
    gate.store(epoch * kEpoch | kOpen, std::memory_order_seq_cst);
    gate.notify_all();
    take_items(0);
    gate.fetch_and(~kOpen);
    const auto empty = [this] { return (gate.load() & kCountMask) == 0; };
    if (!spin_until(empty)) {
      while (true) {
        const uint32_t seen = drained.load();
        if (empty()) break;
        drained.wait(seen);
      }
    }
    if (error) std::rethrow_exception(std::exchange(error, nullptr));
  }

  void stop() {
    stopping.store(true);
    gate.fetch_add(kEpoch);
    gate.notify_all();
    for (std::thread& worker : workers) worker.join();
  }
};

}  // namespace

int available_cpus() {
  int cpus = affinity_cpus();
  for (const auto& directory : cgroup::directories()) {
    const auto quota = cgroup::cpus_from_quota(cgroup::read_text(directory / "cpu.max"));
    if (quota) cpus = std::min(cpus, *quota);
  }
  return cpus;
}

struct ThreadPool::Impl {
  explicit Impl(int threads) : workers(new Workers(threads)) {}

  std::atomic<Workers*> workers;

  // The workers of this process. After a fork the old ones are abandoned as they stand: their
  // threads are gone, and one of them may have held the mutex.
  Workers& current() {
    Workers* seen = workers.load(std::memory_order_acquire);
    if (seen->forks == fork_count.load(std::memory_order_relaxed)) return *seen;
    auto fresh = std::make_unique<Workers>(seen->size);
    if (workers.compare_exchange_strong(seen, fresh.get(), std::memory_order_acq_rel)) {
      return *fresh.release();
    }
    return *seen;
  }
};

ThreadPool::ThreadPool(int threads) {
  require(threads >= 0 && threads < static_cast<int>(Workers::kCountMask),
          "threads: expected 1 to 4094, or 0 for the available CPUs, got ", threads);
  watch_forks();
  impl_ = std::make_unique<Impl>(threads == 0 ? available_cpus() : threads);
}

ThreadPool::~ThreadPool() {
  Workers* workers = impl_->workers.load();
  if (workers->forks != fork_count.load()) return;  // abandoned: nothing to join in this process
  workers->stop();
  delete workers;
}

int ThreadPool::size() const { return impl_->workers.load(std::memory_order_relaxed)->size; }

void ThreadPool::run(int64_t items, const std::function<void(int64_t item, int worker)>& fn) {
  if (items > 0) impl_->current().run(items, fn);
}

}  // namespace alignpro
