#pragma once

// The launchers of what products.h chooses for sm_90: the same work as the tiles of mma.sync do, on
// arguments that are checked.

#include "bodies/linear.h"
#include "bodies/vocabulary.h"
#include "launch.h"
#include "products.h"

namespace alignpro::cuda {

// A block a multiprocessor, each of which takes tiles in turn.
inline dim3 persistent_grid(int64_t tiles) {
  const int64_t blocks = multiprocessors();
  return count(tiles < blocks ? tiles : blocks);
}

// Defined in linear_wgmma.cu.
void linear_wgmma(const char* op, const Linear<Bfloat16>& layer, bool with_lora, Stream stream);

// Of measure_tiles (vocabulary_tiles.h) and of head_sample's rows that are not truncated, with
// `tiles` doubles of shared memory. Defined in vocabulary_wgmma.cu.
void measure_tiles_wgmma(const char* op, const Vocabulary<Bfloat16>& v, bool with_ref,
                         const SampleRow* draws, int64_t first, ops::TileStats* stats, float* logit,
                         float* ref_logit, float* logits, Stream stream);
void draw_rows_wgmma(const char* op, const Vocabulary<Bfloat16>& v, const SampleRow* draws,
                     const ops::TileStats* stats, bool with_truncation, int32_t* tokens,
                     float* logprobs, float* kept_mass, Stream stream);

}  // namespace alignpro::cuda
