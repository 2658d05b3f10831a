// Part of kernels-inl.h: integer products (panel_layout.h, "integer products"). The integers are
// exact, so every instruction set computes the same sums; floats are added group by group in
// ascending order, whatever rows stand beside a row.

// Eight codes of a row as bytes: the even columns' word, then the odd ones', as nibbles come apart.
ALIGNPRO_INLINE void store_int8(I8 codes, uint8_t* even, uint8_t* odd) {
#if defined(__AVX2__)
  // A byte of each lane to its place in its half's eight bytes; the halves then fill each other.
  const __m256i places =
      _mm256_setr_epi8(0, 8, -1, -1, 4, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 8,
                       -1, -1, 4, 12, -1, -1, -1, -1, -1, -1, -1, -1);
  __m256i wide;
  std::memcpy(&wide, &codes, sizeof(wide));
  const __m256i placed = _mm256_shuffle_epi8(wide, places);
  const int64_t bytes = _mm256_extract_epi64(placed, 0) | _mm256_extract_epi64(placed, 2);
  std::memcpy(even, &bytes, 4);
  std::memcpy(odd, reinterpret_cast<const uint8_t*>(&bytes) + 4, 4);
#else
  for (int j = 0; j < 4; ++j) {
    even[j] = static_cast<uint8_t>(codes[2 * j]);
    odd[j] = static_cast<uint8_t>(codes[2 * j + 1]);
  }
#endif
}

void quantize_rows(int64_t rows, int64_t cols, const float* x, int64_t row_stride, uint8_t* out) {
  const int64_t groups = cols / kGroup;
  for (int64_t g = 0; g < groups; ++g, out += kInt8GroupBytes) {
    if (rows < kInt8TileRows) std::memset(out, 0, kInt8GroupBytes);
    auto* sums = reinterpret_cast<int32_t*>(out + kGroup * kInt8TileRows);
    auto* scales = reinterpret_cast<float*>(sums + kInt8TileRows);
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = x + r * row_stride + g * kGroup;
      F8 top = splat(0.0f), poison = splat(0.0f);
#pragma GCC unroll 4
      for (int64_t i = 0; i < kGroup; i += 8) {
        const F8 v = load(from + i);
        top = max8(where(v < splat(0.0f), -v, v), top);
        poison = poison + v * splat(0.0f);  // NaN and infinity must not vanish in an integer
      }
      const float most = max_lanes(top);
      const float scale = most / 127.0f + sum_lanes(poison);
      const F8 inverse = splat(most > 0.0f ? 127.0f / most : 0.0f);
      const F8 magic = splat(12582912.0f);  // rounds to even, as exp8's
      I8 sum = {};
#pragma GCC unroll 4
      for (int64_t i = 0; i < kGroup; i += 8) {
        const F8 biased = load(from + i) * inverse + magic;
        I8 codes;
        std::memcpy(&codes, &biased, sizeof(codes));
        codes = codes - 0x4B400000;
        sum = sum + codes;
        uint8_t* to = out + (i / 4 * kInt8TileRows + r) * 4;
        store_int8(codes, to, to + kInt8TileRows * 4);
      }
      int32_t total = 0;
      // Codes of NaN or infinity are any integers: the scale carries what they were.
      for (int j = 0; j < 8 && scale - scale == 0.0f; ++j) total += sum[j];
      sums[r] = total;
      scales[r] = scale;
      scales[kInt8TileRows + r] = scale * static_cast<float>(total);
    }
  }
}

#if defined(__AVX512VNNI__)

// One tile of rows against a panel as it is stored. A chain is a row; the codes are unsigned, those
// of Q8_0 128 too large, which the row's sum takes back.
template <DType D, int Rows>
void int8_tile(int64_t cols, const uint8_t* x, const uint8_t* panel, float* c) {
  constexpr PanelLayout kLayout = panel_layout(D);
  constexpr bool kBytes = D == DType::kQ8_0;
  const __m512i nibbles = _mm512_set1_epi8(15);
  Wide total[Rows] = {};
  for (int64_t k = 0; k < cols; k += kGroup, x += kInt8GroupBytes) {
    const uint8_t* low = panel + k / kGroup * kLayout.group_bytes() + kLayout.scale_bytes;
    const auto* sums = reinterpret_cast<const int32_t*>(x + kGroup * kInt8TileRows);
    const auto* scales = reinterpret_cast<const float*>(sums + kInt8TileRows);
    // The next panel's group: no hardware prefetcher crosses from one short panel to the next.
    for (int64_t at = 0; at < kLayout.group_bytes(); at += 64) {
      __builtin_prefetch(low + panel_bytes(D, cols) + at);
    }
    __m512i acc[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      acc[r] = kBytes ? _mm512_set1_epi32(-128 * sums[r]) : _mm512_setzero_si512();
    }
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; ++pair) {
      __m512i code[2];
      if (kBytes) {
        code[0] = _mm512_loadu_si512(low + pair * 128);
        code[1] = _mm512_loadu_si512(low + pair * 128 + 64);
      } else {
        const __m512i v = _mm512_loadu_si512(low + pair * 64);
        code[0] = _mm512_and_si512(v, nibbles);
        code[1] = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibbles);
      }
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          int32_t four;
          std::memcpy(&four, x + ((2 * pair + odd) * kInt8TileRows + r) * 4, 4);
          acc[r] = _mm512_dpbusd_epi32(acc[r], code[odd], _mm512_set1_epi32(four));
        }
      }
    }
    const Affine a = affine_at<D>(panel, cols, k, 0);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      total[r] = fma(_mm512_cvtepi32_ps(acc[r]) * splat_wide(scales[r]), a.scale, total[r]);
      if (!kBytes) total[r] = fma(splat_wide(scales[kInt8TileRows + r]), a.minimum, total[r]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) store_wide(c + r * kPanel, total[r]);
}

