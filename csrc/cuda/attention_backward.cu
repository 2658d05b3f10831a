// Three launches: out . dout of each row and head, then dq by tiles of query rows, then dk and dv
// by tiles of keys. Probabilities are computed twice, so that nothing is added across blocks. Bound
// by the matrix units.

#include "bodies/attention_backward.h"

#include "checks.h"
#include "device_block.h"
#include "launch.h"

namespace alignpro::cuda {
namespace {

constexpr int kDeltaThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kDeltaThreads) attention_delta_kernel(AttentionBackward<T> args) {
  DeviceBlock block;
  attention_delta_row(block, int64_t{blockIdx.x}, args);
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kBackwardThreads<T>, 1)
    attention_backward_queries_kernel(AttentionBackward<T> args) {
  ALIGNPRO_DYNAMIC_SHARED(shared);
  DeviceBlock block;
  attention_backward_queries<kDim>(block, int64_t{blockIdx.z}, int64_t{blockIdx.y},
                                   int64_t{blockIdx.x}, args,
                                   *reinterpret_cast<BackwardShared<T, kDim>*>(shared));
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kBackwardThreads<T>, 1)
    attention_backward_keys_kernel(AttentionBackward<T> args) {
  ALIGNPRO_DYNAMIC_SHARED(shared);
  DeviceBlock block;
  attention_backward_keys<kDim>(block, int64_t{blockIdx.z}, int64_t{blockIdx.y},
                                int64_t{blockIdx.x}, args,
                                *reinterpret_cast<BackwardShared<T, kDim>*>(shared));
}

}  // namespace

int64_t attention_backward_bytes(const AttentionShape& shape, int64_t rows) {
  return rows * shape.num_heads * 4;
}

void attention_backward(const AttentionShape& shape, const AttentionBackwardInput& in,
                        const Matrix& d_qkv, void* workspace, Stream stream) {
  constexpr const char* kOp = "attention_backward";
  const Matrix& qkv = in.qkv;
  const int64_t rows = qkv.rows, q_size = shape.num_heads * shape.head_dim;
  check_attention(kOp, shape, qkv, in.kv);
  check_matrix(kOp, "out", in.out, rows, q_size, qkv.dtype);
  check_matrix(kOp, "dout", in.dout, rows, q_size, qkv.dtype);
  check_matrix(kOp, "d_qkv", d_qkv, rows, qkv.cols, qkv.dtype);
  check_aligned(kOp, "workspace", workspace);
  check_segments(kOp, in.segment_count, in.max_rows, in.table_ld);
  require((in.children == nullptr) == (in.child_begin == nullptr), kOp,
          ": expected both or neither of child_begin and children");
  dispatch(kOp, qkv.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t group = shape.num_heads / shape.num_kv_heads;
    const AttentionBackward<T> args{rows_as<const T>(qkv),
                                    rows_as<const T>(in.out),
                                    rows_as<const T>(in.dout),
                                    in.lse,
                                    static_cast<float*>(workspace),
                                    kv_blocks<T>(in.kv, shape),
                                    in.segments,
                                    in.child_begin,
                                    in.children,
                                    in.block_table,
                                    in.table_ld,
                                    static_cast<int>(group),
                                    static_cast<int>(shape.num_kv_heads),
                                    shape.sliding_window,
                                    shape.scale,
                                    rows_as<T>(d_qkv)};
    launch(kOp, attention_delta_kernel<T>, count(rows), kDeltaThreads, 0, stream, args);
    const auto grid = [&](int64_t most) {
      return dim3(count((most + kBackwardRows<T> - 1) / kBackwardRows<T>),
                  count(shape.num_kv_heads), count(in.segment_count));
    };
    dispatch_head_dim(kOp, shape.head_dim, [&](auto dim) {
      constexpr int kDim = decltype(dim)::value;
      constexpr auto kBytes = static_cast<int>(sizeof(BackwardShared<T, kDim>));
      launch(kOp, attention_backward_queries_kernel<T, kDim>, grid(in.max_rows * group),
             kBackwardThreads<T>, kBytes, stream, args);
      launch(kOp, attention_backward_keys_kernel<T, kDim>, grid(in.max_rows), kBackwardThreads<T>,
             kBytes, stream, args);
    });
  });
}

}  // namespace alignpro::cuda
