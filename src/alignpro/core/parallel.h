#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace alignpro {

// CPUs this process may use: the smallest of its affinity mask and the cgroup v2 quota (rounded
// up), never the host's core count.
int available_cpus();

// One persistent pool of workers. Results never depend on its size: work items write disjoint
// outputs and every reduction has a fixed order (contract 2).
class ThreadPool {
 public:
  // `threads` >= 1 counts the caller; 0 means available_cpus().
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const;

  // Calls fn(item, worker) for every item in [0, items), worker in [0, size()); returns when all
  // are done. Items are handed out dynamically. The first exception is rethrown here. Concurrent
  // callers take turns. Must not be called from inside fn. Safe in a forked child (workers are made
  // anew).
  void run(int64_t items, const std::function<void(int64_t item, int worker)>& fn);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace alignpro
