// Three numbers a row and tile, as linear_logprob computes them; then a block a row finds the tile
// that its uniform falls into, multiplies that one tile again, and finds the token: no logits are
// stored, and the weight is read once and a little. Truncated rows need all of their logits: rows
// then go by 128, whose logits are kept as they are measured.

#include "bodies/truncated_draw.h"

#include "bodies/vocabulary.h"
#include "checks.h"
#include "device_block.h"
#include "launch.h"
#include "vocabulary_tiles.h"
#include "wgmma.h"

namespace alignpro::cuda {
namespace {

constexpr int64_t kStoredRows = 128;

template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    draw_kernel(Vocabulary<T> v, const SampleRow* draws, const ops::TileStats* stats,
                bool with_truncation, int32_t* tokens, float* logprobs, float* kept_mass) {
  ALIGNPRO_DYNAMIC_SHARED(shared);
  __shared__ RowShared row_shared;
  DeviceBlock block;
  const int64_t row = blockIdx.x;
  if (!is_plain(block, row, draws[row], with_truncation, tokens, logprobs, kept_mass)) return;
  draw_row(block, row, v, draws[row], stats + row * vocabulary_tiles(v.weight.rows), tokens,
           logprobs, reinterpret_cast<double*>(shared + kProductBytes<T>), row_shared, shared);
}

__global__ void __launch_bounds__(kDrawThreads)
    draw_truncated_kernel(int64_t first, int64_t vocab, const SampleRow* draws,
                          const ops::TileStats* stats, float* logits, const int32_t* banned,
                          int32_t* tokens, float* logprobs, float* kept_mass) {
  ALIGNPRO_DYNAMIC_SHARED(shared);
  __shared__ TruncatedShared own;
  DeviceBlock block;
  const int64_t row = first + blockIdx.x, tiles = vocabulary_tiles(vocab);
  if (!is_truncated(draws[row])) return;
  draw_truncated_row(block, row, draws[row], stats + row * tiles, vocab,
                     logits + blockIdx.x * tiles * kTile, banned, tokens, logprobs, kept_mass,
                     reinterpret_cast<double*>(shared), own);
}

struct Pieces {
  ops::TileStats* stats;
  float* logits;  // [kStoredRows][tiles][kTile]
  int64_t bytes;

  Pieces(int64_t rows, int64_t vocab, bool with_truncation, void* memory) {
    Workspace workspace(memory);
    const int64_t tiles = vocabulary_tiles(vocab);
    stats = workspace.take<ops::TileStats>(rows * tiles);
    const int64_t stored = rows < kStoredRows ? rows : kStoredRows;
    logits = workspace.take<float>(with_truncation ? stored * tiles * kTile : 0);
    bytes = workspace.bytes();
  }
};

}  // namespace

int64_t head_sample_bytes(int64_t rows, int64_t vocab, bool with_truncation) {
  return Pieces(rows, vocab, with_truncation, nullptr).bytes;
}

void head_sample(const Matrix& hidden, const Matrix& head, const SampleRow* rows, int32_t* tokens,
                 float* logprobs, void* workspace, Stream stream, const Truncation* truncation) {
  constexpr const char* kOp = "head_sample";
  LogprobInput in;
  in.hidden = hidden;
  in.weight = head;
  check_logprob(kOp, in);
  // 32 KB of masses beside the tile at most: what every GPU since sm_80 has. And keys of 20 bits.
  require(head.rows <= kMaxVocabulary, kOp, ": expected at most ", kMaxVocabulary, " tokens, got ",
          head.rows);
  const int64_t count_rows = hidden.rows, vocab = head.rows, tiles = vocabulary_tiles(vocab);
  if (count_rows == 0) return;
  check_aligned(kOp, "workspace", workspace);
  const bool kept = truncation != nullptr;
  require(!kept || truncation->kept_mass != nullptr, kOp, ": expected kept_mass with a truncation");
  const Pieces pieces(count_rows, vocab, kept, workspace);
  const auto masses = static_cast<int>(tiles * 8);
  dispatch(kOp, hidden.dtype, [&](auto type) {
    using T = decltype(type);
    const auto v = vocabulary<T>(in);
    const int64_t step = kept ? kStoredRows : count_rows;
    for (int64_t first = 0; first < count_rows; first += step) {
      const int64_t live = count_rows - first < step ? count_rows - first : step;
      measure_tiles<T>(kOp, v, false, rows, first, live, pieces.stats + first * tiles, nullptr,
                       nullptr, kept ? pieces.logits : nullptr, stream);
      if (!kept) continue;
      launch(kOp, draw_truncated_kernel, count(live), kDrawThreads, masses, stream, first, vocab,
             rows, pieces.stats, pieces.logits, truncation->banned, tokens, logprobs,
             truncation->kept_mass);
    }
    if constexpr (std::is_same_v<T, Bfloat16>) {
      if (products() == Products::kWgmma) {
        return draw_rows_wgmma(kOp, v, rows, pieces.stats, kept, tokens, logprobs,
                               kept ? truncation->kept_mass : nullptr, stream);
      }
    }
    launch(kOp, draw_kernel<T>, count(count_rows), kTileThreads, kProductBytes<T> + masses, stream,
           v, rows, pieces.stats, kept, tokens, logprobs, kept ? truncation->kept_mass : nullptr);
  });
}

}  // namespace alignpro::cuda
