#pragma once

// Which tensor-core instructions multiply bfloat16 matrices in linear, linear_logprob and
// head_sample: mma.sync on every GPU since sm_80, or wgmma fed by TMA on sm_90. One choice a
// process, so that what is sampled is what is scored.

#include <string_view>

namespace alignpro::cuda {

enum class Products { kMma, kWgmma };

// kMma where `wanted` is empty. Throws InvalidArgument for an unknown word, Unavailable for wgmma
// on a GPU of another `capability` (9.0 is 90) or in a build without sm_90a.
Products choose_products(std::string_view wanted, int capability, bool built);

// The choice for this process, made once: choose_products($ALIGNPRO_CUDA_PRODUCTS).
Products products();

// Of the current device: its compute capability, and how many blocks of a persistent grid it runs.
// Defined in device.cu.
int compute_capability();
int multiprocessors();

}  // namespace alignpro::cuda
