// Three numbers a row and tile, as linear_logprob computes them; then a block a row finds the tile
// that its uniform falls into, multiplies that one tile again, and finds the token: no logits are
// stored, and the weight is read once and a little.

#include "bodies/vocabulary.h"
#include "checks.h"
#include "device_block.h"
#include "launch.h"
#include "vocabulary_tiles.h"

namespace alignpro::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    draw_kernel(Vocabulary<T> v, const SampleRow* draws, const ops::TileStats* stats,
                int32_t* tokens, float* logprobs) {
  ALIGNPRO_DYNAMIC_SHARED(shared);
  __shared__ RowShared row_shared;
  DeviceBlock block;
  draw_row(block, int64_t{blockIdx.x}, v, draws[blockIdx.x],
           stats + blockIdx.x * vocabulary_tiles(v.weight.rows), tokens, logprobs,
           reinterpret_cast<double*>(shared + kProductBytes<T>), row_shared, shared);
}

}  // namespace

int64_t head_sample_bytes(int64_t rows, int64_t vocab) {
  Workspace workspace(nullptr);
  workspace.take<ops::TileStats>(rows * vocabulary_tiles(vocab));
  return workspace.bytes;
}

void head_sample(const Matrix& hidden, const Matrix& head, const SampleRow* rows, int32_t* tokens,
                 float* logprobs, void* workspace, Stream stream) {
  constexpr const char* kOp = "head_sample";
  LogprobInput in;
  in.hidden = hidden;
  in.weight = head;
  check_logprob(kOp, in);
  // 32 KB of masses beside the tile at most: what every GPU since sm_80 has.
  require(head.rows <= kMaxVocabulary, kOp, ": expected at most ", kMaxVocabulary, " tokens, got ",
          head.rows);
  if (hidden.rows == 0) return;
  check_aligned(kOp, "workspace", workspace);
  auto* stats = static_cast<ops::TileStats*>(workspace);
  dispatch(kOp, hidden.dtype, [&](auto type) {
    using T = decltype(type);
    const auto v = vocabulary<T>(in);
    measure_tiles<T>(kOp, v, false, rows, 0, hidden.rows, stats, nullptr, nullptr, stream);
    const auto masses = static_cast<int>(vocabulary_tiles(head.rows) * 8);
    launch(kOp, draw_kernel<T>, count(hidden.rows), kTileThreads, kProductBytes<T> + masses, stream,
           v, rows, stats, tokens, logprobs);
  });
}

}  // namespace alignpro::cuda
