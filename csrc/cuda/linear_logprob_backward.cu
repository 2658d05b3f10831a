// Backward: 4096 tokens at a time, logits are computed again, their gradient is stored in the
// input's dtype ([rows, 4096]), and two products take it on: d_hidden += dz W, d_weight = dz^T h.
// The width is fixed, so d_hidden adds the same pieces in the same order for any number of rows.

#include "bodies/vocabulary.h"
#include "checks.h"
#include "device_block.h"
#include "launch.h"
#include "vocabulary_tiles.h"

namespace alignpro::cuda {
namespace {

constexpr int64_t kChunk = 4096;  // tokens

template <typename T, bool kRef>
__global__ void __launch_bounds__(kTileThreads)
    tile_gradient_kernel(Vocabulary<T> v, const ops::RowGradient* gradients, int64_t first_tile,
                         T* dz) {
  ALIGNPRO_DYNAMIC_SHARED(shared);
  DeviceBlock block;
  tile_gradient<kRef>(block, v, gradients, int64_t{blockIdx.x} * kTile, first_tile + blockIdx.y,
                      first_tile * kTile, dz, kChunk, shared);
}

template <typename A, typename B>
__global__ void __launch_bounds__(kTileThreads)
    product_kernel(A a, B b, int64_t rows, int64_t cols, float* out, int64_t ld, bool accumulate) {
  ALIGNPRO_DYNAMIC_SHARED(shared);
  DeviceBlock block;
  store_product_tile(block, a, int64_t{blockIdx.x} * kTile, b, int64_t{blockIdx.y} * kTile, rows,
                     cols, out, ld, accumulate, shared);
}

struct Pieces {
  ops::RowGradient* gradients;
  void* dz;
  int64_t bytes;

  Pieces(const LogprobInput& in, void* memory) {
    Workspace workspace(memory);
    gradients = workspace.take<ops::RowGradient>(in.hidden.rows);
    dz = workspace.take<char>(in.hidden.rows * kChunk * block_bytes(in.hidden.dtype));
    bytes = workspace.bytes();
  }
};

template <typename A, typename B>
void product(const char* op, const A& a, const B& b, int64_t rows, int64_t cols, float* out,
             int64_t ld, bool accumulate, Stream stream) {
  const dim3 grid(count((rows + kTile - 1) / kTile), count((cols + kTile - 1) / kTile));
  launch(op, product_kernel<A, B>, grid, kTileThreads, kProductBytes<typename A::Type>, stream, a,
         b, rows, cols, out, ld, accumulate);
}

}  // namespace

int64_t linear_logprob_backward_bytes(const LogprobInput& in) { return Pieces(in, nullptr).bytes; }

void linear_logprob_backward(const LogprobInput& in, const LogprobOutput& forward,
                             const LogprobUpstream& upstream, const Matrix& d_hidden,
                             const Matrix& d_weight, void* workspace, Stream stream) {
  constexpr const char* kOp = "linear_logprob_backward";
  check_logprob(kOp, in);
  const int64_t rows = in.hidden.rows, cols = in.hidden.cols, vocab = in.weight.rows;
  if (d_hidden.data != nullptr) check_matrix(kOp, "d_hidden", d_hidden, rows, cols, DType::kF32);
  if (d_weight.data != nullptr) check_matrix(kOp, "d_weight", d_weight, vocab, cols, DType::kF32);
  require(rows > 0 || d_weight.data == nullptr, kOp, ": expected rows for d_weight, got none");
  if (rows == 0) return;
  check_aligned(kOp, "workspace", workspace);
  const Pieces pieces(in, workspace);
  const bool with_ref = has_reference(in);
  require((upstream.total_variation == nullptr) == (upstream.mass_above == nullptr), kOp,
          ": expected both or neither of total_variation and mass_above");
  fill_gradients(kOp, in, forward, upstream, pieces.gradients, stream);
  dispatch(kOp, in.hidden.dtype, [&](auto type) {
    using T = decltype(type);
    const auto v = vocabulary<T>(in);
    T* dz = static_cast<T*>(pieces.dz);
    const Operand<T, true> hidden_columns{v.hidden.data, v.hidden.ld, cols, rows};
    for (int64_t token = 0; token < vocab; token += kChunk) {
      const int64_t live = vocab - token < kChunk ? vocab - token : kChunk;
      const int64_t tiles = vocabulary_tiles(live);
      launch(kOp, with_ref ? tile_gradient_kernel<T, true> : tile_gradient_kernel<T, false>,
             dim3(count((rows + kTile - 1) / kTile), count(tiles)), kTileThreads, kProductBytes<T>,
             stream, v, pieces.gradients, token / kTile, dz);
      if (d_hidden.data != nullptr) {
        product(kOp, Operand<T>{dz, kChunk, rows, tiles * kTile},
                Operand<T, true>{v.weight.data + token * v.weight.ld, v.weight.ld, cols, live},
                rows, cols, static_cast<float*>(d_hidden.data), d_hidden.ld, token > 0, stream);
      }
      if (d_weight.data != nullptr) {
        product(kOp, Operand<T, true>{dz, kChunk, tiles * kTile, rows}, hidden_columns, live, cols,
                static_cast<float*>(d_weight.data) + token * d_weight.ld, d_weight.ld, false,
                stream);
      }
    }
  });
}

}  // namespace alignpro::cuda
