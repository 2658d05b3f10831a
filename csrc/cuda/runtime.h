#pragma once

// What a model on a GPU asks of the CUDA runtime beside its ops: memory, copies, streams, graphs.
// No header of CUDA is named here. Functions throw Unavailable, naming themselves, where the device
// refuses or there is none.

#include <cstdint>

#include "ops.h"

namespace alignpro::cuda {

Stream make_stream();
void destroy_stream(Stream stream) noexcept;
void synchronize(Stream stream);
bool is_done(Stream stream);  // synchronize() would not wait

// Device memory of at least one byte at a multiple of 256, on the stream: it may be used by what is
// put there after, and again by what is put there after its release. Pinned memory is the host's.
void* allocate(int64_t bytes, Stream stream);
void release(void* memory, Stream stream) noexcept;
void* allocate_pinned(int64_t bytes);
void release_pinned(void* memory) noexcept;
int64_t free_memory();  // bytes of the current device that nobody holds

// Between device memory and pinned memory, on the stream.
void copy_to_device(void* to, const void* from, int64_t bytes, Stream stream);
void copy_to_host(void* to, const void* from, int64_t bytes, Stream stream);
// Within device memory: `count` pieces of `bytes`, so many bytes apart there and here.
void copy_pieces(void* to, int64_t to_pitch, const void* from, int64_t from_pitch, int64_t bytes,
                 int64_t count, Stream stream);
void clear(void* memory, int64_t bytes, Stream stream);  // zeros, on the device

using Graph = void*;  // cudaGraphExec_t
// Kernels that this thread puts on the stream between the two are recorded with their arguments and
// not run; launch_graph puts them all there at once. Nothing else may be put there in between.
void begin_capture(Stream stream);
Graph end_capture(Stream stream);
void abort_capture(Stream stream) noexcept;
void launch_graph(Graph graph, Stream stream);
void destroy_graph(Graph graph) noexcept;

// Which device the calling thread's work goes to; ops.h's current_device() tells.
void use_device(int device);

class OwnedStream {
 public:
  OwnedStream() : stream_(make_stream()) {}
  ~OwnedStream() { destroy_stream(stream_); }
  OwnedStream(const OwnedStream&) = delete;
  OwnedStream& operator=(const OwnedStream&) = delete;

  Stream get() const { return stream_; }

 private:
  Stream stream_;
};

class OwnedGraph {
 public:
  // Records what run() puts on the stream.
  template <typename Run>
  OwnedGraph(Stream stream, const Run& run) {
    begin_capture(stream);
    try {
      run();
    } catch (...) {
      abort_capture(stream);
      throw;
    }
    graph_ = end_capture(stream);
  }
  ~OwnedGraph() { destroy_graph(graph_); }
  OwnedGraph(const OwnedGraph&) = delete;
  OwnedGraph& operator=(const OwnedGraph&) = delete;

  void launch(Stream stream) const { launch_graph(graph_, stream); }

 private:
  Graph graph_ = nullptr;
};

}  // namespace alignpro::cuda
