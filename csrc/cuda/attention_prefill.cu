// Causal attention of packed segments over their paged keys, with an online softmax. The grid is
// fixed by the longest segment; blocks of tiles that a segment does not have return at once. Bound
// by the matrix units: keys are read once for 128 query rows.

#include "bodies/attention_prefill.h"

#include "checks.h"
#include "device_block.h"
#include "launch.h"

namespace alignpro::cuda {
namespace {

template <typename T, int kDim>
__global__ void __launch_bounds__(kPrefillThreads<T>, 1)
    attention_prefill_kernel(AttentionPrefill<T> args) {
  ALIGNPRO_DYNAMIC_SHARED(shared);
  DeviceBlock block;
  attention_prefill_tile<kDim>(block, int64_t{blockIdx.z}, int64_t{blockIdx.y}, int64_t{blockIdx.x},
                               args, *reinterpret_cast<PrefillShared<T, kDim>*>(shared));
}

}  // namespace

void attention_prefill(const AttentionShape& shape, const Matrix& qkv, const Segment* segments,
                       int64_t segment_count, int64_t max_rows, const int32_t* block_table,
                       int64_t table_ld, const PagedKv& kv, const Matrix& out, float* lse,
                       Stream stream) {
  constexpr const char* kOp = "attention_prefill";
  check_attention(kOp, shape, qkv, kv);
  check_matrix(kOp, "out", out, qkv.rows, shape.num_heads * shape.head_dim, qkv.dtype);
  check_segments(kOp, segment_count, max_rows, table_ld);
  dispatch(kOp, qkv.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t group = shape.num_heads / shape.num_kv_heads;
    const AttentionPrefill<T> args{rows_as<const T>(qkv),
                                   kv_blocks<T>(kv, shape),
                                   segments,
                                   block_table,
                                   table_ld,
                                   static_cast<int>(group),
                                   static_cast<int>(shape.num_kv_heads),
                                   shape.sliding_window,
                                   shape.scale,
                                   rows_as<T>(out),
                                   lse};
    const dim3 grid(count((max_rows * group + kPrefillRows<T> - 1) / kPrefillRows<T>),
                    count(shape.num_kv_heads), count(segment_count));
    dispatch_head_dim(kOp, shape.head_dim, [&](auto dim) {
      constexpr int kDim = decltype(dim)::value;
      launch(kOp, attention_prefill_kernel<T, kDim>, grid, kPrefillThreads<T>,
             static_cast<int>(sizeof(PrefillShared<T, kDim>)), stream, args);
    });
  });
}

}  // namespace alignpro::cuda