template <DType D>
void int8_gemm_of(int64_t rows, int64_t cols, const uint8_t* x, int64_t x_stride,
                  const uint8_t* panel, float* c) {
  for (; rows >= kInt8TileRows; rows -= kInt8TileRows, x += x_stride, c += kInt8TileRows * kPanel) {
    int8_tile<D, kInt8TileRows>(cols, x, panel, c);
  }
  with_count<kInt8TileRows - 1>(rows, [&](auto live) __attribute__((always_inline)) {
    int8_tile<D, decltype(live)::kValue>(cols, x, panel, c);
  });
}

#else

// A panel's codes in the making: nibbles [8 words][16][4 bytes], scales [16], minima [16] a group.
// Those of Q8_0, 128 too large, are two planes, the low nibbles and the high ones: products of
// nibbles add up in 16 bits, where bytes would need a sign and a widening each.
constexpr int64_t kPlaneBytes = kGroup * kPanel;
constexpr int planes(DType dtype) { return dtype == DType::kQ8_0 ? 2 : 1; }
constexpr int64_t weight_group_bytes(int planes) { return planes * kPlaneBytes + 2 * kPanel * 4; }

template <DType D>
void expand_int8(const uint8_t* panel, int64_t cols, int64_t k_begin, int64_t k_count,
                 uint8_t* out) {
  constexpr PanelLayout kLayout = panel_layout(D);
  constexpr int kPlanes = planes(D);
  // A stored word's nibbles are two words of one plane, or the same word of two.
  constexpr int64_t kStep = kPlanes == 2 ? 64 : 128, kToOdd = kPlanes == 2 ? kPlaneBytes : 64;
  for (int64_t k = k_begin; k < k_begin + k_count; k += kGroup) {
    const uint8_t* low = panel + k / kGroup * kLayout.group_bytes() + kLayout.scale_bytes;
    auto* affine = reinterpret_cast<float*>(out + kPlanes * kPlaneBytes);
    for (int part = 0; part < kParts; ++part) {
      const Affine a = affine_at<D>(panel, cols, k, part);
      const int at = kLanes * part;
      store_wide(affine + at, a.scale);
      store_wide(affine + kPanel + at, a.minimum);
      for (int stored = 0; stored < 4 * kPlanes; ++stored) {
        const Words v = load_words(low + stored * 64 + 4 * at);
        const Words even = v & 0x0f0f0f0fu, odd = v >> 4 & 0x0f0f0f0fu;
        uint8_t* to = out + stored * kStep + 4 * at;
        std::memcpy(to, &even, sizeof(even));
        std::memcpy(to + kToOdd, &odd, sizeof(odd));
      }
    }
    out += weight_group_bytes(kPlanes);
  }
}

constexpr int64_t kInt8Rows = 4;  // with eight the sums would not fit into 16 registers
static_assert(kInt8TileRows % kInt8Rows == 0);

// sums[r][part] of one group and plane: lanes are the panel's rows.
template <int Rows>
ALIGNPRO_INLINE void group_sums(const uint8_t* x, const uint8_t* w, WideInts sums[Rows][kParts]) {
#if defined(__AVX2__)
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i acc[Rows][2];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 8
  for (int word = 0; word < 8; ++word) {
    __m256i code[2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      code[half] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + word * 64 + 32 * half));
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      int32_t four;
      std::memcpy(&four, x + (word * kInt8TileRows + r) * 4, 4);
      const __m256i xs = _mm256_set1_epi32(four);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {  // 8 words of 15 * 127 * 2 stay below 2^15
        acc[r][half] = _mm256_add_epi16(acc[r][half], _mm256_maddubs_epi16(code[half], xs));
      }
      // A row ends before the next one's load: with those hoisted a sum lived on the stack, and its
      // chain of stores and loads took a third of the time.
      asm volatile("" : "+x"(acc[r][0]), "+x"(acc[r][1]) : : "memory");
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256i sum = _mm256_madd_epi16(acc[r][half], ones);
      std::memcpy(&sums[r][half], &sum, sizeof(sum));
    }
  }
