// Part of kernels-inl.h: panels in storage formats (panel_layout.h), expanded tile by tile for the
// products or in registers for a single row. Both use the same expression for a weight, so a row's
// bits do not tell which of them ran.

typedef uint32_t W8 __attribute__((vector_size(32)));
typedef uint32_t W8u __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint16_t H8 __attribute__((vector_size(16)));
typedef uint8_t B8 __attribute__((vector_size(8)));

ALIGNPRO_INLINE W8 load_words(const uint8_t* p) { return *reinterpret_cast<const W8u*>(p); }
ALIGNPRO_INLINE W8 words(uint32_t x) { return W8{x, x, x, x, x, x, x, x}; }
// Of integers below 2^31.
ALIGNPRO_INLINE F8 to_floats(W8 v) {
  I8 i;
  std::memcpy(&i, &v, sizeof(i));
  return __builtin_convertvector(i, F8);
}

// Eight half-precision floats, exactly.
ALIGNPRO_INLINE F8 load_halves(const uint8_t* p) {
#if defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  H8 bits;
  std::memcpy(&bits, p, sizeof(bits));
  const W8 wide = __builtin_convertvector(bits, W8);
  const W8 magnitude = wide & 0x7fffu;
  // A subnormal goes through an integer, since it would be flushed where subnormals are.
  const F8 small = to_floats(magnitude) * splat(0x1p-24f);
  W8 result;
  std::memcpy(&result, &small, sizeof(result));
  const W8 rebias = magnitude >= 0x7c00u ? words(224u << 23) : words(112u << 23);
  result = magnitude < 0x400u ? result : (magnitude << 13) + rebias;
  result |= (wide & 0x8000u) << 16;
  F8 out;
  std::memcpy(&out, &result, sizeof(out));
  return out;
#endif
}

ALIGNPRO_INLINE F8 load_brain_halves(const uint8_t* p) {
  H8 bits;
  std::memcpy(&bits, p, sizeof(bits));
  const W8 wide = __builtin_convertvector(bits, W8) << 16;
  F8 out;
  std::memcpy(&out, &wide, sizeof(out));
  return out;
}

ALIGNPRO_INLINE F8 load_bytes(const uint8_t* p) {
  B8 bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return to_floats(__builtin_convertvector(bytes, W8));
}

ALIGNPRO_INLINE F8 load_signed_bytes(const uint8_t* p) {
  typedef int8_t S8 __attribute__((vector_size(8)));
  S8 bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(bytes, F8);
}

constexpr int kBits(DType dtype) {
  switch (dtype) {
    case DType::kQ8_0:
      return 8;
    case DType::kQ6_K:
      return 6;
    case DType::kQ5_0:
    case DType::kQ5_1:
    case DType::kQ5_K:
      return 5;
    default:
      return 4;
  }
}

constexpr bool is_k_format(DType dtype) {
  return dtype == DType::kQ4_K || dtype == DType::kQ5_K || dtype == DType::kQ6_K;
}

// Columns that share a scale.
constexpr int64_t scale_columns(DType dtype) { return dtype == DType::kQ6_K ? 16 : kGroup; }

struct Affine {
  F8 scale, minimum;
};

// Of eight rows (`half` of the panel) from column `column` on.
template <DType D>
ALIGNPRO_INLINE Affine affine_at(const uint8_t* panel, int64_t cols, int64_t column, int half) {
  constexpr PanelLayout kLayout = panel_layout(D);
  const int64_t group = column / kGroup;
  const uint8_t* at = panel + group * kLayout.group_bytes();
  if constexpr (is_k_format(D)) {
    const uint8_t* factors = panel + cols / kGroup * kLayout.group_bytes() +
                             group / kGroupsPerFactor * kLayout.factor_bytes;
    const F8 factor = load_halves(factors + 16 * half);
    if constexpr (D == DType::kQ6_K) {
      const F8 scale = factor * load_signed_bytes(at + column % kGroup / 16 * 16 + 8 * half);
      return {scale, scale * splat(-32.0f)};
    } else {
      const F8 minimum = load_halves(factors + 32 + 16 * half) * load_bytes(at + 16 + 8 * half);
      return {factor * load_bytes(at + 8 * half), -minimum};
    }
  } else {
    const F8 scale = load_halves(at + 16 * half);
    if constexpr (D == DType::kQ4_1 || D == DType::kQ5_1) {
      return {scale, load_halves(at + 32 + 16 * half)};
    } else {
      constexpr float kOffset = D == DType::kQ8_0 ? -128.0f : D == DType::kQ5_0 ? -16.0f : -8.0f;
      return {scale, scale * splat(kOffset)};
    }
  }
}

