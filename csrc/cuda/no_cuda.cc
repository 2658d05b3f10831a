// A build without CUDA: honest about it, and every op raises.

#include "alignpro/core/error.h"
#include "ops.h"
#include "products.h"
#include "runtime.h"

namespace alignpro::cuda {
namespace {

[[noreturn]] void missing(const char* op) {
  throw Unavailable(cat("cuda: ", op, ": ", unavailable_reason()));
}

}  // namespace

bool is_available() { return false; }
std::string unavailable_reason() {
  return "this build has no CUDA; build with -DALIGNPRO_CUDA=ON where nvcc is, or use the CPU "
         "engine";
}
std::string device_name() { missing("device_name"); }
int current_device() { missing("current_device"); }
std::string version() { return "no"; }
int dlpack_device_type() { missing("dlpack_device_type"); }

void embedding(const Matrix&, const int32_t*, const Matrix&, Stream) { missing("embedding"); }
void embedding_backward(const Matrix&, const int32_t*, const int32_t*, const Matrix&, Stream) {
  missing("embedding_backward");
}
void rms_norm(const Matrix&, const void*, float, const Matrix&, Stream) { missing("rms_norm"); }
void swiglu(const Matrix&, const Matrix&, Stream) { missing("swiglu"); }
void rms_norm_backward(const Matrix&, const void*, float, const Matrix&, const Matrix&, Stream) {
  missing("rms_norm_backward");
}
void swiglu_backward(const Matrix&, const Matrix&, const Matrix&, Stream) {
  missing("swiglu_backward");
}
void rope_backward(const AttentionShape&, const Matrix&, int64_t, const float*, const float*,
                   const int32_t*, Stream) {
  missing("rope_backward");
}
void linear(const Matrix&, const Matrix&, const LinearExtras&, const Matrix&, Stream) {
  missing("linear");
}
void qk_norm(const AttentionShape&, const Matrix&, const void*, const void*, float, Stream) {
  missing("qk_norm");
}
void qk_norm_backward(const AttentionShape&, const Matrix&, const void*, const void*, float,
                      const Matrix&, Stream) {
  missing("qk_norm_backward");
}
void linear_backward(const Matrix&, const Matrix&, const LinearBackwardExtras&, const Matrix&,
                     Stream) {
  missing("linear_backward");
}
void lora_backward(const LoraBackwardInput&, const Matrix&, const Matrix&, void*, Stream) {
  missing("lora_backward");
}
int64_t lora_backward_bytes(int64_t, int64_t, int64_t, int64_t) { missing("lora_backward_bytes"); }
void rope_kv_write(const AttentionShape&, const Matrix&, int64_t, const float*, const float*,
                   const int32_t*, const int32_t*, const PagedKv&, Stream) {
  missing("rope_kv_write");
}
void kv_copy(const AttentionShape&, DType, const KvCopy*, int64_t, const PagedKv&, Stream) {
  missing("kv_copy");
}
void attention_decode(const AttentionShape&, const Matrix&, const int32_t*, const int32_t*, int64_t,
                      int64_t, const PagedKv&, void*, const Matrix&, Stream) {
  missing("attention_decode");
}
int64_t attention_decode_bytes(const AttentionShape&, int64_t, int64_t) {
  missing("attention_decode_bytes");
}
void attention_prefill(const AttentionShape&, const Matrix&, const Segment*, int64_t, int64_t,
                       const int32_t*, int64_t, const PagedKv&, const Matrix&, float*, Stream) {
  missing("attention_prefill");
}
void attention_backward(const AttentionShape&, const AttentionBackwardInput&, const Matrix&, void*,
                        Stream) {
  missing("attention_backward");
}
int64_t attention_backward_bytes(const AttentionShape&, int64_t) {
  missing("attention_backward_bytes");
}
void linear_logprob(const LogprobInput&, const LogprobOutput&, void*, Stream) {
  missing("linear_logprob");
}
int64_t linear_logprob_bytes(const LogprobInput&) { missing("linear_logprob_bytes"); }
void total_variation(const LogprobInput&, const LogprobOutput&, float*, float*, void*, Stream) {
  missing("total_variation");
}
int64_t total_variation_bytes(const LogprobInput&) { missing("total_variation_bytes"); }
void linear_logprob_backward(const LogprobInput&, const LogprobOutput&, const LogprobUpstream&,
                             const Matrix&, const Matrix&, void*, Stream) {
  missing("linear_logprob_backward");
}
int64_t linear_logprob_backward_bytes(const LogprobInput&) {
  missing("linear_logprob_backward_bytes");
}
void head_sample(const Matrix&, const Matrix&, const SampleRow*, int32_t*, float*, void*, Stream,
                 const Truncation*) {
  missing("head_sample");
}
int64_t head_sample_bytes(int64_t, int64_t, bool) { missing("head_sample_bytes"); }

Stream make_stream() { missing("make_stream"); }
void destroy_stream(Stream) noexcept {}
void synchronize(Stream) { missing("synchronize"); }
bool is_done(Stream) { missing("is_done"); }
void* allocate(int64_t, Stream) { missing("allocate"); }
void release(void*, Stream) noexcept {}
void* allocate_pinned(int64_t) { missing("allocate_pinned"); }
void release_pinned(void*) noexcept {}
int64_t free_memory() { missing("free_memory"); }
void copy_to_device(void*, const void*, int64_t, Stream) { missing("copy_to_device"); }
void copy_to_host(void*, const void*, int64_t, Stream) { missing("copy_to_host"); }
void copy_pieces(void*, int64_t, const void*, int64_t, int64_t, int64_t, Stream) {
  missing("copy_pieces");
}
void clear(void*, int64_t, Stream) { missing("clear"); }
void begin_capture(Stream) { missing("begin_capture"); }
Graph end_capture(Stream) { missing("end_capture"); }
void abort_capture(Stream) noexcept {}
void launch_graph(Graph, Stream) { missing("launch_graph"); }
void destroy_graph(Graph) noexcept {}
void use_device(int) { missing("use_device"); }
void set_products(Products) { missing("set_products"); }

}  // namespace alignpro::cuda
