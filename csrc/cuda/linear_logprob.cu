// Forward: tiles of 128 rows x 128 tokens are multiplied and reduced to seven numbers a row where
// they stand, then a block a row merges its tiles in double. Rows go by chunks of 2048: their
// hidden states stay in L2 while the weight streams by once a chunk, and the tiles' statistics stay
// small.

#include "bodies/vocabulary.h"
#include "checks.h"
#include "device_block.h"
#include "launch.h"
#include "vocabulary_tiles.h"
#include "wgmma.h"

namespace alignpro::cuda {
namespace {

constexpr int64_t kRowChunk = 2048;

template <typename T, bool kRef>
__global__ void __launch_bounds__(kTileThreads)
    tile_stats_kernel(Vocabulary<T> v, const SampleRow* draws, int64_t first, ops::TileStats* stats,
                      float* logit, float* ref_logit, float* logits) {
  ALIGNPRO_DYNAMIC_SHARED(shared);
  DeviceBlock block;
  tile_stats<kRef>(block, v, draws, first + int64_t{blockIdx.x} * kTile, int64_t{blockIdx.y}, first,
                   stats, logit, ref_logit, logits, shared);
}

__global__ void __launch_bounds__(kRowThreads)
    finish_kernel(int64_t first, const ops::TileStats* stats, int64_t vocab, const int32_t* tokens,
                  const float* logit, const float* ref_logit, bool with_ref, LogprobOutput out) {
  __shared__ RowShared shared;
  DeviceBlock block;
  finish_logprob_row(block, first + blockIdx.x, stats + blockIdx.x * vocabulary_tiles(vocab), vocab,
                     tokens, logit, ref_logit, with_ref, out, shared);
}

struct Pieces {
  float *logit, *ref_logit;
  ops::TileStats* stats;
  int64_t bytes;

  Pieces(const LogprobInput& in, void* memory) {
    Workspace workspace(memory);
    const int64_t rows = in.hidden.rows;
    logit = workspace.take<float>(rows);
    ref_logit = workspace.take<float>(rows);
    stats = workspace.take<ops::TileStats>((rows < kRowChunk ? rows : kRowChunk) *
                                           vocabulary_tiles(in.weight.rows));
    bytes = workspace.bytes();
  }
};

}  // namespace

template <typename T>
void measure_tiles(const char* op, const Vocabulary<T>& v, bool with_ref, const SampleRow* draws,
                   int64_t first, int64_t live, ops::TileStats* stats, float* logit,
                   float* ref_logit, float* logits, Stream stream) {
  Vocabulary<T> chunk = v;
  chunk.hidden.rows = first + live;
  if constexpr (std::is_same_v<T, Bfloat16>) {
    if (products() == Products::kWgmma) {
      return measure_tiles_wgmma(op, chunk, with_ref, draws, first, stats, logit, ref_logit, logits,
                                 stream);
    }
  }
  const dim3 grid(count((live + kTile - 1) / kTile), count(vocabulary_tiles(v.weight.rows)));
  launch(op, with_ref ? tile_stats_kernel<T, true> : tile_stats_kernel<T, false>, grid,
         kTileThreads, kProductBytes<T>, stream, chunk, draws, first, stats, logit, ref_logit,
         logits);
}
template void measure_tiles<float>(const char*, const Vocabulary<float>&, bool, const SampleRow*,
                                   int64_t, int64_t, ops::TileStats*, float*, float*, float*,
                                   Stream);
template void measure_tiles<Bfloat16>(const char*, const Vocabulary<Bfloat16>&, bool,
                                      const SampleRow*, int64_t, int64_t, ops::TileStats*, float*,
                                      float*, float*, Stream);

int64_t linear_logprob_bytes(const LogprobInput& in) { return Pieces(in, nullptr).bytes; }

void linear_logprob(const LogprobInput& in, const LogprobOutput& out, void* workspace,
                    Stream stream) {
  constexpr const char* kOp = "linear_logprob";
  check_logprob(kOp, in);
  if (in.hidden.rows == 0) return;
  check_aligned(kOp, "workspace", workspace);
  const Pieces pieces(in, workspace);
  const int64_t rows = in.hidden.rows;
  const bool with_ref = has_reference(in);
  dispatch(kOp, in.hidden.dtype, [&](auto type) {
    const auto v = vocabulary<decltype(type)>(in);
    for (int64_t first = 0; first < rows; first += kRowChunk) {
      const int64_t live = rows - first < kRowChunk ? rows - first : kRowChunk;
      measure_tiles(kOp, v, with_ref, nullptr, first, live, pieces.stats, pieces.logit,
                    pieces.ref_logit, nullptr, stream);
      launch(kOp, finish_kernel, count(live), kRowThreads, 0, stream, first, pieces.stats,
             in.weight.rows, in.tokens, pieces.logit, pieces.ref_logit, with_ref, out);
    }
  });
}

}  // namespace alignpro::cuda