// A code is converted where it stands in its word, times 2^(width j); the scale takes the power
// back. Both steps are exact and save the shift. Four fields: nibbles of the upper half of a word
// are shifted down together.
constexpr int kFields(DType dtype) { return kBits(dtype) == 8 || kBits(dtype) == 4 ? 4 : 1; }
constexpr int kFieldBits(DType dtype) { return kBits(dtype) == 8 ? 8 : 4; }

template <DType D>
struct ScaledAffine {
  F8 scale[kFields(D)];
  F8 minimum;

  ALIGNPRO_INLINE void set(const Affine& a) {
    for (int j = 0; j < kFields(D); ++j) {
      // A fourth byte is shifted down: it reaches the sign bit.
      const int bits = kBits(D) == 8 && j == 3 ? 0 : kFieldBits(D) * j;
      scale[j] = a.scale * splat(1.0f / static_cast<float>(1u << bits));
    }
    minimum = a.minimum;
  }
};

// Calls fn(j, weights) for eight rows and columns column + j, j < 8; column is a multiple of 8.
template <DType D, typename Fn>
ALIGNPRO_INLINE void for_weights(const uint8_t* panel, int64_t column, int half,
                                 const ScaledAffine<D>& a, const Fn& fn) {
  constexpr PanelLayout kLayout = panel_layout(D);
  const int64_t within = column % kGroup;
  const uint8_t* high = panel + column / kGroup * kLayout.group_bytes() + kLayout.scale_bytes;
  const uint8_t* low = high + kLayout.high_bytes;
  if constexpr (kBits(D) == 8) {
    const uint8_t* from = low + within / 4 * 64 + 32 * half;
    const W8 v[2] = {load_words(from), load_words(from + 64)};
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const int byte = j / 2;
      const W8 code = byte < 3 ? v[j % 2] & words(255u << (8 * byte)) : v[j % 2] >> 24;
      fn(j, fma(to_floats(code), a.scale[byte], a.minimum));
    }
  } else {
    const W8 v = load_words(low + within / 8 * 64 + 32 * half);
    if constexpr (kBits(D) == 4) {
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        const W8 code = (j < 4 ? v : v >> 16) & words(15u << (4 * (j % 4)));
        fn(j, fma(to_floats(code), a.scale[j % 4], a.minimum));
      }
    } else {
      constexpr int kExtra = kBits(D) - 4;
      const W8 extra = load_words(high + (kExtra == 2 ? within / 16 * 64 : 0) + 32 * half);
      const int64_t first = kExtra * (within % (32 / kExtra));
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        const W8 top =
            extra >> static_cast<uint32_t>(first + kExtra * j) & words((1u << kExtra) - 1);
        fn(j, fma(to_floats((v >> (4 * j) & words(15)) | top << 4), a.scale[0], a.minimum));
      }
    }
  }
}

template <DType D>
void expand_quantized(const uint8_t* panel, int64_t cols, int64_t k_begin, int64_t k_count,
                      float* out) {
  constexpr int64_t kSpan = scale_columns(D);
  for (int64_t k = k_begin; k < k_begin + k_count;) {
    int64_t end = (k / kSpan + 1) * kSpan;
    if (end > k_begin + k_count) end = k_begin + k_count;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      ScaledAffine<D> a;
      a.set(affine_at<D>(panel, cols, k, half));
      for (int64_t column = k; column < end; column += 8) {
        float* to = out + (column - k_begin) * kPanel + 8 * half;
        for_weights<D>(panel, column, half, a, [&](int j, F8 w) __attribute__((always_inline)) {
          store(to + j * kPanel, w);
        });
      }
    }
    k = end;
  }
  // What the next call reads, while the product runs on this.
  const int64_t bytes = k_count / kGroup * panel_layout(D).group_bytes();
  const uint8_t* next = panel + (k_begin + k_count) / kGroup * panel_layout(D).group_bytes();
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(next + at);
}

