// Part of kernels-inl.h: integer products (panel_layout.h, "integer products"). The integers are
// exact, so every instruction set computes the same sums; floats are added group by group in
// ascending order, whatever rows stand beside a row.

void quantize_rows(int64_t rows, int64_t cols, const float* x, int64_t row_stride, uint8_t* out) {
  const int64_t groups = cols / kGroup;
  for (int64_t g = 0; g < groups; ++g) {
    uint8_t* to = out + g * kCodeGroupBytes;
    auto* scales = reinterpret_cast<float*>(to + kGroup * kCodeRows);
    for (int64_t r = 0; r < kCodeRows; ++r) {
      int8_t codes[kGroup] = {};
      float scale = 0.0f;
      int32_t sum = 0;
      if (r < rows) {
        const float* from = x + r * row_stride + g * kGroup;
        F8 top = splat(0.0f), poison = splat(0.0f);
        for (int64_t i = 0; i < kGroup; i += 8) {
          const F8 v = load(from + i);
          top = max8(v < splat(0.0f) ? -v : v, top);
          poison = poison + v * splat(0.0f);  // NaN and infinity must not vanish in an integer
        }
        const float most = max_lanes(top);
        scale = most / 127.0f + sum_lanes(poison);
        const F8 inverse = splat(most > 0.0f ? 127.0f / most : 0.0f);
        const F8 magic = splat(12582912.0f);  // rounds to even, as exp8's
        for (int64_t i = 0; i < kGroup; i += 8) {
          const F8 biased = load(from + i) * inverse + magic;
          I8 bits;
          std::memcpy(&bits, &biased, sizeof(bits));
          for (int j = 0; j < 8; ++j) {
            codes[i + j] = static_cast<int8_t>(bits[j] - 0x4B400000);
            sum += codes[i + j];
          }
        }
      }
      for (int64_t word = 0; word < 8; ++word) {
        // Of each eight columns the even ones, then the odd ones, as nibbles come apart.
        const int8_t* first = codes + word / 2 * 8 + word % 2;
        int8_t* at = reinterpret_cast<int8_t*>(to) + (word * kCodeRows + r) * 4;
        for (int j = 0; j < 4; ++j) at[j] = first[2 * j];
      }
      scales[r] = scale;
      scales[kCodeRows + r] = scale * static_cast<float>(sum);
    }
  }
}

template <DType D>
void expand_codes_of(const uint8_t* panel, int64_t cols, int64_t k_begin, int64_t k_count,
                     uint8_t* out) {
  constexpr PanelLayout kLayout = panel_layout(D);
  for (int64_t k = k_begin; k < k_begin + k_count; k += kGroup, out += kWeightGroupBytes) {
    const uint8_t* low = panel + k / kGroup * kLayout.group_bytes() + kLayout.scale_bytes;
    auto* affine = reinterpret_cast<float*>(out + kGroup * kPanel);
    for (int half = 0; half < 2; ++half) {
      const Affine a = affine_at<D>(panel, cols, k, half);
      store(affine + 8 * half, a.scale);
      // Bytes are used signed, around their offset.
      store(affine + kPanel + 8 * half, D == DType::kQ8_0 ? splat(0.0f) : a.minimum);
      for (int word = 0; word < 4; ++word) {
        W8 even, odd;
        if constexpr (D == DType::kQ8_0) {
          const uint8_t* from = low + 2 * word * 64 + 32 * half;
          even = load_words(from) ^ words(0x80808080u);
          odd = load_words(from + 64) ^ words(0x80808080u);
        } else {
          const W8 v = load_words(low + word * 64 + 32 * half);
          even = v & 0x0f0f0f0fu;
          odd = v >> 4 & 0x0f0f0f0fu;
        }
        std::memcpy(out + 2 * word * 64 + 32 * half, &even, 32);
        std::memcpy(out + (2 * word + 1) * 64 + 32 * half, &odd, 32);
      }
    }
  }
}

void expand_codes(DType dtype, const void* panel, int64_t cols, int64_t k_begin, int64_t k_count,
                  uint8_t* out) {
  const auto* p = static_cast<const uint8_t*>(panel);
  switch (dtype) {
    case DType::kQ4_0:
      return expand_codes_of<DType::kQ4_0>(p, cols, k_begin, k_count, out);
    case DType::kQ4_1:
      return expand_codes_of<DType::kQ4_1>(p, cols, k_begin, k_count, out);
    case DType::kQ4_K:
      return expand_codes_of<DType::kQ4_K>(p, cols, k_begin, k_count, out);
    default:
      return expand_codes_of<DType::kQ8_0>(p, cols, k_begin, k_count, out);
  }
}

