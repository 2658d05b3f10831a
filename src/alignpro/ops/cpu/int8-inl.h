// Part of kernels-inl.h: integer products (panel_layout.h, "integer products"). The integers are
// exact, so every instruction set computes the same sums; floats are added group by group in
// ascending order, whatever rows stand beside a row.

// Eight codes of a row as bytes: the even columns' word, then the odd ones', as nibbles come apart.
ALIGNPRO_INLINE void store_int8(I8 codes, uint8_t* out) {
#if defined(__AVX2__)
  // A byte of each lane to its place in its half's eight bytes; the halves then fill each other.
  const __m256i places =
      _mm256_setr_epi8(0, 8, -1, -1, 4, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 8,
                       -1, -1, 4, 12, -1, -1, -1, -1, -1, -1, -1, -1);
  __m256i wide;
  std::memcpy(&wide, &codes, sizeof(wide));
  const __m256i placed = _mm256_shuffle_epi8(wide, places);
  const int64_t bytes = _mm256_extract_epi64(placed, 0) | _mm256_extract_epi64(placed, 2);
  std::memcpy(out, &bytes, 8);
#else
  for (int j = 0; j < 4; ++j) {
    out[j] = static_cast<uint8_t>(codes[2 * j]);
    out[4 + j] = static_cast<uint8_t>(codes[2 * j + 1]);
  }
#endif
}

void quantize_rows(int64_t rows, int64_t cols, const float* x, int64_t row_stride, uint8_t* out) {
  const int64_t groups = cols / kGroup;
  for (int64_t g = 0; g < groups; ++g, out += kInt8GroupBytes) {
    if (rows < kInt8TileRows) std::memset(out, 0, kInt8GroupBytes);
    auto* scales = reinterpret_cast<float*>(out + kGroup * kInt8TileRows);
    auto* sums = reinterpret_cast<int32_t*>(scales + 2 * kInt8TileRows);
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = x + r * row_stride + g * kGroup;
      F8 top = splat(0.0f), poison = splat(0.0f);
#pragma GCC unroll 4
      for (int64_t i = 0; i < kGroup; i += 8) {
        const F8 v = load(from + i);
        top = max8(abs8(v), top);
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
        sum = sum + (i < kGroup / 2 ? codes << 16 : codes);  // both halves' in one: 16 * 127 fits
        store_int8(codes, out + r * kGroup + i);
      }
      // Codes of NaN or infinity are any integers: the scale carries what they were.
      int32_t total = scale - scale == 0.0f ? sum_lanes(sum) : 0;
      const int32_t last = static_cast<int16_t>(total), first = (total - last) >> 16;
      total = first + last;
      sums[r] = -total;
      sums[kInt8TileRows + r] = -first;
      sums[2 * kInt8TileRows + r] = -last;
      scales[r] = scale;
      scales[kInt8TileRows + r] = scale * static_cast<float>(total);
    }
  }
}

// Codes are too large by two to this power; 0 where a minimum says by how much.
constexpr int offset_bits(DType dtype) {
  return has_byte_codes(dtype) ? 7 : dtype == DType::kQ6_K ? 5 : dtype == DType::kQ5_0 ? 4 : 0;
}

// Words 2 pair and 2 pair + 1 of a group's codes, whose bits beyond four begin at `high`: a part's
// rows, four columns in the bytes of each.
template <DType D>
ALIGNPRO_INLINE void load_codes(const uint8_t* high, int pair, int part, Words codes[2]) {
  const uint8_t* low = high + panel_layout(D).high_bytes + 4 * kLanes * part;
  if constexpr (has_byte_codes(D)) {
    codes[0] = load_words(low + pair * 128);
    codes[1] = load_words(low + pair * 128 + 64);
  } else {
    const Words v = load_words(low + pair * 64);
    codes[0] = v & 0x0f0f0f0fu;
    codes[1] = v >> 4 & 0x0f0f0f0fu;
    constexpr int kExtra = kBits(D) - 4;
    if constexpr (kExtra > 0) {
      const int at = 2 * kExtra * pair;  // of both words, in bits
      const Words extra = load_words(high + at / 8 * 64 + 4 * kLanes * part);
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        const int shift = 4 - at % 8 - kExtra * odd;  // to bit 4; other bytes' bits fall elsewhere
        const Words top = shift > 0 ? extra << shift : extra >> -shift;
        codes[odd] |= top & (((1u << kExtra) - 1) * 0x10101010u);
      }
    }
  }
}

// Of a tile's group at `x`: minus the sums of its rows' codes, over the columns of scale `i` of
// `of_group`.
ALIGNPRO_INLINE const int32_t* negated_sums(const uint8_t* x, int of_group, int i) {
  const auto* sums = reinterpret_cast<const int32_t*>(x + kGroup * kInt8TileRows);
  return sums + (of_group == 1 ? 2 : 3 + i) * kInt8TileRows;
}

