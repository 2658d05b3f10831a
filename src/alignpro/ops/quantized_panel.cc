#include "alignpro/ops/quantized_panel.h"

#include <cstring>

#include "alignpro/ops/cpu/panel_layout.h"

namespace alignpro::ops {
namespace {

using cpu::kGroup;
using cpu::kPanel;

int at(const std::byte* p, int64_t i) { return std::to_integer<int>(p[i]); }

// Low and high nibbles of 16 bytes are the first and the last 16 codes.
void nibbles(const std::byte* low, uint8_t* codes) {
  for (int j = 0; j < 16; ++j) {
    codes[j] = static_cast<uint8_t>(at(low, j) & 15);
    codes[j + 16] = static_cast<uint8_t>(at(low, j) >> 4);
  }
}

void fifth_bits(const std::byte* high, uint8_t* codes) {
  uint32_t bits;
  std::memcpy(&bits, high, sizeof bits);
  for (int j = 0; j < 32; ++j) codes[j] |= static_cast<uint8_t>((bits >> j & 1u) << 4);
}

// Writes group `group` of a stored row: its 32 unsigned codes, and row n's scales into the group at
// `to` and, where this group is a factor's first, into `factors`. Formats: core/dtype.cc.
void read_group(DType dtype, const std::byte* row, int64_t group, int64_t n, uint8_t* codes,
                std::byte* to, std::byte* factors) {
  const int64_t size = block_bytes(dtype);
  const std::byte* block = row + (block_values(dtype) == kGroup ? group : group / 8) * size;
  const int g = static_cast<int>(group % 8);
  switch (dtype) {
    case DType::kQ8_0:
      std::memcpy(to + 2 * n, block, 2);
      for (int j = 0; j < 32; ++j) codes[j] = static_cast<uint8_t>(at(block, 2 + j) ^ 0x80);
      return;
    case DType::kQ4_0:
    case DType::kQ4_1:
    case DType::kQ5_0:
    case DType::kQ5_1: {
      const bool with_minimum = dtype == DType::kQ4_1 || dtype == DType::kQ5_1;
      const bool five = dtype == DType::kQ5_0 || dtype == DType::kQ5_1;
      const std::byte* bits = block + (with_minimum ? 4 : 2);
      std::memcpy(to + 2 * n, block, 2);
      if (with_minimum) std::memcpy(to + 32 + 2 * n, block + 2, 2);
      nibbles(bits + (five ? 4 : 0), codes);
      if (five) fifth_bits(bits, codes);
      return;
    }
    case DType::kQ4_K:
    case DType::kQ5_K: {
      const GroupScale s = k_group_scale(block + 4, g);
      to[n] = std::byte{s.scale};
      to[16 + n] = std::byte{s.minimum};
      const bool five = dtype == DType::kQ5_K;
      const std::byte* low = block + (five ? 48 : 16) + g / 2 * 32;
      for (int j = 0; j < 32; ++j) {
        const int fifth = five ? at(block, 16 + j) >> g & 1 : 0;
        codes[j] = static_cast<uint8_t>((at(low, j) >> (g % 2 * 4) & 15) | fifth << 4);
      }
      if (g == 0) {
        std::memcpy(factors + 2 * n, block, 2);
        std::memcpy(factors + 32 + 2 * n, block + 2, 2);
      }
      return;
    }
    case DType::kQ6_K: {
      const int half = g / 4, i = g % 4;
      const std::byte* low = block + 64 * half + 32 * (i % 2);
      const std::byte* high = block + 128 + 32 * half;
      to[n] = block[192 + 2 * g];
      to[16 + n] = block[192 + 2 * g + 1];
      for (int j = 0; j < 32; ++j) {
        codes[j] = static_cast<uint8_t>((at(low, j) >> (i > 1 ? 4 : 0) & 15) |
                                        (at(high, j) >> (2 * i) & 3) << 4);
      }
      if (g == 0) std::memcpy(factors + 2 * n, block + 208, 2);
      return;
    }
    case DType::kQ2_K: {
      for (int half = 0; half < 2; ++half) {
        const int scales = at(block, 2 * g + half);
        to[32 * half + n] = static_cast<std::byte>(scales & 15);
        to[32 * half + 16 + n] = static_cast<std::byte>(scales >> 4);
      }
      for (int j = 0; j < 32; ++j) {
        codes[j] = static_cast<uint8_t>(two_bits_at(block + 16, 32 * g + j));
      }
      if (g == 0) {
        std::memcpy(factors + 2 * n, block + 80, 2);
        std::memcpy(factors + 32 + 2 * n, block + 82, 2);
      }
      return;
    }
    case DType::kQ3_K: {
      to[n] = static_cast<std::byte>(q3_k_scale(block + 96, 2 * g));
      to[16 + n] = static_cast<std::byte>(q3_k_scale(block + 96, 2 * g + 1));
      for (int j = 0; j < 32; ++j) {
        const int third = at(block, j) >> g & 1;
        codes[j] = static_cast<uint8_t>((two_bits_at(block + 32, 32 * g + j) | third << 2) + 28);
      }
      if (g == 0) std::memcpy(factors + 2 * n, block + 108, 2);
      return;
    }
    case DType::kIQ4_NL:
    case DType::kIQ4_XS: {
      const bool has_factor = dtype == DType::kIQ4_XS;
      if (has_factor) {
        to[n] = static_cast<std::byte>(iq4_xs_scale(block, g));
        if (g == 0) std::memcpy(factors + 2 * n, block, 2);
      } else {
        std::memcpy(to + 2 * n, block, 2);
      }
      nibbles(block + (has_factor ? 8 + 16 * g : 2), codes);
      for (int j = 0; j < 32; ++j) codes[j] = static_cast<uint8_t>(iq4_value(codes[j]) + 128);
      return;
    }
    default:
      return;
  }
}

void put_word(std::byte* words, int64_t word, int64_t n, uint32_t bits) {
  std::memcpy(words + (word * kPanel + n) * 4, &bits, sizeof bits);
}

void pack_quantized(DType dtype, std::span<const QuantizedRow> rows, int64_t cols, std::byte* out) {
  const cpu::PanelLayout layout = cpu::panel_layout(dtype);
  const int64_t groups = cols / kGroup;
  std::byte* factors = out + groups * layout.group_bytes();
  for (int64_t group = 0; group < groups; ++group) {
    std::byte* to = out + group * layout.group_bytes();
    std::byte* high = to + layout.scale_bytes;
    std::byte* low = high + layout.high_bytes;
    for (size_t r = 0; r < rows.size(); ++r) {
      const auto n = static_cast<int64_t>(r);
      uint8_t codes[kGroup] = {};
      read_group(rows[r].dtype, rows[r].data, group, n, codes, to,
                 factors + group / cpu::kGroupsPerFactor * layout.factor_bytes);
      if (cpu::has_byte_codes(dtype)) {
        for (int64_t word = 0; word < 8; ++word) {
          for (int64_t j = 0; j < 4; ++j) {
            low[(word * kPanel + n) * 4 + j] = std::byte{codes[word / 2 * 8 + word % 2 + 2 * j]};
          }
        }
        continue;
      }
      for (int64_t word = 0; word < 4; ++word) {
        uint32_t bits = 0;
        for (int j = 0; j < 8; ++j) bits |= (codes[8 * word + j] & 15u) << (4 * j);
        put_word(low, word, n, bits);
      }
      const int extra = static_cast<int>(layout.high_bytes / 64);  // bits beyond four, and words
      uint32_t bits[2] = {};
      for (int k = 0; k < kGroup && extra > 0; ++k) {
        const int first = extra * (k / 8 * 2 + k % 2);  // of its word
        bits[first / 8] |= static_cast<uint32_t>(codes[k] >> 4) << (k % 8 / 2 * 8 + first % 8);
      }
      for (int word = 0; word < extra; ++word) put_word(high, word, n, bits[word]);
    }
  }
}

}  // namespace

void pack_quantized_panel(DType dtype, std::span<const QuantizedRow> rows, int64_t cols,
                          std::byte* out) {
  if (static_cast<int64_t>(rows.size()) < kPanel) {
    std::memset(out, 0, static_cast<size_t>(cpu::panel_bytes(dtype, cols)));
  }
  if (cpu::is_quantized(dtype)) {
    pack_quantized(dtype, rows, cols, out);
    return;
  }
  for (int64_t k = 0; k < cols; ++k) {
    for (size_t n = 0; n < rows.size(); ++n) {
      std::memcpy(out + (k * kPanel + static_cast<int64_t>(n)) * 2, rows[n].data + 2 * k, 2);
    }
  }
}

}  // namespace alignpro::ops
