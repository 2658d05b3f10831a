#pragma once

// A thread block of fibers: runs the bodies of csrc/cuda on the CPU, line for line. Fibers run in
// random order between barriers, a warp often far ahead of the others, and an asynchronous copy
// lands at once or when it is waited for, by chance: a missing barrier or wait then gives wrong
// numbers under some seed. A barrier that not all threads reach is an error.

#include <array>
#include <boost/context/detail/fcontext.hpp>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/bodies/block.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

class HostBlock {
 public:
  // Runs body(block) in every thread of a block.
  static void run(int threads, uint32_t seed, const std::function<void(HostBlock&)>& body) {
    HostBlock block(threads, seed, body);
    block.schedule();
  }

  // The one that runs.
  static HostBlock& current() { return *running(); }

  int thread() const { return current_; }
  int threads() const { return static_cast<int>(fibers_.size()); }

  // For what works beside the threads (host_hopper.h): state of this block; a coin; work that is
  // done at any time from now on; sleep until somebody wakes the list.
  template <typename State>
  State& beside() {
    if (beside_ == nullptr) beside_ = std::make_shared<State>(static_cast<size_t>(threads()));
    return *static_cast<State*>(beside_.get());
  }
  bool coin() { return random_() % 2 == 0; }
  void in_flight(std::function<void()> work) { flights_.push_back(std::move(work)); }
  void sleep_on(std::vector<int>& sleepers) {
    sleepers.push_back(current_);
    leave();
  }
  void wake(std::vector<int>& sleepers) {
    for (const int fiber : sleepers) make_runnable(fiber);
    sleepers.clear();
  }

  void sync() { arrive(block_barrier_, threads()); }

  template <typename T>
  T shuffle_xor(T value, int mask) {
    return exchange(value)[static_cast<size_t>(lane() ^ mask)];
  }

  void copy16(void* shared, const void* global, bool live) {
    aligned(shared);
    if (live) aligned(global);
    Copy copy{static_cast<char*>(shared), {}};
    if (live) std::memcpy(copy.bytes, global, sizeof copy.bytes);
    if (random_() % 2 == 0) {
      copy.land();
    } else {
      own().open.push_back(copy);
    }
  }
  void commit() { own().groups.push_back(std::move(own().open)), own().open.clear(); }
  template <int kPending>
  void wait() {
    auto& groups = own().groups;
    while (groups.size() > kPending) {
      for (const Copy& copy : groups.front()) copy.land();
      groups.erase(groups.begin());
    }
  }

  void load_matrices(uint32_t (&to)[4], const void* row) { load(to, row, false); }
  void load_transposed(uint32_t (&to)[4], const void* row) { load(to, row, true); }

  uint32_t round_pair(float low, float high) const {
    const uint32_t upper = alignpro::round_bfloat16(high).bits;
    return upper << 16 | alignpro::round_bfloat16(low).bits;
  }