// Value `i` and the seven after it.
template <DType D>
ALIGNPRO_INLINE F8 load_plain(const uint8_t* p, int64_t i) {
  if constexpr (D == DType::kF32) return load(reinterpret_cast<const float*>(p) + i);
  return D == DType::kF16 ? load_halves(p + 2 * i) : load_brain_halves(p + 2 * i);
}

template <DType D>
void expand_plain(const uint8_t* panel, int64_t k_begin, int64_t k_count, float* out) {
  const uint8_t* from = panel + k_begin * kPanel * 2;
  for (int64_t i = 0; i < k_count * kPanel; i += 8) store(out + i, load_plain<D>(from, i));
  const uint8_t* next = from + k_count * kPanel * 2;
  for (int64_t at = 0; at < k_count * kPanel * 2; at += 64) __builtin_prefetch(next + at);
}

void expand_panel(DType dtype, const void* panel, int64_t cols, int64_t k_begin, int64_t k_count,
                  float* out) {
  const auto* p = static_cast<const uint8_t*>(panel);
  switch (dtype) {
    case DType::kF32:
      std::memcpy(out, p + k_begin * kPanel * 4, static_cast<size_t>(k_count * kPanel) * 4);
      return;
    case DType::kF16:
      return expand_plain<DType::kF16>(p, k_begin, k_count, out);
    case DType::kBF16:
      return expand_plain<DType::kBF16>(p, k_begin, k_count, out);
    case DType::kQ8_0:
      return expand_quantized<DType::kQ8_0>(p, cols, k_begin, k_count, out);
    case DType::kQ4_0:
      return expand_quantized<DType::kQ4_0>(p, cols, k_begin, k_count, out);
    case DType::kQ4_1:
      return expand_quantized<DType::kQ4_1>(p, cols, k_begin, k_count, out);
    case DType::kQ5_0:
      return expand_quantized<DType::kQ5_0>(p, cols, k_begin, k_count, out);
    case DType::kQ5_1:
      return expand_quantized<DType::kQ5_1>(p, cols, k_begin, k_count, out);
    case DType::kQ4_K:
      return expand_quantized<DType::kQ4_K>(p, cols, k_begin, k_count, out);
    case DType::kQ5_K:
      return expand_quantized<DType::kQ5_K>(p, cols, k_begin, k_count, out);
    case DType::kQ6_K:
      return expand_quantized<DType::kQ6_K>(p, cols, k_begin, k_count, out);
  }
}

