#pragma once

// What csrc/cuda/hopper.h has, on the CPU: barriers with phases, TMA, wgmma. Addresses are those of
// the shared window; TMA writes and wgmma reads through the 128-byte swizzle as the hardware's
// address bits give it, and wgmma finds its operands by the bits of a descriptor. A copy lands at
// any time between its issue and the end of its barrier's phase; a product is computed at any time
// between its issue and its wait. So a stage that is written too soon or read too soon gives wrong
// numbers, and a phase that never ends is reported.

#include <cstring>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#include "cuda/bodies/tile_product.h"
#include "cuda/bodies/wgmma_tile.h"
#include "host_launch.h"

#define ALIGNPRO_ON_SM90A

namespace alignpro::cuda {

struct TensorMap {
  Operand<Bfloat16> matrix;
  int box;
};

inline TensorMap tensor_map(const char*, const Operand<Bfloat16>& m, int box) {
  if (m.rows < 1 || m.depth < 1 || box < 1 || box > 256 || m.ld * 2 % 16 != 0 ||
      reinterpret_cast<uintptr_t>(m.data) % 16 != 0) {
    throw std::runtime_error("a matrix that TMA does not take");
  }
  return {m, box};
}

class HopperBlock : public DeviceBlock {
 public:
  using Map = TensorMap;

  uint32_t shared_address(const void* shared) const {
    const auto at = static_cast<const unsigned char*>(shared) - shared_window().bytes;
    expected(at >= 0 && at < static_cast<int64_t>(sizeof(SharedWindow)),
             "an address that is not in shared memory");
    return static_cast<uint32_t>(at);
  }

  void init_barrier(uint64_t* barrier, int arrivals) {
    state().barriers[barrier] = {.arrivals = arrivals, .missing = arrivals};
  }
  void publish_barriers() {
    for (auto& [at, barrier] : state().barriers) barrier.published = true;
  }
  void arrive(uint64_t* at) {
    Barrier& barrier = found(at);
    expected(--barrier.missing >= 0, "a barrier with more arrivals than it was made for");
    end_phase(barrier);
  }
  void expect(uint64_t* at, int bytes) {
    found(at).bytes += bytes;
    arrive(at);
  }
  void wait_phase(uint64_t* at, uint32_t parity) {
    Barrier& barrier = found(at);
    while (barrier.parity == parity) host().sleep_on(barrier.sleepers);
  }

  void load_box(void* shared, const TensorMap& map, int64_t depth, int64_t row, uint64_t* at) {
    const uint32_t to = shared_address(shared);
    expected(to % 128 == 0, "a box that does not begin at a multiple of 128 bytes");
    expected(found(at).published, "a barrier that TMA may not have seen");
    // Parts of a box may be there at once.
    if (host().coin()) std::memset(shared, 0xff, static_cast<size_t>(map.box) * kStageRowBytes);
    HostBlock& block = host();
    block.in_flight([&block, this_state = &state(), map, to, depth, row, at] {
      const Operand<Bfloat16>& m = map.matrix;
      for (int r = 0; r < map.box; ++r) {
        for (int chunk = 0; chunk < 8; ++chunk) {
          const int64_t from_row = row + r, from = depth + 8 * chunk;
          Bfloat16 values[8] = {};
          for (int i = 0; i < 8; ++i) {
            const bool inside = from_row >= 0 && from_row < m.rows && from + i < m.depth;
            if (inside) values[i] = m.data[from_row * m.ld + from + i];
          }
          const auto line = static_cast<uint32_t>(r * kStageRowBytes + 16 * chunk);
          std::memcpy(shared_window().bytes + swizzled(to + line), values, sizeof values);
        }
      }
      Barrier& barrier = this_state->barriers.at(at);
      barrier.bytes -= map.box * kStageRowBytes;
      if (barrier.missing == 0 && barrier.bytes == 0) turn(block, barrier);
    });
  }

  template <int kEights>
  void begin_products(float (&)[kEights][4]) {
    own().begun = true;
  }
  template <int kEights>
  void multiply_group(float (&sums)[kEights][4], uint64_t a, uint64_t b) {
    Thread& thread = own();
    expected(thread.begun, "a product without begin_products since the last commit");
    // The whole warpgroup asks for the same.
    auto& issued = state().issued[static_cast<size_t>(this->thread() / kGroupThreads)];
    if (thread.issued == issued.size()) issued.push_back({a, b});
    expected(issued[thread.issued++] == std::pair(a, b), "a warpgroup of two minds");
    thread.open.push_back({&sums[0][0], kEights, a, b});
    if (host().coin()) {
      finish(thread, 0);
      for (const Product& product : thread.open) compute(product);
      thread.open.clear();
    }
  }
  void commit_products() {
    Thread& thread = own();
    thread.groups.push_back(std::move(thread.open));
    thread.open.clear();
    thread.begun = false;
  }
  template <int kPending, int kEights>
  void wait_products(float (&)[kEights][4]) {
    finish(own(), kPending);
    (void)shuffle_xor(0, 1);  // a warp's lanes wait together: the first may speak for them
  }