  void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Operands {
      uint32_t a[4], b[2];
    };
    const Operands mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
    const auto all = exchange(mine);
    // Register r of lane l holds row l / 4 + 8 (r % 2), columns 2 (l % 4) + 8 (r / 2) and the next.
    const auto left = [&](int m, int k) {
      const Operands& from = all[static_cast<size_t>(m % 8 * 4 + k % 8 / 2)];
      return half_of(from.a[m / 8 + k / 8 * 2], k % 2);
    };
    const auto right = [&](int k, int n) {
      const Operands& from = all[static_cast<size_t>(n * 4 + k % 8 / 2)];
      return half_of(from.b[k / 8], k % 2);
    };
    for (int i = 0; i < 4; ++i) {
      const int m = lane() / 4 + i / 2 * 8, n = lane() % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k) c[i] = std::fma(left(m, k), right(k, n), c[i]);
    }
  }

 private:
  struct Copy {
    char* to;
    char bytes[16];
    void land() const { std::memcpy(to, bytes, sizeof bytes); }
  };
  using Context = boost::context::detail::fcontext_t;
  struct Fiber {
    Context context;
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
    bool done = false;
    int exchanges = 0;
    void* fake_stack = nullptr;
  };
  struct Barrier {
    std::vector<int> waiting;
  };
  // What the lanes of a warp show each other; two by turns, so that one barrier an exchange does.
  struct Shown {
    std::vector<char> bytes[2];
  };

  static constexpr size_t kStack = size_t{256} << 10;

  HostBlock(int threads, uint32_t seed, const std::function<void(HostBlock&)>& body)
      : body_(body),
        random_(seed),
        fibers_(static_cast<size_t>(threads)),
        warp_barriers_(static_cast<size_t>(threads / alignpro::cuda::kWarp)),
        shown_(warp_barriers_.size()),
        runnable_(warp_barriers_.size()) {
    for (size_t i = 0; i < fibers_.size(); ++i) {
      stacks().resize(std::max(stacks().size(), i + 1));
      if (stacks()[i] == nullptr) stacks()[i].reset(new char[kStack]);
#if defined(__SANITIZE_ADDRESS__)
      // Of frames that were left by a jump, in another block.
      __asan_unpoison_memory_region(stacks()[i].get(), kStack);
#endif
      fibers_[i].context = boost::context::detail::make_fcontext(stacks()[i].get() + kStack, kStack,
                                                                 &HostBlock::enter);
      make_runnable(static_cast<int>(i));
    }
  }

  static std::vector<std::unique_ptr<char[]>>& stacks() {
    static std::vector<std::unique_ptr<char[]>> all;
    return all;
  }
  static HostBlock*& running() {
    static HostBlock* block = nullptr;
    return block;
  }
  static void enter(boost::context::detail::transfer_t from) {
    HostBlock& block = *running();
    block.main_ = from.fctx;
    block.arrived(nullptr);
    block.body_(block);
    block.own().done = true;
    block.leave();
  }

  void schedule() {
    running() = this;
    size_t left = fibers_.size();
    while (next()) {
#if defined(__SANITIZE_ADDRESS__)
      void* fake = nullptr;
      __sanitizer_start_switch_fiber(&fake, stacks()[static_cast<size_t>(current_)].get(), kStack);
#endif
      own().context = boost::context::detail::jump_fcontext(own().context, nullptr).fctx;
#if defined(__SANITIZE_ADDRESS__)
      __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
      left -= own().done ? 1 : 0;
    }
    if (left != 0) {
      throw std::runtime_error("a barrier was not reached by all threads: " + std::to_string(left) +
                               " wait");
    }
  }

  // Picks a fiber; work in flight is done now and then, and when nobody else can go on.
  bool next() {
    if (!flights_.empty() && random_() % 16 == 0) finish_flight();
    while (!pick()) {
      if (flights_.empty()) return false;
      finish_flight();
    }
    return true;
  }
  void finish_flight() {
    std::swap(flights_[random_() % flights_.size()], flights_.back());
    const std::function<void()> work = std::move(flights_.back());
    flights_.pop_back();
    work();
  }

  // The next fiber to run: of the favourite warp while it can, which seldom changes.
  bool pick() {
    if (random_() % 128 == 0) favourite_ = random_() % runnable_.size();
    for (size_t tried = 0; tried < runnable_.size() && runnable_[favourite_].empty(); ++tried) {
      favourite_ = (favourite_ + 1) % runnable_.size();
    }
    std::vector<int>& ready = runnable_[favourite_];
    if (ready.empty()) return false;
    std::swap(ready[random_() % ready.size()], ready.back());
    current_ = ready.back();
    ready.pop_back();
    return true;
  }

  // Back to the scheduler; returns when this fiber is picked again.
  void leave() {
    Fiber& fiber = own();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fiber.fake_stack, main_stack_,
                                   main_size_);
#endif
    main_ = boost::context::detail::jump_fcontext(main_, nullptr).fctx;
    arrived(fiber.fake_stack);
  }

  void arrived([[maybe_unused]] void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, &main_stack_, &main_size_);