// Adds a row's part of a group to `total`: `sum` is what codes with scale `i` of `Scales` give,
// less their offset. Two scales meet in `both` before the row's own, which saves a product.
template <int Scales, bool HasMinimum>
ALIGNPRO_INLINE void add_scaled(Wide sum, const Affine& a, int i, const float* scale,
                                int32_t negated_sum, Wide& both, Wide& total) {
  if constexpr (Scales == 1) {
    total = fma(sum * splat_wide(*scale), a.scale, total);
    if (HasMinimum) total = fma(splat_wide(scale[kInt8TileRows]), a.minimum, total);
  } else {
    both = i == 0 ? sum * a.scale : fma(sum, a.scale, both);
    if (HasMinimum) both = fma(splat_wide(-static_cast<float>(negated_sum)), a.minimum, both);
    if (i > 0) total = fma(both, splat_wide(*scale), total);
  }
}

// A panel's codes in the making, a group: codes [8 words][16][4 bytes], then of each scale in it
// the scales [16] and minima [16]. Where sums have 16 bits, codes of 8 are two planes, the low
// nibbles and the high ones: products of nibbles add up in 16 bits, where bytes would need a sign
// and a widening each.
constexpr int64_t kPlaneBytes = kGroup * kPanel;

// What the products of expanded codes depend on.
struct Int8Form {
  int planes;
  int words;   // whose products, added in pairs, a sum holds
  int scales;  // of a group
  int offset_bits;

  constexpr int64_t group_bytes() const { return planes * kPlaneBytes + scales * 2 * kPanel * 4; }
};

constexpr Int8Form int8_form(DType dtype) {
  const int scales = scales_of_group(dtype);
#if defined(__AVX512VNNI__)
  return {1, 8 / scales, scales, offset_bits(dtype)};
#else
  const bool bytes = has_byte_codes(dtype);
  const int words = bytes ? 8 : 8 >> (kBits(dtype) - 4);  // 8 of 15 * 127 * 2 stay below 2^15
  return {bytes ? 2 : 1, words * scales < 8 ? words : 8 / scales, scales, offset_bits(dtype)};
#endif
}

template <DType D>
void expand_int8(const uint8_t* panel, int64_t cols, int64_t k_begin, int64_t k_count,
                 uint8_t* out) {
  constexpr PanelLayout kLayout = panel_layout(D);
  constexpr Int8Form kForm = int8_form(D);
  for (int64_t k = k_begin; k < k_begin + k_count; k += kGroup) {
    const uint8_t* high = panel + k / kGroup * kLayout.group_bytes() + kLayout.scale_bytes;
    auto* affine = reinterpret_cast<float*>(out + kForm.planes * kPlaneBytes);
    for (int part = 0; part < kParts; ++part) {
      const int at = kLanes * part;
      for (int i = 0; i < kForm.scales; ++i) {
        const Affine a = affine_at<D>(panel, cols, k + scale_columns(D) * i, part);
        store_wide(affine + 2 * kPanel * i + at, a.scale);
        store_wide(affine + 2 * kPanel * i + kPanel + at, a.minimum);
      }
#pragma GCC unroll 4
      for (int pair = 0; pair < 4; ++pair) {
        Words codes[2];
        load_codes<D>(high, pair, part, codes);
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd) {
          uint8_t* to = out + (2 * pair + odd) * 64 + 4 * at;
          const Words low = kForm.planes == 2 ? codes[odd] & 0x0f0f0f0fu : codes[odd];
          std::memcpy(to, &low, sizeof(low));
          if (kForm.planes == 2) {
            const Words top = codes[odd] >> 4 & 0x0f0f0f0fu;
            std::memcpy(to + kPlaneBytes, &top, sizeof(top));
          }
        }
      }
    }
    out += kForm.group_bytes();
  }
}

