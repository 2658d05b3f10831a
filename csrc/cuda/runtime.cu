// The CUDA runtime behind runtime.h: memory from the stream-ordered allocator, every call checked.

#include "runtime.h"

#include <cuda_runtime.h>

#include "launch.h"

namespace alignpro::cuda {
namespace {

cudaStream_t native(Stream stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace

// Not ordered with the default stream: what others put there does not hold a model up.
Stream make_stream() {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "make_stream");
  return stream;
}
void destroy_stream(Stream stream) noexcept { (void)cudaStreamDestroy(native(stream)); }
void synchronize(Stream stream) { check(cudaStreamSynchronize(native(stream)), "synchronize"); }
bool is_done(Stream stream) {
  const cudaError_t status = cudaStreamQuery(native(stream));
  if (status == cudaErrorNotReady) return false;
  check(status, "is_done");
  return true;
}

void* allocate(int64_t bytes, Stream stream) {
  void* memory = nullptr;
  check(cudaMallocAsync(&memory, static_cast<size_t>(bytes), native(stream)), "allocate");
  return memory;
}
void release(void* memory, Stream stream) noexcept { (void)cudaFreeAsync(memory, native(stream)); }
void* allocate_pinned(int64_t bytes) {
  void* memory = nullptr;
  check(cudaMallocHost(&memory, static_cast<size_t>(bytes)), "allocate_pinned");
  return memory;
}
void release_pinned(void* memory) noexcept { (void)cudaFreeHost(memory); }

int64_t free_memory() {
  size_t free = 0, all = 0;
  check(cudaMemGetInfo(&free, &all), "free_memory");
  return static_cast<int64_t>(free);
}

void copy_to_device(void* to, const void* from, int64_t bytes, Stream stream) {
  check(
      cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, native(stream)),
      "copy_to_device");
}
void copy_to_host(void* to, const void* from, int64_t bytes, Stream stream) {
  check(
      cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, native(stream)),
      "copy_to_host");
}
void copy_pieces(void* to, int64_t to_pitch, const void* from, int64_t from_pitch, int64_t bytes,
                 int64_t count, Stream stream) {
  check(cudaMemcpy2DAsync(to, static_cast<size_t>(to_pitch), from, static_cast<size_t>(from_pitch),
                          static_cast<size_t>(bytes), static_cast<size_t>(count),
                          cudaMemcpyDeviceToDevice, native(stream)),
        "copy_pieces");
}

void clear(void* memory, int64_t bytes, Stream stream) {
  check(cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), native(stream)), "clear");
}

void begin_capture(Stream stream) {
  check(cudaStreamBeginCapture(native(stream), cudaStreamCaptureModeThreadLocal), "begin_capture");
}
Graph end_capture(Stream stream) {
  cudaGraph_t graph = nullptr;
  check(cudaStreamEndCapture(native(stream), &graph), "end_capture");
  cudaGraphExec_t made = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&made, graph, 0);
  (void)cudaGraphDestroy(graph);
  check(status, "end_capture");
  return made;
}
void abort_capture(Stream stream) noexcept {
  cudaGraph_t graph = nullptr;
  (void)cudaStreamEndCapture(native(stream), &graph);
  if (graph != nullptr) (void)cudaGraphDestroy(graph);
  (void)cudaGetLastError();
}
void launch_graph(Graph graph, Stream stream) {
  check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), native(stream)), "launch_graph");
}
void destroy_graph(Graph graph) noexcept {
  (void)cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph));
}

void use_device(int device) { check(cudaSetDevice(device), "use_device"); }

}  // namespace alignpro::cuda
