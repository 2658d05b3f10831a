#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

#include <doctest/doctest.h>
#include "alignpro/core/cgroup.h"
#include "alignpro/core/error.h"
#include "alignpro/core/parallel.h"
#include "alignpro/core/rng.h"

namespace alignpro {
namespace {

// Each item must be seen once, by a worker of the pool.
bool runs_each_item_once(ThreadPool& pool, int64_t items) {
  std::vector<std::atomic<int>> seen(static_cast<size_t>(items));
  std::atomic<bool> workers_ok{true};
  pool.run(items, [&](int64_t item, int worker) {
    seen[static_cast<size_t>(item)].fetch_add(1);
    if (worker < 0 || worker >= pool.size()) workers_ok = false;
  });
  for (const auto& count : seen) {
    if (count != 1) return false;
  }
  return workers_ok;
}

TEST_CASE("philox known answers") {
  // The vectors published with Random123 (kat_vectors, philox4x32 10).
  CHECK_EQ(philox4x32({0, 0, 0, 0}, {0, 0}),
           (PhiloxWords{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  const uint32_t ones = 0xffffffff;
  CHECK_EQ(philox4x32({ones, ones, ones, ones}, {ones, ones}),
           (PhiloxWords{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  CHECK_EQ(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
           (PhiloxWords{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST_CASE("keyed uniform is pinned") {
  // (0x6627e8d5e169c58d >> 11) * 2^-53, from the first vector above.
  CHECK_EQ(keyed_uniform(0, 0, 0), static_cast<double>(0x6627e8d5e169c58du >> 11) * 0x1.0p-53);
  const std::set<double> distinct = {keyed_uniform(0, 0, 0), keyed_uniform(1, 0, 0),
                                     keyed_uniform(uint64_t{1} << 32, 0, 0), keyed_uniform(0, 1, 0),
                                     keyed_uniform(0, 0, 1)};
  CHECK_EQ(distinct.size(), size_t{5});
  for (const double u : distinct) CHECK((u >= 0.0 && u < 1.0));
}

TEST_CASE("keyed uniform is uniform") {
  // 4096 draws in 16 bins: chi-square of 15 degrees of freedom exceeds 37.7 once in a thousand.
  std::array<int, 16> bins{};
  for (uint32_t position = 0; position < 4096; ++position) {
    ++bins[static_cast<size_t>(keyed_uniform(7, 3, position) * 16)];
  }
  double chi_square = 0;
  for (const int count : bins) chi_square += (count - 256.0) * (count - 256.0) / 256.0;
  CHECK(chi_square < 37.7);
}

TEST_CASE("team runs every item once") {
  for (const int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    CHECK_EQ(pool.size(), threads);
    for (const int64_t items : {0, 1, 2, 7, 1000}) CHECK(runs_each_item_once(pool, items));
  }
  ThreadPool automatic(0);
  CHECK_EQ(automatic.size(), available_cpus());
  CHECK_THROWS_WITH_AS((void)(ThreadPool(-1)), doctest::Contains("threads"), InvalidArgument);
}

TEST_CASE("team wakes from sleep and from spinning") {
  ThreadPool pool(4);
  for (int round = 0; round < 2000; ++round) CHECK(runs_each_item_once(pool, 5));
  for (int round = 0; round < 5; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    CHECK(runs_each_item_once(pool, 5));
  }
}

TEST_CASE("team uses its workers") {
  ThreadPool pool(2);
  // Two items that wait for each other finish only if two threads take one each.
  std::atomic<int> arrived{0};
  pool.run(2, [&](int64_t, int) {
    arrived.fetch_add(1);
    while (arrived.load() < 2) std::this_thread::yield();
  });
  CHECK_EQ(arrived.load(), 2);
}

TEST_CASE("team rethrows and stays usable") {
  for (const int threads : {1, 4}) {
    ThreadPool pool(threads);
    std::atomic<int> ran{0};
    CHECK_THROWS_WITH_AS((void)(pool.run(100000,
                                         [&](int64_t item, int) {
                                           ran.fetch_add(1);
                                           if (item == 3) throw std::runtime_error("item 3");
                                         })),
                         doctest::Contains("item 3"), std::runtime_error);
    CHECK(ran.load() < 100000);  // the rest was not handed out
    CHECK(runs_each_item_once(pool, 100));
  }
}

TEST_CASE("team serves concurrent callers in turn") {
  ThreadPool pool(3);
  // A worker number is a key to scratch space: two jobs at once would share it.
  std::array<std::atomic<bool>, 3> busy{};
  std::atomic<int> collisions{0};
  std::vector<int64_t> sums(8, 0);
  std::vector<std::thread> callers;
  for (size_t caller = 0; caller < sums.size(); ++caller) {
    callers.emplace_back([&, caller] {
      for (int round = 0; round < 50; ++round) {
        std::atomic<int64_t> sum{0};
        pool.run(20, [&](int64_t item, int worker) {
          if (busy[static_cast<size_t>(worker)].exchange(true)) ++collisions;
          sum.fetch_add(item);
          std::this_thread::yield();
          busy[static_cast<size_t>(worker)] = false;
        });
        sums[caller] += sum.load();
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const int64_t sum : sums) CHECK_EQ(sum, 50 * 190);
  CHECK_EQ(collisions.load(), 0);
}

TEST_CASE("team works in a forked child") {
  ThreadPool pool(4);
  CHECK(runs_each_item_once(pool, 50));
  // Fork while another thread uses the pool: the child inherits a held lock and no workers.
  std::atomic<bool> stop{false};
  std::thread busy([&] {
    while (!stop) pool.run(50, [](int64_t, int) {});
  });
  for (int round = 0; round < 5; ++round) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);  // a deadlock ends the child with SIGALRM
      bool ok = true;
      for (int i = 0; i < 20; ++i) ok = ok && runs_each_item_once(pool, 50);
      _exit(ok ? 0 : 1);
    }
    int status = -1;
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK((WIFEXITED(status) && WEXITSTATUS(status) == 0));
  }
  stop = true;
  busy.join();
  CHECK(runs_each_item_once(pool, 50));  // the parent's pool is untouched
}

TEST_CASE("cpu quota is parsed") {
  using cgroup::cpus_from_quota;
  CHECK(!cpus_from_quota("max 100000").has_value());
  CHECK(!cpus_from_quota("").has_value());
  CHECK(!cpus_from_quota("nonsense 100000").has_value());
  CHECK(!cpus_from_quota("100000 0").has_value());
  CHECK_EQ(cpus_from_quota("200000 100000\n").value_or(-1), 2);
  CHECK_EQ(cpus_from_quota("150000 100000").value_or(-1), 2);
  CHECK_EQ(cpus_from_quota("27000 100000").value_or(-1), 1);
  CHECK_EQ(cpus_from_quota("800001 100000").value_or(-1), 9);
}

TEST_CASE("cgroup texts are parsed") {
  CHECK_EQ(cgroup::path_from_membership("0::/\n").value_or("?"), "/");
  CHECK_EQ(cgroup::path_from_membership("12:cpu:/a\n0::/user.slice/x\n").value_or("?"),
           "/user.slice/x");
  CHECK(!cgroup::path_from_membership("4:memory:/a\n").has_value());
  CHECK_EQ(
      cgroup::value_of("MemTotal: 8 kB\nMemAvailable:   42 kB\n", "MemAvailable:").value_or(-1),
      42);
  CHECK(!cgroup::value_of("a 1\n", "b").has_value());
  CHECK(cgroup::available_memory() > 0);
  CHECK(available_cpus() >= 1);
}

}  // namespace
}  // namespace alignpro