#endif
  }

  void make_runnable(int fiber) {
    runnable_[static_cast<size_t>(fiber / alignpro::cuda::kWarp)].push_back(fiber);
  }
  void arrive(Barrier& barrier, int count) {
    barrier.waiting.push_back(current_);
    if (static_cast<int>(barrier.waiting.size()) == count) {
      for (const int fiber : barrier.waiting) make_runnable(fiber);
      barrier.waiting.clear();
    }
    leave();
  }

  // The values of all lanes of the warp.
  template <typename T>
  std::array<T, alignpro::cuda::kWarp> exchange(const T& value) {
    const auto warp = static_cast<size_t>(current_ / alignpro::cuda::kWarp);
    std::vector<char>& bytes = shown_[warp].bytes[own().exchanges++ % 2];
    bytes.resize(std::max(bytes.size(), sizeof(T) * alignpro::cuda::kWarp));
    std::memcpy(bytes.data() + static_cast<size_t>(lane()) * sizeof(T), &value, sizeof(T));
    arrive(warp_barriers_[warp], alignpro::cuda::kWarp);
    std::array<T, alignpro::cuda::kWarp> all;
    std::memcpy(all.data(), bytes.data(), sizeof(T) * alignpro::cuda::kWarp);
    return all;
  }

  void load(uint32_t (&to)[4], const void* row, bool transposed) {
    aligned(row);
    const auto rows = exchange(row);
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint32_t packed = 0;
      for (int e = 0; e < 2; ++e) {
        const int r = lane() / 4, c = lane() % 4 * 2 + e;
        const void* from = rows[static_cast<size_t>(8 * matrix + (transposed ? c : r))];
        uint16_t bits;
        std::memcpy(&bits, static_cast<const char*>(from) + 2 * (transposed ? r : c), sizeof bits);
        packed |= static_cast<uint32_t>(bits) << (16 * e);
      }
      to[matrix] = packed;
    }
    // Slices may be written again once every lane has read.
    arrive(warp_barriers_[static_cast<size_t>(current_ / alignpro::cuda::kWarp)],
           alignpro::cuda::kWarp);
  }

  static float half_of(uint32_t packed, int e) {
    return alignpro::to_float(alignpro::Bfloat16{static_cast<uint16_t>(packed >> (16 * e))});
  }
  static void aligned(const void* pointer) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) {
      throw std::runtime_error("an address that must be a multiple of 16 bytes is not");
    }
  }
  int lane() const { return current_ % alignpro::cuda::kWarp; }
  Fiber& own() { return fibers_[static_cast<size_t>(current_)]; }

  const std::function<void(HostBlock&)>& body_;
  std::mt19937 random_;
  std::vector<Fiber> fibers_;
  std::vector<Barrier> warp_barriers_;
  std::vector<Shown> shown_;
  Barrier block_barrier_;
  std::shared_ptr<void> beside_;
  std::vector<std::function<void()>> flights_;
  std::vector<std::vector<int>> runnable_;  // by warp
  size_t favourite_ = 0;
  int current_ = 0;
  Context main_ = nullptr;
  const void* main_stack_ = nullptr;
  size_t main_size_ = 0;
};

// Values of T at 16-byte boundaries, made from floats and read back as floats.
template <typename T>
class Tensor {
 public:
  explicit Tensor(size_t count) : packs_((count * sizeof(T) + 15) / 16), count_(count) {
    std::memset(packs_.data(), 0xff, packs_.size() * 16);  // NaN
  }
  explicit Tensor(const std::vector<float>& values) : Tensor(values.size()) {
    for (size_t i = 0; i < count_; ++i) data()[i] = alignpro::stored<T>(values[i]);
  }
  T* data() { return reinterpret_cast<T*>(packs_.data()); }
  std::vector<float> floats() {
    std::vector<float> values(count_);
    for (size_t i = 0; i < count_; ++i) values[i] = alignpro::to_float(data()[i]);
    return values;
  }

 private:
  std::vector<alignpro::cuda::Pack<uint32_t>> packs_;
  size_t count_;
};