// One row times Panels panels, `stride` bytes apart. Two panels are four chains of multiply-adds,
// which hide their latency. out [Panels][16]: block by block as gemm_panel sums.
template <DType D, int Panels>
void gemv_quantized(const uint8_t* panel, int64_t stride, int64_t cols, const float* x,
                    float* out) {
  constexpr int64_t kSpan = scale_columns(D);
  F8 total[Panels][2] = {};
  for (int64_t k_begin = 0; k_begin < cols; k_begin += kContract) {
    const int64_t k_end = k_begin + kContract < cols ? k_begin + kContract : cols;
    F8 sum[Panels][2];
#pragma GCC unroll 4
    for (int i = 0; i < 2 * Panels; ++i) sum[i / 2][i % 2] = splat(0.0f);
    for (int64_t k = k_begin; k < k_end; k += kSpan) {
      ScaledAffine<D> a[Panels][2];
#pragma GCC unroll 4
      for (int i = 0; i < 2 * Panels; ++i) {
        a[i / 2][i % 2].set(affine_at<D>(panel + i / 2 * stride, cols, k, i % 2));
      }
      for (int64_t column = k; column < k + kSpan; column += 8) {
#pragma GCC unroll 4
        for (int i = 0; i < 2 * Panels; ++i) {
          for_weights<D>(panel + i / 2 * stride, column, i % 2, a[i / 2][i % 2],
                         [&](int j, F8 w) __attribute__((always_inline)) {
                           F8& s = sum[i / 2][i % 2];
                           s = fma(splat(x[column + j]), w, s);
                         });
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 2 * Panels; ++i) {
      F8& t = total[i / 2][i % 2];
      t = k_begin > 0 ? t + sum[i / 2][i % 2] : sum[i / 2][i % 2];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 2 * Panels; ++i) store(out + 8 * i, total[i / 2][i % 2]);
}

template <DType D, int Panels>
void gemv_plain(const uint8_t* panel, int64_t stride, int64_t cols, const float* x, float* out) {
  F8 total[Panels][2] = {};
  for (int64_t k_begin = 0; k_begin < cols; k_begin += kContract) {
    const int64_t k_end = k_begin + kContract < cols ? k_begin + kContract : cols;
    F8 sum[Panels][2];
#pragma GCC unroll 4
    for (int i = 0; i < 2 * Panels; ++i) sum[i / 2][i % 2] = splat(0.0f);
    for (int64_t k = k_begin; k < k_end; ++k) {
      const F8 xk = splat(x[k]);
#pragma GCC unroll 4
      for (int i = 0; i < 2 * Panels; ++i) {
        const F8 w = load_plain<D>(panel + i / 2 * stride, k * kPanel + i % 2 * 8);
        sum[i / 2][i % 2] = fma(xk, w, sum[i / 2][i % 2]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 2 * Panels; ++i) {
      F8& t = total[i / 2][i % 2];
      t = k_begin > 0 ? t + sum[i / 2][i % 2] : sum[i / 2][i % 2];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 2 * Panels; ++i) store(out + 8 * i, total[i / 2][i % 2]);
}

template <int Panels>
void gemv_by_type(DType dtype, const uint8_t* p, int64_t stride, int64_t cols, const float* x,
                  float* out) {
  switch (dtype) {
    case DType::kF32:
      return gemv_plain<DType::kF32, Panels>(p, stride, cols, x, out);
    case DType::kF16:
      return gemv_plain<DType::kF16, Panels>(p, stride, cols, x, out);
    case DType::kBF16:
      return gemv_plain<DType::kBF16, Panels>(p, stride, cols, x, out);
    case DType::kQ8_0:
      return gemv_quantized<DType::kQ8_0, Panels>(p, stride, cols, x, out);
    case DType::kQ4_0:
      return gemv_quantized<DType::kQ4_0, Panels>(p, stride, cols, x, out);
    case DType::kQ4_1:
      return gemv_quantized<DType::kQ4_1, Panels>(p, stride, cols, x, out);
    case DType::kQ5_0:
      return gemv_quantized<DType::kQ5_0, Panels>(p, stride, cols, x, out);
    case DType::kQ5_1:
      return gemv_quantized<DType::kQ5_1, Panels>(p, stride, cols, x, out);
    case DType::kQ4_K:
      return gemv_quantized<DType::kQ4_K, Panels>(p, stride, cols, x, out);
    case DType::kQ5_K:
      return gemv_quantized<DType::kQ5_K, Panels>(p, stride, cols, x, out);
    case DType::kQ6_K:
      return gemv_quantized<DType::kQ6_K, Panels>(p, stride, cols, x, out);
  }
}

void gemv_panels(DType dtype, const void* panel, int64_t stride, int64_t panels, int64_t cols,
                 const float* x, float* out) {
  const auto* p = static_cast<const uint8_t*>(panel);
  for (; panels >= 2; panels -= 2, p += 2 * stride, out += 2 * kPanel) {
    gemv_by_type<2>(dtype, p, stride, cols, x, out);
  }
  if (panels == 1) gemv_by_type<1>(dtype, p, stride, cols, x, out);
}