// sums[r][half] of one group: lanes are the panel's rows.
template <bool Bytes, int Rows>
ALIGNPRO_INLINE void group_sums(const uint8_t* x, const uint8_t* w, I8 sums[Rows][2]) {
#if defined(__AVX2__)
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i acc[Rows][2];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
// Unrolled, its loads are hoisted and the sums spilled.
#pragma GCC unroll 1
  for (int word = 0; word < 8; ++word) {
    __m256i code[2], magnitude[2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      code[half] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + word * 64 + 32 * half));
      magnitude[half] = Bytes ? _mm256_abs_epi8(code[half]) : code[half];
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      int32_t four;
      std::memcpy(&four, x + (word * kCodeRows + r) * 4, 4);
      const __m256i xs = _mm256_set1_epi32(four);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        if (Bytes) {
          const __m256i pairs =
              _mm256_maddubs_epi16(magnitude[half], _mm256_sign_epi8(xs, code[half]));
          acc[r][half] = _mm256_add_epi32(acc[r][half], _mm256_madd_epi16(pairs, ones));
        } else {  // 8 words of 15 * 127 * 2 stay below 2^15
          acc[r][half] = _mm256_add_epi16(acc[r][half], _mm256_maddubs_epi16(code[half], xs));
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256i sum = Bytes ? acc[r][half] : _mm256_madd_epi16(acc[r][half], ones);
      std::memcpy(&sums[r][half], &sum, sizeof(sum));
    }
  }
#else
  for (int r = 0; r < Rows; ++r) {
    for (int n = 0; n < kPanel; ++n) {
      int32_t sum = 0;
      for (int word = 0; word < 8; ++word) {
        for (int j = 0; j < 4; ++j) {
          const uint8_t code = w[word * 64 + 4 * n + j];
          const int32_t weight = Bytes ? static_cast<int8_t>(code) : code;
          sum += weight * static_cast<int8_t>(x[(word * kCodeRows + r) * 4 + j]);
        }
      }
      sums[r][n / 8][n % 8] = sum;
    }
  }
#endif
}

template <bool Bytes, int Rows>
void int8_tile(int64_t groups, const uint8_t* x, const uint8_t* w, float* c, bool accumulate) {
  F8 total[Rows][2];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      total[r][h] = accumulate ? load(c + r * kPanel + 8 * h) : splat(0.0f);
    }
  }
  for (int64_t g = 0; g < groups; ++g, x += kCodeGroupBytes, w += kWeightGroupBytes) {
    I8 sums[Rows][2];
    group_sums<Bytes, Rows>(x, w, sums);
    const auto* affine = reinterpret_cast<const float*>(w + kGroup * kPanel);
    const auto* scales = reinterpret_cast<const float*>(x + kGroup * kCodeRows);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const F8 product = __builtin_convertvector(sums[r][h], F8) * splat(scales[r]);
        total[r][h] = fma(product, load(affine + 8 * h), total[r][h]);
        if (!Bytes) {
          total[r][h] =
              fma(splat(scales[kCodeRows + r]), load(affine + kPanel + 8 * h), total[r][h]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) store(c + r * kPanel + 8 * h, total[r][h]);
  }
}

template <bool Bytes>
void gemm_int8_of(int64_t rows, int64_t groups, const uint8_t* x, int64_t x_stride,
                  const uint8_t* w, float* c, bool accumulate) {
  for (; rows >= kCodeRows; rows -= kCodeRows, x += x_stride, c += kCodeRows * kPanel) {
    int8_tile<Bytes, kCodeRows>(groups, x, w, c, accumulate);
  }
  switch (rows) {
    case 1:
      return int8_tile<Bytes, 1>(groups, x, w, c, accumulate);
    case 2:
      return int8_tile<Bytes, 2>(groups, x, w, c, accumulate);
    case 3:
      return int8_tile<Bytes, 3>(groups, x, w, c, accumulate);
    default:
      return;
  }
}

void gemm_int8(DType dtype, int64_t rows, int64_t groups, const uint8_t* x, int64_t x_stride,
               const uint8_t* w, float* c, bool accumulate) {
  if (dtype == DType::kQ8_0) {
    gemm_int8_of<true>(rows, groups, x, x_stride, w, c, accumulate);
  } else {
    gemm_int8_of<false>(rows, groups, x, x_stride, w, c, accumulate);
  }
}
