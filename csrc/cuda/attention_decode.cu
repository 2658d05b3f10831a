// Two launches: chunks of 512 positions, then their join in ascending order. The grid is fixed by
// max_positions, so that a graph of a decode step may be replayed while sequences grow; blocks of
// chunks that a row does not have yet return at once. Bound by reading K and V, once each a row.

#include "bodies/attention_decode.h"
#include "checks.h"
#include "device_block.h"
#include "launch.h"

namespace alignpro::cuda {
namespace {

constexpr int kJoinThreads = 128;

template <typename T, int kDim>
__global__ void __launch_bounds__(kDecodeThreads) attention_decode_kernel(AttentionDecode<T> args) {
  ALIGNPRO_DYNAMIC_SHARED(shared);
  DeviceBlock block;
  const int head_tiles = args.head_tiles(), y = static_cast<int>(blockIdx.y);
  attention_decode_chunk<kDim>(block, int64_t{blockIdx.x}, y / head_tiles, y % head_tiles,
                               int64_t{blockIdx.z}, args,
                               *reinterpret_cast<DecodeShared<T, kDim>*>(shared));
}

template <typename T>
__global__ void __launch_bounds__(kJoinThreads) attention_join_kernel(AttentionDecode<T> args) {
  DeviceBlock block;
  attention_decode_join(block, int64_t{blockIdx.x}, int64_t{blockIdx.y}, args);
}

int64_t chunks_of(int64_t max_positions) {
  return (max_positions + kAttentionChunk - 1) / kAttentionChunk;
}

}  // namespace

int64_t attention_decode_bytes(const AttentionShape& shape, int64_t rows, int64_t max_positions) {
  return rows * shape.num_heads * chunks_of(max_positions) * (2 + shape.head_dim) * 4;
}

void attention_decode(const AttentionShape& shape, const Matrix& qkv, const int32_t* positions,
                      const int32_t* block_table, int64_t table_ld, int64_t max_positions,
                      const PagedKv& kv, void* workspace, const Matrix& out, Stream stream) {
  constexpr const char* kOp = "attention_decode";
  check_attention(kOp, shape, qkv, kv);
  check_matrix(kOp, "out", out, qkv.rows, shape.num_heads * shape.head_dim, qkv.dtype);
  check_aligned(kOp, "workspace", workspace);
  check_table(kOp, table_ld, max_positions);
  dispatch(kOp, qkv.dtype, [&](auto type) {
    using T = decltype(type);
    const AttentionDecode<T> args{rows_as<const T>(qkv),
                                  kv_blocks<T>(kv, shape),
                                  block_table,
                                  table_ld,
                                  positions,
                                  static_cast<int>(shape.num_heads / shape.num_kv_heads),
                                  static_cast<int>(shape.num_kv_heads),
                                  shape.sliding_window,
                                  shape.scale,
                                  static_cast<float*>(workspace),
                                  chunks_of(max_positions),
                                  rows_as<T>(out)};
    const dim3 rows_heads(count(qkv.rows), count(shape.num_kv_heads));
    dispatch_head_dim(kOp, shape.head_dim, [&](auto dim) {
      constexpr int kDim = decltype(dim)::value;
      launch(kOp, attention_decode_kernel<T, kDim>,
             dim3(rows_heads.x, rows_heads.y * count(args.head_tiles()), count(args.max_chunks)),
             kDecodeThreads, static_cast<int>(sizeof(DecodeShared<T, kDim>)), stream, args);
    });
    launch(kOp, attention_join_kernel<T>, rows_heads, kJoinThreads, 0, stream, args);
  });
}

}  // namespace alignpro::cuda
