// A block a position, 16 bytes a thread. Bound by memory.

#include "bodies/rows.h"
#include "checks.h"
#include "device_block.h"
#include "launch.h"

namespace alignpro::cuda {
namespace {

constexpr int kThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    kv_copy_kernel(const KvCopy* copies, int64_t num_kv_heads, KvBlocks<T> kv) {
  DeviceBlock block;
  kv_copy_position(block, copies[blockIdx.x], num_kv_heads, kv);
}

}  // namespace

void kv_copy(const AttentionShape& shape, DType dtype, const KvCopy* copies, int64_t copy_count,
             const PagedKv& kv, Stream stream) {
  constexpr const char* kOp = "kv_copy";
  check_kv(kOp, shape, dtype, kv);
  dispatch(kOp, dtype, [&](auto type) {
    using T = decltype(type);
    launch(kOp, kv_copy_kernel<T>, count(copy_count), kThreads, 0, stream, copies,
           shape.num_kv_heads, kv_blocks<T>(kv, shape));
  });
}

}  // namespace alignpro::cuda
