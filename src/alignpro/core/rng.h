#pragma once

#include <cstdint>

#include "alignpro/core/host_device.h"

namespace alignpro {

struct PhiloxWords {
  uint32_t word[4];

  ALIGNPRO_HOST_DEVICE uint32_t operator[](int i) const { return word[i]; }
  bool operator==(const PhiloxWords&) const = default;
};
struct PhiloxKey {
  uint32_t word[2];
};

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
// Randomness is a function of its key alone (contract 3): no state, nothing to reseed.
ALIGNPRO_HOST_DEVICE inline PhiloxWords philox4x32(PhiloxWords counter, PhiloxKey key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter.word[0];
    const uint64_t b = uint64_t{0xCD9E8D57u} * counter.word[2];
    counter = {
        {static_cast<uint32_t>(b >> 32) ^ counter.word[1] ^ key.word[0], static_cast<uint32_t>(b),
         static_cast<uint32_t>(a >> 32) ^ counter.word[3] ^ key.word[1], static_cast<uint32_t>(a)}};
    key.word[0] += 0x9E3779B9u;
    key.word[1] += 0xBB67AE85u;
  }
  return counter;
}

// Uniform in [0, 1) with 53 bits, for one token: keyed by the request's seed, which of its samples
// this is, and the token's absolute position in the sequence.
ALIGNPRO_HOST_DEVICE inline double keyed_uniform(uint64_t seed, uint32_t sample,
                                                 uint32_t position) {
  const PhiloxWords r =
      philox4x32({{position, sample, 0, 0}},
                 {{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)}});
  const uint64_t bits = (uint64_t{r[0]} << 32 | r[1]) >> 11;
  return static_cast<double>(bits) * 0x1.0p-53;
}

}  // namespace alignpro