  template <int kRegisters>
  void lower_registers() {
    static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  }
  template <int kRegisters>
  void raise_registers() {
    static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  }

 private:
  struct Barrier {
    int arrivals = 0, missing = 0;
    int64_t bytes = 0;
    uint32_t parity = 0;  // of the phase that lasts
    bool published = false;
    std::vector<int> sleepers = {};
  };
  struct Product {
    float* sums;
    int eights;
    uint64_t a, b;
  };
  struct Thread {
    std::vector<Product> open;
    std::vector<std::vector<Product>> groups;
    bool begun = false;
    size_t issued = 0;
  };
  struct State {
    explicit State(size_t count) : threads(count), issued(count / kGroupThreads + 1) {}
    std::unordered_map<const void*, Barrier> barriers;
    std::vector<Thread> threads;
    std::vector<std::vector<std::pair<uint64_t, uint64_t>>> issued;  // by warpgroup
  };

  static HostBlock& host() { return HostBlock::current(); }
  static State& state() { return host().beside<State>(); }
  static Thread& own() { return state().threads[static_cast<size_t>(host().thread())]; }
  static void expected(bool holds, const char* otherwise) {
    if (!holds) throw std::runtime_error(otherwise);
  }

  static Barrier& found(uint64_t* at) {
    const auto barrier = state().barriers.find(at);
    expected(barrier != state().barriers.end(), "a barrier that was not made");
    return barrier->second;
  }
  static void end_phase(Barrier& barrier) {
    if (barrier.missing == 0 && barrier.bytes == 0) turn(host(), barrier);
  }
  static void turn(HostBlock& block, Barrier& barrier) {
    barrier.parity ^= 1;
    barrier.missing = barrier.arrivals;
    block.wake(barrier.sleepers);
  }

  // 128 bytes: bits 4 to 6 of an address are changed by bits 7 to 9.
  static uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

  // Row r of a slice, its 16 values along the contraction.
  static void read(uint64_t slice, int r, float (&values)[16]) {
    const auto field = [slice](int from) { return static_cast<uint32_t>(slice >> from & 0x3fff); };
    expected(slice >> 62 == 1 && (slice >> 49 & 7) == 0, "a slice that is not swizzled by 128");
    const uint32_t line = (field(0) << 4) + static_cast<uint32_t>(r / 8) * (field(32) << 4) +
                          static_cast<uint32_t>(r % 8) * kStageRowBytes;
    for (int half = 0; half < 2; ++half) {
      const uint32_t at = swizzled(line + 16 * static_cast<uint32_t>(half));
      expected(at + 16 <= sizeof(SharedWindow), "a slice that ends outside of shared memory");
      uint16_t bits[8];
      std::memcpy(bits, shared_window().bytes + at, sizeof bits);
      for (int i = 0; i < 8; ++i) values[8 * half + i] = to_float(Bfloat16{bits[i]});
    }
  }

  // This thread's share.
  static void compute(const Product& product) {
    const int thread = host().thread();
    float left[2][16], right[16];
    for (int h = 0; h < 2; ++h) {
      read(product.a, thread / kWarp % 4 * 16 + 8 * h + thread % kWarp / 4, left[h]);
    }
    for (int j = 0; j < product.eights; ++j) {
      for (int e = 0; e < 2; ++e) {
        read(product.b, 8 * j + thread % 4 * 2 + e, right);
        for (int h = 0; h < 2; ++h) {
          double sum = 0.0;
          for (int k = 0; k < 16; ++k) sum += double{left[h][k]} * double{right[k]};
          float& to = product.sums[4 * j + 2 * h + e];
          to = static_cast<float>(to + sum);
        }
      }
    }
  }
  static void finish(Thread& thread, size_t pending) {
    while (thread.groups.size() > pending) {
      for (const Product& product : thread.groups.front()) compute(product);
      thread.groups.erase(thread.groups.begin());
    }
  }
};

}  // namespace alignpro::cuda
