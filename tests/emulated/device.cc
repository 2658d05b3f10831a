// A device that is the CPU, for the tests: device memory is the heap's, poisoned, and work on a
// stream is done when the call returns. Answers for device.cu and runtime.cu beside the launchers
// of host_launch.h, and says what it is wherever it is asked. A graph is the list of its launches.

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "alignpro/core/error.h"
#include "cuda/products.h"
#include "cuda/runtime.h"
#include "host_launch.h"

namespace alignpro::cuda {
namespace {

constexpr int64_t kLine = 256;
constexpr int64_t kFree = int64_t{64} << 20;

void* poisoned(int64_t bytes) {
  const auto size = static_cast<size_t>((bytes + kLine - 1) / kLine * kLine);
  void* memory = std::aligned_alloc(kLine, size == 0 ? kLine : size);
  if (memory == nullptr) throw std::bad_alloc();
  return std::memset(memory, 0xff, size);  // NaN
}

}  // namespace

std::string unavailable_reason() { return ""; }
bool is_available() { return true; }
int current_device() { return 0; }
int compute_capability() { return 90; }  // so that either kind of products can be chosen
int multiprocessors() { return 3; }
std::string device_name() { return "emulated by the tests on a CPU"; }
std::string version() { return "emulated"; }
int dlpack_device_type() { return 1; }  // kDLCPU

Stream make_stream() { return nullptr; }
void destroy_stream(Stream) noexcept {}
void synchronize(Stream) {}
bool is_done(Stream) {  // every second question: whoever asks must be able to wait
  static std::atomic<unsigned> questions{0};
  return questions.fetch_add(1) % 2 == 1;
}
void* allocate(int64_t bytes, Stream) {
  if (emulated_capture() != nullptr) throw Unavailable("allocate: while a graph is recorded");
  void* made = poisoned(bytes);
  EmulatedMemory& memory = emulated_memory();
  const std::lock_guard lock(memory.mutex);
  memory.now += memory.sizes[made] = bytes;
  memory.peak = std::max(memory.peak, memory.now);
  return made;
}
void release(void* made, Stream) noexcept {
  EmulatedMemory& memory = emulated_memory();
  const std::lock_guard lock(memory.mutex);
  memory.now -= memory.sizes[made];
  memory.sizes.erase(made);
  std::free(made);
}
void* allocate_pinned(int64_t bytes) { return poisoned(bytes); }
void release_pinned(void* memory) noexcept { std::free(memory); }
int64_t free_memory() { return kFree; }
void copy_to_device(void* to, const void* from, int64_t bytes, Stream) {
  if (emulated_capture() != nullptr) throw Unavailable("copy_to_device: while a graph is recorded");
  std::memcpy(to, from, static_cast<size_t>(bytes));
}
void copy_to_host(void* to, const void* from, int64_t bytes, Stream) {
  std::memcpy(to, from, static_cast<size_t>(bytes));
}
void copy_pieces(void* to, int64_t to_pitch, const void* from, int64_t from_pitch, int64_t bytes,
                 int64_t count, Stream) {
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(static_cast<char*>(to) + i * to_pitch,
                static_cast<const char*>(from) + i * from_pitch, static_cast<size_t>(bytes));
  }
}
void clear(void* memory, int64_t bytes, Stream) {
  std::memset(memory, 0, static_cast<size_t>(bytes));
}
void begin_capture(Stream) { emulated_capture() = std::make_unique<Launches>(); }
Graph end_capture(Stream) { return emulated_capture().release(); }
void abort_capture(Stream) noexcept { emulated_capture().reset(); }
void launch_graph(Graph graph, Stream) {
  ++emulated_graph_launches();
  for (const auto& launch : *static_cast<Launches*>(graph)) launch();
}
void destroy_graph(Graph graph) noexcept { delete static_cast<Launches*>(graph); }

void use_device(int) {}

}  // namespace alignpro::cuda
