#pragma once

// Which tensor-core instructions multiply bfloat16 matrices in linear, linear_logprob and
// head_sample: mma.sync on every GPU since sm_80. The tests can choose wgmma fed by TMA on sm_90,
// which no GPU has measured yet.

namespace alignpro::cuda {

enum class Products { kMma, kWgmma };

Products products();

// Of this process, from here on: for the tests, so that what is sampled is what is scored. Throws
// Unavailable for wgmma on a GPU of another compute capability than 9.0, or in a build without
// sm_90a.
void set_products(Products wanted);

// Of the current device: its compute capability (9.0 is 90), and how many blocks of a persistent
// grid it runs. Defined in device.cu.
int compute_capability();
int multiprocessors();

}  // namespace alignpro::cuda