#elif defined(ALIGNPRO_NEON)
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {  // with all of a panel the sums would fill the registers
    int16x8_t acc[Rows][4] = {};
#pragma GCC unroll 8
    for (int word = 0; word < 8; ++word) {
      const uint8_t* from = w + word * 64 + 32 * half;
      const int8x16_t code[2] = {vreinterpretq_s8_u8(vld1q_u8(from)),
                                 vreinterpretq_s8_u8(vld1q_u8(from + 16))};
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        int32_t four;
        std::memcpy(&four, x + (word * kInt8TileRows + r) * 4, 4);
        const int8x16_t xs = vreinterpretq_s8_s32(vdupq_n_s32(four));
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {  // 8 words of 15 * 127 stay below 2^15
          acc[r][2 * i] = vmlal_s8(acc[r][2 * i], vget_low_s8(code[i]), vget_low_s8(xs));
          acc[r][2 * i + 1] = vmlal_high_s8(acc[r][2 * i + 1], code[i], xs);
        }
      }
      asm volatile("" : : : "memory");  // rows kept for the other half would live on the stack
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        sums[r][2 * half + i] =
            vpaddq_s32(vpaddlq_s16(acc[r][2 * i]), vpaddlq_s16(acc[r][2 * i + 1]));
      }
    }
  }
#else
  for (int r = 0; r < Rows; ++r) {
    for (int n = 0; n < kPanel; ++n) {
      int32_t sum = 0;
      for (int word = 0; word < 8; ++word) {
        for (int j = 0; j < 4; ++j) {
          sum +=
              w[word * 64 + 4 * n + j] * static_cast<int8_t>(x[(word * kInt8TileRows + r) * 4 + j]);
        }
      }
      sums[r][n / kLanes][n % kLanes] = sum;
    }
  }
#endif
}

// Rows [first, first + Rows) of a tile.
template <int Planes, int Rows>
void int8_tile(int64_t groups, const uint8_t* x, int64_t first, const uint8_t* w, float* c,
               bool accumulate) {
  Wide total[Rows][kParts];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      total[r][p] = accumulate ? load_wide(c + r * kPanel + kLanes * p) : splat_wide(0.0f);
    }
  }
  for (int64_t g = 0; g < groups; ++g, x += kInt8GroupBytes, w += weight_group_bytes(Planes)) {
    WideInts sums[Rows][kParts];
    group_sums<Rows>(x + 4 * first, w, sums);
    const auto* affine = reinterpret_cast<const float*>(w + Planes * kPlaneBytes);
    const auto* totals = reinterpret_cast<const int32_t*>(x + kGroup * kInt8TileRows) + first;
    const auto* scales = reinterpret_cast<const float*>(totals) + kInt8TileRows;
    if constexpr (Planes == 2) {
      WideInts high[Rows][kParts];
      group_sums<Rows>(x + 4 * first, w + kPlaneBytes, high);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int p = 0; p < kParts; ++p) sums[r][p] += high[r][p] * 16 - 128 * totals[r];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) {
        const Wide product = __builtin_convertvector(sums[r][p], Wide) * splat_wide(scales[r]);
        total[r][p] = fma(product, load_wide(affine + kLanes * p), total[r][p]);
        if (Planes == 1) {
          total[r][p] = fma(splat_wide(scales[kInt8TileRows + r]),
                            load_wide(affine + kPanel + kLanes * p), total[r][p]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) store_wide(c + r * kPanel + kLanes * p, total[r][p]);
  }
}

template <DType D>
void int8_gemm_of(int64_t rows, int64_t cols, const uint8_t* x, int64_t x_stride,
                  const uint8_t* panel, float* c) {
  constexpr int kPlanes = planes(D);
  uint8_t codes[kContract / kGroup * weight_group_bytes(kPlanes)];
  for (int64_t k = 0; k < cols; k += kContract) {
    const int64_t count = cols - k < kContract ? cols - k : kContract;
    const int64_t groups = count / kGroup;
    expand_int8<D>(panel, cols, k, count, codes);
    for (int64_t row = 0; row < rows; row += kInt8Rows) {
      const uint8_t* tile = x + row / kInt8TileRows * x_stride + k / kGroup * kInt8GroupBytes;
      const int64_t first = row % kInt8TileRows;
      float* to = c + row * kPanel;
      with_count<kInt8Rows>(rows - row, [&](auto live) __attribute__((always_inline)) {
        int8_tile<kPlanes, decltype(live)::kValue>(groups, tile, first, codes, to, k > 0);
      });
    }
  }
}

#endif

void int8_gemm(DType dtype, int64_t rows, int64_t cols, const uint8_t* x, int64_t x_stride,
               const void* panel, float* c) {
  const auto* p = static_cast<const uint8_t*>(panel);
  switch (dtype) {
    case DType::kQ4_0:
      return int8_gemm_of<DType::kQ4_0>(rows, cols, x, x_stride, p, c);
    case DType::kQ4_1:
      return int8_gemm_of<DType::kQ4_1>(rows, cols, x, x_stride, p, c);
    case DType::kQ4_K:
      return int8_gemm_of<DType::kQ4_K>(rows, cols, x, x_stride, p, c);
    default:
      return int8_gemm_of<DType::kQ8_0>(rows, cols, x, x_stride, p, c);
  }
}