// Adds groups of a product with expanded codes `w` to rows [first, first + Rows) of a tile.
// sums_of(g, i, sums) gives the sums over the columns of group g's scale i, as codes stand.
template <Int8Form Form, int Rows, typename SumsOf>
ALIGNPRO_INLINE void add_groups(int64_t groups, const uint8_t* x, int64_t first, const uint8_t* w,
                                float* c, bool accumulate, const SumsOf& sums_of) {
  Wide total[Rows][kParts];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      total[r][p] = accumulate ? load_wide(c + r * kPanel + kLanes * p) : splat_wide(0.0f);
    }
  }
  for (int64_t g = 0; g < groups; ++g, x += kInt8GroupBytes, w += Form.group_bytes()) {
    const auto* scales = reinterpret_cast<const float*>(x + kGroup * kInt8TileRows) + first;
    Wide both[Rows][kParts];
#pragma GCC unroll 2
    for (int i = 0; i < Form.scales; ++i) {
      const int32_t* negated = negated_sums(x, Form.scales, i) + first;
      WideInts sums[Rows][kParts];
      sums_of(g, i, sums);
      const auto* affine = reinterpret_cast<const float*>(w + Form.planes * kPlaneBytes);
      affine += 2 * kPanel * i;
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const int32_t offset = Form.offset_bits > 0 ? negated[r] << Form.offset_bits : 0;
#pragma GCC unroll 4
        for (int p = 0; p < kParts; ++p) {
          const float* at = affine + kLanes * p;
          add_scaled<Form.scales, Form.offset_bits == 0>(
              __builtin_convertvector(sums[r][p] + offset, Wide),
              {load_wide(at), load_wide(at + kPanel)}, i, scales + r, negated[r], both[r][p],
              total[r][p]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) store_wide(c + r * kPanel + kLanes * p, total[r][p]);
  }
}

#if defined(__AVX512VNNI__)

// Rows [first, first + Rows) of a tile against a panel as it is stored. A chain is a row.
template <DType D, int Rows>
void int8_tile(int64_t cols, const uint8_t* x, int64_t first, const uint8_t* panel, float* c) {
  constexpr PanelLayout kLayout = panel_layout(D);
  constexpr int kScales = scales_of_group(D);
  constexpr int kOffset = offset_bits(D);
  const __m512i zero = _mm512_setzero_si512();
  Wide total[Rows] = {};
  for (int64_t k = 0; k < cols; k += kGroup, x += kInt8GroupBytes) {
    const uint8_t* high = panel + k / kGroup * kLayout.group_bytes() + kLayout.scale_bytes;
    const uint8_t* rows = x + first * kGroup;
    const auto* scales = reinterpret_cast<const float*>(x + kGroup * kInt8TileRows) + first;
    // The next panel's group: no hardware prefetcher crosses from one short panel to the next.
    for (int64_t at = 0; at < kLayout.group_bytes(); at += 64) {
      __builtin_prefetch(high + panel_bytes(D, cols) + at);
    }
    Wide both[Rows];
#pragma GCC unroll 2
    for (int i = 0; i < kScales; ++i) {
      const int32_t* sums = negated_sums(x, kScales, i) + first;
      __m512i acc[Rows];
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        acc[r] = kOffset > 0 ? _mm512_slli_epi32(_mm512_set1_epi32(sums[r]), kOffset) : zero;
      }
#pragma GCC unroll 4
      for (int pair = 4 / kScales * i; pair < 4 / kScales * (i + 1); ++pair) {
        Words codes[2];
        load_codes<D>(high, pair, 0, codes);
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd) {
          __m512i code;
          std::memcpy(&code, &codes[odd], sizeof(code));
#pragma GCC unroll 8
          for (int r = 0; r < Rows; ++r) {
            int32_t four;
            std::memcpy(&four, rows + r * kGroup + (2 * pair + odd) * 4, 4);
            acc[r] = _mm512_dpbusd_epi32(acc[r], code, _mm512_set1_epi32(four));
          }
        }
      }
      const Affine a = affine_at<D>(panel, cols, k + scale_columns(D) * i, 0);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        add_scaled<kScales, kOffset == 0>(_mm512_cvtepi32_ps(acc[r]), a, i, scales + r, sums[r],
                                          both[r], total[r]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) store_wide(c + r * kPanel, total[r]);
}

constexpr int64_t kInt8Rows = 8;  // sums and totals of more rows would not fit into 32 registers

template <DType D>
void int8_gemm_of(int64_t rows, int64_t cols, const uint8_t* x, int64_t x_stride,
                  const uint8_t* panel, float* c) {
  for (int64_t row = 0; row < rows; row += kInt8Rows) {
    const uint8_t* tile = x + row / kInt8TileRows * x_stride;
    with_count<kInt8Rows>(rows - row, [&](auto live) __attribute__((always_inline)) {
      int8_tile<D, decltype(live)::kValue>(cols, tile, row % kInt8TileRows, panel,
                                           c + row * kPanel);
    });
  }
}

#else

constexpr int64_t kInt8Rows = 4;  // with eight the sums would not fit into 16 registers

// sums[r][part] of `Words` words of a plane, of which 16 bits hold `Narrow` (Int8Form::words):
// lanes are the panel's rows.
template <int Rows, int Words, int Narrow>
ALIGNPRO_INLINE void group_sums(const uint8_t* x, const uint8_t* w, WideInts sums[Rows][kParts]) {
#if defined(__AVX2__)
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
  for (int first = 0; first < Words; first += Narrow) {
    __m256i acc[Rows][2];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int word = first; word < first + Narrow; ++word) {
      __m256i code[2];
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        code[half] =
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + word * 64 + 32 * half));
      }
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        int32_t four;
        std::memcpy(&four, x + r * kGroup + word * 4, 4);
        const __m256i xs = _mm256_set1_epi32(four);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          acc[r][half] = _mm256_add_epi16(acc[r][half], _mm256_maddubs_epi16(code[half], xs));
        }
        // A row ends before the next one's load: with those hoisted a sum lived on the stack, and
        // its chain of stores and loads took a third of the time.
        asm volatile("" : "+x"(acc[r][0]), "+x"(acc[r][1]) : : "memory");
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m256i sum = _mm256_madd_epi16(acc[r][half], ones);
        WideInts wide;
        std::memcpy(&wide, &sum, sizeof(sum));
        sums[r][half] = first == 0 ? wide : sums[r][half] + wide;
      }
    }
  }
