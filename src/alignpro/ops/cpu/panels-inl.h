// Part of kernels-inl.h: panels in storage formats (panel_layout.h), expanded tile by tile for the
// products or in registers for a single row. Both use the same expression for a weight, so a row's
// bits do not tell which of them ran.

ALIGNPRO_INLINE Words load_words(const uint8_t* p) { return *reinterpret_cast<const WordsU*>(p); }
// Of integers below 2^31.
ALIGNPRO_INLINE Wide to_floats(Words v) {
  WideInts i;
  std::memcpy(&i, &v, sizeof(i));
  return __builtin_convertvector(i, Wide);
}

// Half-precision floats, exactly.
ALIGNPRO_INLINE Wide load_halves(const uint8_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(ALIGNPRO_NEON)
  return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
#else
  Halves bits;
  std::memcpy(&bits, p, sizeof(bits));
  const Words wide = __builtin_convertvector(bits, Words);
  const Words magnitude = wide & 0x7fffu;
  // A subnormal goes through an integer, since it would be flushed where subnormals are.
  const Wide small = to_floats(magnitude) * 0x1p-24f;
  Words result;
  std::memcpy(&result, &small, sizeof(result));
  const Words zero = {};
  const Words rebias = magnitude >= 0x7c00u ? zero + (224u << 23) : zero + (112u << 23);
  result = magnitude < 0x400u ? result : (magnitude << 13) + rebias;
  result |= (wide & 0x8000u) << 16;
  Wide out;
  std::memcpy(&out, &result, sizeof(out));
  return out;
#endif
}

ALIGNPRO_INLINE Wide load_brain_halves(const uint8_t* p) {
  Halves bits;
  std::memcpy(&bits, p, sizeof(bits));
  const Words wide = __builtin_convertvector(bits, Words) << 16;
  Wide out;
  std::memcpy(&out, &wide, sizeof(out));
  return out;
}

