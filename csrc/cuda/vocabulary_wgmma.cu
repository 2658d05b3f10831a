// The vocabulary's tiles on sm_90: 128 x 256, or 128 x 128 with a reference, whose sums stand
// beside the row's own and, where both have one weight, come from the same slices of it; 64 rows
// high for up to 64 rows. A block's producer fills stages of the next tile while the last one is
// measured.

#include "bodies/vocabulary_wgmma.h"

#include "bodies/truncated_draw.h"
#include "hopper.h"
#include "wgmma.h"

namespace alignpro::cuda {
namespace {

// Of many rows and of few, by what there is of a reference.
template <int kGroups, Reference kReference>
struct Measure;
template <>
struct Measure<2, Reference::kNone> : WgmmaTile<2, 2 * kTile, 4> {};
template <>
struct Measure<2, Reference::kApart> : WgmmaTile<2, kTile, 6> {};
template <>
struct Measure<2, Reference::kShared> : WgmmaTile<2, kTile, 4, 2> {};
template <>
struct Measure<1, Reference::kNone> : WgmmaTile<1, kTile, 8> {};
template <>
struct Measure<1, Reference::kApart> : WgmmaTile<1, kTile, 8> {};
template <>
struct Measure<1, Reference::kShared> : WgmmaTile<1, kTile, 6, 2> {};

using OneRow = WgmmaTile<1, kTile, 6>;  // beside a draw's masses

template <typename Tile, Reference kReference>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    measure_wgmma_kernel(const __grid_constant__ VocabularyWgmma<TensorMap> args,
                         MeasuredTiles to) {
#if defined(ALIGNPRO_ON_SM90A)
  ALIGNPRO_DYNAMIC_SHARED(shared);
  HopperBlock block;
  measure_wgmma_tiles<Tile, kReference>(block, args, to, blockIdx.x, gridDim.x, shared);
#endif
}

__global__ void __launch_bounds__(OneRow::kThreads, 1)
    draw_wgmma_kernel(const __grid_constant__ VocabularyWgmma<TensorMap> args,
                      const SampleRow* draws, const ops::TileStats* stats, bool with_truncation,
                      int32_t* tokens, float* logprobs, float* kept_mass) {
#if defined(ALIGNPRO_ON_SM90A)
  ALIGNPRO_DYNAMIC_SHARED(shared);
  __shared__ RowShared row_shared;
  __shared__ float logits[kTile];
  HopperBlock block;
  const int64_t row = blockIdx.x;
  if (!is_plain(block, row, draws[row], with_truncation, tokens, logprobs, kept_mass)) return;
  draw_wgmma_row<OneRow>(block, row, args, draws[row],
                         stats + row * vocabulary_tiles(args.v.weight.rows), tokens, logprobs,
                         reinterpret_cast<double*>(shared + OneRow::kSharedBytes), logits,
                         row_shared, shared);
#endif
}

VocabularyWgmma<TensorMap> shown(const char* op, const Vocabulary<Bfloat16>& v, Reference reference,
                                 int box, int columns) {
  VocabularyWgmma<TensorMap> args = {};
  args.v = v;
  args.box_rows = box;
  args.hidden = tensor_map(op, v.hidden, box);
  args.weight = tensor_map(op, v.weight, columns);
  if (reference != Reference::kNone) args.ref_hidden = tensor_map(op, v.ref_hidden, box);
  if (reference == Reference::kApart) args.ref_weight = tensor_map(op, v.ref_weight, columns);
  return args;
}

template <int kGroups, Reference kReference>
void measure(const char* op, const Vocabulary<Bfloat16>& v, const MeasuredTiles& to,
             Stream stream) {
  using Tile = Measure<kGroups, kReference>;
  const int64_t live = v.hidden.rows - to.first;
  const int64_t tiles = (live + Tile::kRows - 1) / Tile::kRows *
                        ((v.weight.rows + Tile::kColumns - 1) / Tile::kColumns);
  launch_hopper(op, measure_wgmma_kernel<Tile, kReference>, persistent_grid(tiles), Tile::kThreads,
                Tile::kSharedBytes, stream,
                shown(op, v, kReference, box_rows<Tile>(live), Tile::kColumns), to);
}

template <Reference kReference>
void measure_rows(const char* op, const Vocabulary<Bfloat16>& v, const MeasuredTiles& to,
                  Stream stream) {
  if (v.hidden.rows - to.first <= kGroupRows) return measure<1, kReference>(op, v, to, stream);
  measure<2, kReference>(op, v, to, stream);
}

}  // namespace

void measure_tiles_wgmma(const char* op, const Vocabulary<Bfloat16>& v, bool with_ref,
                         const SampleRow* draws, int64_t first, ops::TileStats* stats, float* logit,
                         float* ref_logit, float* logits, Stream stream) {
  const MeasuredTiles to{draws, first, stats, logit, ref_logit, logits};
  if (!with_ref) return measure_rows<Reference::kNone>(op, v, to, stream);
  if (v.ref_weight.data == v.weight.data && v.ref_weight.ld == v.weight.ld &&
      v.ref_weight.depth == v.weight.depth) {
    return measure_rows<Reference::kShared>(op, v, to, stream);
  }
  measure_rows<Reference::kApart>(op, v, to, stream);
}

void draw_rows_wgmma(const char* op, const Vocabulary<Bfloat16>& v, const SampleRow* draws,
                     const ops::TileStats* stats, bool with_truncation, int32_t* tokens,
                     float* logprobs, float* kept_mass, Stream stream) {
  const auto masses = static_cast<int>(vocabulary_tiles(v.weight.rows) * 8);
  launch_hopper(op, draw_wgmma_kernel, count(v.hidden.rows), OneRow::kThreads,
                OneRow::kSharedBytes + masses, stream,
                shown(op, v, Reference::kNone, box_rows<OneRow>(1), kTile), draws, stats,
                with_truncation, tokens, logprobs, kept_mass);
}

}  // namespace alignpro::cuda
