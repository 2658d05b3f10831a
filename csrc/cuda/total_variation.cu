// A second pass over the vocabulary, which can start only when both normalisers are known: tiles
// are multiplied again and reduced to two numbers a row. Rows go by chunks of 2048, as
// linear_logprob's.

#include "bodies/vocabulary.h"
#include "checks.h"
#include "device_block.h"
#include "launch.h"
#include "vocabulary_tiles.h"

namespace alignpro::cuda {
namespace {

constexpr int64_t kRowChunk = 2048;
constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    row_gradients_kernel(int64_t rows, bool with_ref, const int32_t* tokens, LogprobOutput forward,
                         LogprobUpstream upstream, ops::RowGradient* gradients) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + DeviceBlock().thread();
  if (row < rows) gradients[row] = ops::row_gradient(row, with_ref, tokens, forward, upstream);
}

template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    tile_variation_kernel(Vocabulary<T> v, const ops::RowGradient* gradients, int64_t first,
                          VariationPart* parts) {
  ALIGNPRO_DYNAMIC_SHARED(shared);
  DeviceBlock block;
  tile_variation(block, v, gradients, first + int64_t{blockIdx.x} * kTile, int64_t{blockIdx.y},
                 first, parts, shared);
}

__global__ void __launch_bounds__(kRowThreads)
    finish_variation_kernel(int64_t first, const VariationPart* parts, int64_t tiles,
                            LogprobOutput forward, float* tv, float* mass_above) {
  __shared__ RowShared shared;
  DeviceBlock block;
  finish_variation_row(block, first + blockIdx.x, parts + blockIdx.x * tiles, tiles, forward, tv,
                       mass_above, shared);
}

struct Pieces {
  ops::RowGradient* gradients;
  VariationPart* parts;
  int64_t bytes;

  Pieces(const LogprobInput& in, void* memory) {
    Workspace workspace(memory);
    const int64_t rows = in.hidden.rows;
    gradients = workspace.take<ops::RowGradient>(rows);
    parts = workspace.take<VariationPart>((rows < kRowChunk ? rows : kRowChunk) *
                                          vocabulary_tiles(in.weight.rows));
    bytes = workspace.bytes();
  }
};

}  // namespace

void fill_gradients(const char* op, const LogprobInput& in, const LogprobOutput& forward,
                    const LogprobUpstream& upstream, ops::RowGradient* gradients, Stream stream) {
  const int64_t rows = in.hidden.rows;
  launch(op, row_gradients_kernel, count((rows + kThreads - 1) / kThreads), kThreads, 0, stream,
         rows, has_reference(in), in.tokens, forward, upstream, gradients);
}

int64_t total_variation_bytes(const LogprobInput& in) { return Pieces(in, nullptr).bytes; }

void total_variation(const LogprobInput& in, const LogprobOutput& forward, float* tv,
                     float* mass_above, void* workspace, Stream stream) {
  constexpr const char* kOp = "total_variation";
  check_logprob(kOp, in);
  require(has_reference(in), kOp, ": expected reference hidden states, got none");
  if (in.hidden.rows == 0) return;
  check_aligned(kOp, "workspace", workspace);
  const Pieces pieces(in, workspace);
  const int64_t rows = in.hidden.rows, tiles = vocabulary_tiles(in.weight.rows);
  fill_gradients(kOp, in, forward, {}, pieces.gradients, stream);
  dispatch(kOp, in.hidden.dtype, [&](auto type) {
    using T = decltype(type);
    const auto v = vocabulary<T>(in);
    for (int64_t first = 0; first < rows; first += kRowChunk) {
      const int64_t live = rows - first < kRowChunk ? rows - first : kRowChunk;
      Vocabulary<T> chunk = v;
      chunk.hidden.rows = first + live;
      launch(kOp, tile_variation_kernel<T>, dim3(count((live + kTile - 1) / kTile), count(tiles)),
             kTileThreads, kProductBytes<T>, stream, chunk, pieces.gradients, first, pieces.parts);
      launch(kOp, finish_variation_kernel, count(live), kRowThreads, 0, stream, first, pieces.parts,
             tiles, forward, tv, mass_above);
    }
  });
}

}  // namespace alignpro::cuda