#elif defined(ALIGNPRO_NEON)
  static_assert(Words <= 2 * Narrow, "16 bits hold twice as many words of single products");
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {  // with all of a panel the sums would fill the registers
    int16x8_t acc[Rows][4] = {};
#pragma GCC unroll 8
    for (int word = 0; word < Words; ++word) {
      const uint8_t* from = w + word * 64 + 32 * half;
      const int8x16_t code[2] = {vreinterpretq_s8_u8(vld1q_u8(from)),
                                 vreinterpretq_s8_u8(vld1q_u8(from + 16))};
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        int32_t four;
        std::memcpy(&four, x + r * kGroup + word * 4, 4);
        const int8x16_t xs = vreinterpretq_s8_s32(vdupq_n_s32(four));
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
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
      for (int word = 0; word < Words; ++word) {
        for (int j = 0; j < 4; ++j) {
          sum += w[word * 64 + 4 * n + j] * static_cast<int8_t>(x[r * kGroup + word * 4 + j]);
        }
      }
      sums[r][n / kLanes][n % kLanes] = sum;
    }
  }
#endif
}

// Rows [first, first + Rows) of a tile.
template <Int8Form Form, int Rows>
void int8_tile(int64_t groups, const uint8_t* x, int64_t first, const uint8_t* w, float* c,
               bool accumulate) {
  constexpr int kWords = 8 / Form.scales;
  add_groups<Form, Rows>(
      groups, x, first, w, c, accumulate,
      [&](int64_t g, int i, WideInts(&sums)[Rows][kParts]) __attribute__((always_inline)) {
        const uint8_t* rows = x + g * kInt8GroupBytes + first * kGroup + 4 * kWords * i;
        const uint8_t* codes = w + g * Form.group_bytes() + kWords * 64 * i;
        group_sums<Rows, kWords, Form.words>(rows, codes, sums);
        if constexpr (Form.planes == 2) {
          WideInts high[Rows][kParts];
          group_sums<Rows, kWords, Form.words>(rows, codes + kPlaneBytes, high);
#pragma GCC unroll 4
          for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
            for (int p = 0; p < kParts; ++p) sums[r][p] += high[r][p] * 16;
          }
        }
      });
}

template <DType D>
void int8_gemm_of(int64_t rows, int64_t cols, const uint8_t* x, int64_t x_stride,
                  const uint8_t* panel, float* c) {
  constexpr Int8Form kForm = int8_form(D);
  uint8_t codes[kContract / kGroup * kForm.group_bytes()];
  for (int64_t k = 0; k < cols; k += kContract) {
    const int64_t count = cols - k < kContract ? cols - k : kContract;
    const int64_t groups = count / kGroup;
    expand_int8<D>(panel, cols, k, count, codes);
    for (int64_t row = 0; row < rows; row += kInt8Rows) {
      const uint8_t* tile = x + row / kInt8TileRows * x_stride + k / kGroup * kInt8GroupBytes;
      const int64_t first = row % kInt8TileRows;
      float* to = c + row * kPanel;
      with_count<kInt8Rows>(rows - row, [&](auto live) __attribute__((always_inline)) {
        int8_tile<kForm, decltype(live)::kValue>(groups, tile, first, codes, to, k > 0);
      });
    }
  }
}

#endif

static_assert(kInt8TileRows % kInt8Rows == 0, "rows that are multiplied at once lie in one tile");

void int8_gemm(DType dtype, int64_t rows, int64_t cols, const uint8_t* x, int64_t x_stride,
               const void* panel, float* c) {
  with_dtype(dtype, [&](auto type) __attribute__((always_inline)) {
    constexpr DType kType = decltype(type)::kValue;
    if constexpr (is_quantized(kType)) {
      int8_gemm_of<kType>(rows, cols, x, x_stride, static_cast<const uint8_t*>(panel), c);
    }
  });
}