template <typename Byte>
ALIGNPRO_INLINE Wide load_bytes(const uint8_t* p) {
#if defined(__AVX2__)  // by name: the compiler's own widening goes byte by byte
  constexpr bool kSigned = static_cast<Byte>(-1) < 0;
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(kSigned ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#else
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(kSigned ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#endif
#else
  typedef Byte Bytes __attribute__((vector_size(kLanes)));
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(__builtin_convertvector(bytes, WideInts), Wide);
#endif
}

constexpr int kBits(DType dtype) {
  switch (dtype) {
    case DType::kQ8_0:
    case DType::kIQ4_XS:
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
  return dtype == DType::kQ4_K || dtype == DType::kQ5_K || dtype == DType::kQ6_K ||
         dtype == DType::kQ2_K || dtype == DType::kIQ4_XS;
}

// Columns that share a scale.
constexpr int64_t scale_columns(DType dtype) {
  return dtype == DType::kQ6_K || dtype == DType::kQ2_K ? 16 : kGroup;
}
constexpr int scales_of_group(DType dtype) {
  return static_cast<int>(kGroup / scale_columns(dtype));
}

struct Affine {
  Wide scale, minimum;
};

// Of the panel's rows [kLanes part, kLanes (part + 1)) from column `column` on.
template <DType D>
ALIGNPRO_INLINE Affine affine_at(const uint8_t* panel, int64_t cols, int64_t column, int part) {
  constexpr PanelLayout kLayout = panel_layout(D);
  const int64_t group = column / kGroup;
  const uint8_t* at = panel + group * kLayout.group_bytes();
  if constexpr (is_k_format(D)) {
    const uint8_t* factors = panel + cols / kGroup * kLayout.group_bytes() +
                             group / kGroupsPerFactor * kLayout.factor_bytes;
    const Wide factor = load_halves(factors + 2 * kLanes * part);
    if constexpr (D == DType::kQ6_K) {
      const uint8_t* scales = at + column % kGroup / 16 * 16 + kLanes * part;
      const Wide scale = factor * load_bytes<int8_t>(scales);
      return {scale, scale * -32.0f};
    } else if constexpr (D == DType::kIQ4_XS) {
      const Wide scale = factor * load_bytes<int8_t>(at + kLanes * part);
      return {scale, scale * -128.0f};
    } else {
      const uint8_t* scales = at + kLanes * part;
      if constexpr (D == DType::kQ2_K) scales += column % kGroup / 16 * 32;
      const Wide minimum =
          load_halves(factors + 32 + 2 * kLanes * part) * load_bytes<uint8_t>(scales + 16);
      return {factor * load_bytes<uint8_t>(scales), -minimum};
    }
  } else {
    const Wide scale = load_halves(at + 2 * kLanes * part);
    if constexpr (D == DType::kQ4_1 || D == DType::kQ5_1) {
      return {scale, load_halves(at + 32 + 2 * kLanes * part)};
    } else {
      constexpr float kOffset = D == DType::kQ8_0 ? -128.0f : D == DType::kQ5_0 ? -16.0f : -8.0f;
      return {scale, scale * kOffset};
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
  Wide scale[kFields(D)];
  Wide minimum;

  ALIGNPRO_INLINE void set(const Affine& a) {
    for (int j = 0; j < kFields(D); ++j) {
      // A fourth byte is shifted down: it reaches the sign bit.
      const int bits = kBits(D) == 8 && j == 3 ? 0 : kFieldBits(D) * j;
      scale[j] = a.scale * (1.0f / static_cast<float>(1u << bits));
    }
    minimum = a.minimum;
  }
};

// A part's weights of column `column` + j, j < 8; `column` is a multiple of 8.
template <DType D>
ALIGNPRO_INLINE Wide weights_at(const uint8_t* panel, int64_t column, int part, int j,
                                const ScaledAffine<D>& a) {
  constexpr PanelLayout kLayout = panel_layout(D);
  const int64_t within = column % kGroup;
  const uint8_t* high = panel + column / kGroup * kLayout.group_bytes() + kLayout.scale_bytes;
  const uint8_t* low = high + kLayout.high_bytes + 4 * kLanes * part;
  if constexpr (kBits(D) == 8) {
    const Words v = load_words(low + within / 4 * 64 + j % 2 * 64);
    const int byte = j / 2;
    return fma(to_floats(byte < 3 ? v & (255u << (8 * byte)) : v >> 24), a.scale[byte], a.minimum);
  } else if constexpr (kBits(D) == 4) {
    const Words v = load_words(low + within / 8 * 64);
    const Words code = (j < 4 ? v : v >> 16) & (15u << (4 * (j % 4)));
    return fma(to_floats(code), a.scale[j % 4], a.minimum);
  } else {
    constexpr int kExtra = kBits(D) - 4;
    const Words v = load_words(low + within / 8 * 64);
    const int64_t at = kExtra * within / 4;  // of the words of these columns, in bits
    const Words extra = load_words(high + at / 8 * 64 + 4 * kLanes * part);
    const Words top = extra >> static_cast<uint32_t>(at % 8 + j / 2 * 8 + kExtra * (j % 2)) &
                      ((1u << kExtra) - 1);
    return fma(to_floats((v >> (4 * j) & 15u) | top << 4), a.scale[0], a.minimum);
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
    for (int part = 0; part < kParts; ++part) {
      ScaledAffine<D> a;
      a.set(affine_at<D>(panel, cols, k, part));
      for (int64_t column = k; column < end; column += 8) {
        float* to = out + (column - k_begin) * kPanel + kLanes * part;
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
          store_wide(to + j * kPanel, weights_at<D>(panel, column, part, j, a));
        }
      }
    }
    k = end;
  }
  // What the next call reads, while the product runs on this.
  const int64_t bytes = k_count / kGroup * panel_layout(D).group_bytes();
  const uint8_t* next = panel + (k_begin + k_count) / kGroup * panel_layout(D).group_bytes();
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(next + at);
}

// kLanes values from value `i` on.
template <DType D>
ALIGNPRO_INLINE Wide load_plain(const uint8_t* p, int64_t i) {
  if constexpr (D == DType::kF32) return load_wide(reinterpret_cast<const float*>(p) + i);
  return D == DType::kF16 ? load_halves(p + 2 * i) : load_brain_halves(p + 2 * i);
}

template <DType D>
void expand_plain(const uint8_t* panel, int64_t k_begin, int64_t k_count, float* out) {
  const uint8_t* from = panel + k_begin * kPanel * 2;
  for (int64_t i = 0; i < k_count * kPanel; i += kLanes) {
    store_wide(out + i, load_plain<D>(from, i));
  }
  const uint8_t* next = from + k_count * kPanel * 2;
  for (int64_t at = 0; at < k_count * kPanel * 2; at += 64) __builtin_prefetch(next + at);
}

// fn(TypeConstant<dtype>()).
template <DType kType>
struct TypeConstant {
  static constexpr DType kValue = kType;
};
template <typename Fn>
ALIGNPRO_INLINE void with_dtype(DType dtype, const Fn& fn) {
  switch (dtype) {
    case DType::kF32:
      return fn(TypeConstant<DType::kF32>());
    case DType::kF16:
      return fn(TypeConstant<DType::kF16>());
    case DType::kBF16:
      return fn(TypeConstant<DType::kBF16>());
    case DType::kQ8_0:
      return fn(TypeConstant<DType::kQ8_0>());
    case DType::kQ4_0:
      return fn(TypeConstant<DType::kQ4_0>());
    case DType::kQ4_1:
      return fn(TypeConstant<DType::kQ4_1>());
    case DType::kQ5_0:
      return fn(TypeConstant<DType::kQ5_0>());
    case DType::kQ5_1:
      return fn(TypeConstant<DType::kQ5_1>());
    case DType::kQ4_K:
      return fn(TypeConstant<DType::kQ4_K>());
    case DType::kQ5_K:
      return fn(TypeConstant<DType::kQ5_K>());
    case DType::kQ6_K:
      return fn(TypeConstant<DType::kQ6_K>());
    case DType::kQ2_K:
      return fn(TypeConstant<DType::kQ2_K>());
    case DType::kIQ4_XS:
      return fn(TypeConstant<DType::kIQ4_XS>());
    case DType::kQ3_K:
    case DType::kIQ4_NL:
      break;  // no panel's type: see panel_type
  }
}

void expand_panel(DType dtype, const void* panel, int64_t cols, int64_t k_begin, int64_t k_count,
                  float* out) {
  const auto* p = static_cast<const uint8_t*>(panel);
  with_dtype(dtype, [&](auto type) __attribute__((always_inline)) {
    constexpr DType kType = decltype(type)::kValue;
    if constexpr (kType == DType::kF32) {
      std::memcpy(out, p + k_begin * kPanel * 4, static_cast<size_t>(k_count * kPanel) * 4);
    } else if constexpr (is_quantized(kType)) {
      expand_quantized<kType>(p, cols, k_begin, k_count, out);
    } else {
      expand_plain<kType>(p, k_begin, k_count, out);
    }
  });
}

// A few rows times Panels panels, `stride` bytes apart: out [Panels][Rows][16], of which panels lie
// out_panel floats apart, block by block as gemm_panel sums. add(column, sums) adds columns
// [column, column + Span) to the chains [Panels][Rows][kParts].
template <int64_t Span, int Rows, int Panels, typename Add>
ALIGNPRO_INLINE void stream_blocks(int64_t cols, float* out, int64_t out_panel, const Add& add) {
  constexpr int kSums = Panels * Rows * kParts;
  Wide total[kSums] = {};
  for (int64_t k_begin = 0; k_begin < cols; k_begin += kContract) {
    const int64_t k_end = k_begin + kContract < cols ? k_begin + kContract : cols;
    Wide sum[kSums] = {};
    for (int64_t k = k_begin; k < k_end; k += Span) add(k, sum);
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) total[i] = k_begin > 0 ? total[i] + sum[i] : sum[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kSums; ++i) {
    constexpr int kOfPanel = Rows * kParts;
    store_wide(out + i / kOfPanel * out_panel + i % kOfPanel * kLanes, total[i]);
  }
}

// Adds one column, whose weights are weight(panel, part). Chains lie inside: one after another they
// would each wait for themselves.
template <int Rows, int Panels, typename Weight>
ALIGNPRO_INLINE void stream_column(const float* x, int64_t x_stride, Wide* sum,
                                   const Weight& weight) {
  Wide xk[Rows];
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m) xk[m] = splat_wide(x[m * x_stride]);
#pragma GCC unroll 4
  for (int i = 0; i < Panels * kParts; ++i) {
    const Wide w = weight(i / kParts, i % kParts);
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) {
      Wide& to = sum[(i / kParts * Rows + m) * kParts + i % kParts];
      to = fma(xk[m], w, to);
    }
  }
}

template <DType D, int Rows, int Panels>
void stream_quantized(const uint8_t* panel, int64_t stride, int64_t cols, const float* x,
                      int64_t x_stride, float* out, int64_t out_panel) {
  constexpr int64_t kSpan = scale_columns(D);
  const auto add = [&](int64_t k, Wide* sum) __attribute__((always_inline)) {
    // The panels after these, at the same columns: short as they are, no hardware prefetcher gets
    // there in time.
    for (int i = 0; i < Panels; ++i) {
      constexpr int64_t kBytes = panel_layout(D).group_bytes();
      const uint8_t* next = panel + (Panels + i) * stride + k / kGroup * kBytes;
      for (int64_t at = 0; at < kBytes; at += 64) __builtin_prefetch(next + at);
    }
    ScaledAffine<D> a[Panels * kParts];
#pragma GCC unroll 4
    for (int i = 0; i < Panels * kParts; ++i) {
      a[i].set(affine_at<D>(panel + i / kParts * stride, cols, k, i % kParts));
    }
    for (int64_t column = k; column < k + kSpan; column += 8) {
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        stream_column<Rows, Panels>(
            x + column + j, x_stride, sum, [&](int p, int part) __attribute__((always_inline)) {
              return weights_at<D>(panel + p * stride, column, part, j, a[p * kParts + part]);
            });
      }
    }
  };
  stream_blocks<kSpan, Rows, Panels>(cols, out, out_panel, add);
}

template <DType D, int Rows, int Panels>
void stream_plain(const uint8_t* panel, int64_t stride, int64_t cols, const float* x,
                  int64_t x_stride, float* out, int64_t out_panel) {
  const auto add = [&](int64_t k, Wide* sum) __attribute__((always_inline)) {
    stream_column<Rows, Panels>(
        x + k, x_stride, sum, [&](int p, int part) __attribute__((always_inline)) {
          return load_plain<D>(panel + p * stride, k * kPanel + part * kLanes);
        });
  };
  stream_blocks<1, Rows, Panels>(cols, out, out_panel, add);
}

template <int Rows, int Panels>
void stream_by_type(DType dtype, const uint8_t* p, int64_t stride, int64_t cols, const float* x,
                    int64_t x_stride, float* out, int64_t out_panel) {
  with_dtype(dtype, [&](auto type) __attribute__((always_inline)) {
    constexpr DType kType = decltype(type)::kValue;
    if constexpr (is_quantized(kType)) {
      stream_quantized<kType, Rows, Panels>(p, stride, cols, x, x_stride, out, out_panel);
    } else {
      stream_plain<kType, Rows, Panels>(p, stride, cols, x, x_stride, out, out_panel);
    }
  });
}

// Rows x panels x parts are the chains of multiply-adds: eight hide their latency where two are
// begun a cycle, and what registers hold bounds them. Few rows wait for memory before.
constexpr int stream_at_once(int rows) {
  if (kParts > 2) return 1;
  if (kParts == 2) return rows == 1 ? 2 : 1;
  return rows <= 2 ? 4 : rows <= 6 ? 2 : 1;
}

template <int Rows>
void stream_rows(DType dtype, const uint8_t* p, int64_t stride, int64_t panels, int64_t cols,
                 const float* x, int64_t x_stride, float* out, int64_t out_panel) {
  constexpr int kAtOnce = stream_at_once(Rows);
  for (; panels >= kAtOnce; panels -= kAtOnce, p += kAtOnce * stride, out += kAtOnce * out_panel) {
    stream_by_type<Rows, kAtOnce>(dtype, p, stride, cols, x, x_stride, out, out_panel);
  }
  for (; kAtOnce > 1 && panels > 0; --panels, p += stride, out += out_panel) {
    stream_by_type<Rows, 1>(dtype, p, stride, cols, x, x_stride, out, out_panel);
  }
}

// More rows than registers hold go in passes of about equally many, of which the later ones find
// the panels in the cache.
void stream_panels(DType dtype, const void* panel, int64_t stride, int64_t panels, int64_t cols,
                   int64_t rows, const float* x, int64_t x_stride, float* out) {
  constexpr int64_t kMost = kParts == 1 ? 8 : 4;
  const auto* p = static_cast<const uint8_t*>(panel);
  const int64_t passes = (rows + kMost - 1) / kMost;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t first = rows * pass / passes, live = rows * (pass + 1) / passes - first;
    with_count<kMost>(live, [&](auto count) __attribute__((always_inline)) {
      stream_rows<decltype(count)::kValue>(dtype, p, stride, panels, cols, x + first * x_stride,
                                           x_stride, out + first * kPanel, rows * kPanel);
    });
  }
}

// In passes of four, two are dearer than to expand the panel for a packed tile, but less dear than
// for one and a short one.
bool prefers_stream(int64_t rows) {
  return kParts == 1 ? rows <= kQuantizedGemvRows : rows <= 4 || (rows > kRowTile && rows <= 8);
}
