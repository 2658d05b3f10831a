// Long because all of an instruction set's kernels are one translation unit: the table at the end.
// The kernels' bodies, compiled once for every instruction set (ALIGNPRO_ISA names the namespace).
//
// Invariants
// * Everything here is in an anonymous namespace, and no inline function of the standard library is
//   called: the linker can never merge a body built for AVX2 into a baseline caller.
// * A vector is 8 floats on every path; lanes and reduction trees are the same, so each path is
//   deterministic on its own. Only FMA (one rounding instead of two) tells the paths apart: those
//   that have it, which on aarch64 are all, give equal bits.
// * An output element never depends on how many rows or sequences sit beside it (contract 2).

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#elif defined(ALIGNPRO_NEON)
#include <arm_neon.h>
#endif

#include "alignpro/ops/cpu/kernels.h"
#include "alignpro/ops/cpu/panel_layout.h"
#include "alignpro/ops/shared/activation.h"  // constants alone

namespace alignpro::ops::cpu::ALIGNPRO_ISA {
namespace {

#define ALIGNPRO_INLINE inline __attribute__((always_inline))

// The products' vector, as wide as registers are. Lanes are a panel's rows, so its width changes no
// bit.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kParts = kPanel / kLanes;

typedef float Wide __attribute__((vector_size(4 * kLanes)));
typedef float WideU __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t WideInts __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint32_t WordsU __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

ALIGNPRO_INLINE Wide load_wide(const float* p) { return *reinterpret_cast<const WideU*>(p); }
ALIGNPRO_INLINE void store_wide(float* p, Wide v) { *reinterpret_cast<WideU*>(p) = v; }
ALIGNPRO_INLINE Wide splat_wide(float x) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);
#elif defined(__AVX2__)
  return _mm256_set1_ps(x);
#else
  return Wide{x, x, x, x};
#endif
}

ALIGNPRO_INLINE Wide fma(Wide a, Wide b, Wide c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(ALIGNPRO_NEON)
  return vfmaq_f32(c, a, b);
#elif defined(__ARM_FEATURE_FMA)
  return Wide{__builtin_fmaf(a[0], b[0], c[0]), __builtin_fmaf(a[1], b[1], c[1]),
              __builtin_fmaf(a[2], b[2], c[2]), __builtin_fmaf(a[3], b[3], c[3])};
#else
  return a * b + c;
#endif
}

// Eight floats, and eight integers.
#if defined(__AVX2__)
typedef float F8 __attribute__((vector_size(32)));
typedef float F8u __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t I8 __attribute__((vector_size(32)));

ALIGNPRO_INLINE F8 load(const float* p) { return *reinterpret_cast<const F8u*>(p); }
ALIGNPRO_INLINE void store(float* p, F8 v) { *reinterpret_cast<F8u*>(p) = v; }
ALIGNPRO_INLINE F8 splat(float x) { return _mm256_set1_ps(x); }
ALIGNPRO_INLINE F8 where(I8 mask, F8 a, F8 b) { return mask ? a : b; }
#if defined(__AVX512F__)
ALIGNPRO_INLINE F8 fma(F8 a, F8 b, F8 c) { return _mm256_fmadd_ps(a, b, c); }
#endif

#else
// In two registers: a vector wider than any would live in memory.
template <typename Half>
struct Pair {
  Half low, high;
  ALIGNPRO_INLINE auto operator[](int i) const { return i < kLanes ? low[i] : high[i - kLanes]; }
};
typedef Pair<Wide> F8;
typedef Pair<WideInts> I8;

#define ALIGNPRO_PAIRWISE(op)                                                \
  template <typename Half>                                                   \
  ALIGNPRO_INLINE auto operator op(Pair<Half> a, Pair<Half> b) {             \
    return Pair<decltype(a.low op b.low)>{a.low op b.low, a.high op b.high}; \
  }                                                                          \
  ALIGNPRO_INLINE I8 operator op(I8 a, int32_t b) { return {a.low op b, a.high op b}; }
ALIGNPRO_PAIRWISE(+)
ALIGNPRO_PAIRWISE(-)
ALIGNPRO_PAIRWISE(*)
ALIGNPRO_PAIRWISE(/)
ALIGNPRO_PAIRWISE(<)
ALIGNPRO_PAIRWISE(>)
ALIGNPRO_PAIRWISE(==)
ALIGNPRO_PAIRWISE(<<)
#undef ALIGNPRO_PAIRWISE
ALIGNPRO_INLINE F8 operator-(F8 a) { return {-a.low, -a.high}; }

ALIGNPRO_INLINE F8 load(const float* p) { return {load_wide(p), load_wide(p + kLanes)}; }
ALIGNPRO_INLINE void store(float* p, F8 v) {
  store_wide(p, v.low);
  store_wide(p + kLanes, v.high);
}
ALIGNPRO_INLINE F8 splat(float x) { return {splat_wide(x), splat_wide(x)}; }
ALIGNPRO_INLINE F8 where(I8 mask, F8 a, F8 b) {
  return {mask.low ? a.low : b.low, mask.high ? a.high : b.high};
}
ALIGNPRO_INLINE F8 fma(F8 a, F8 b, F8 c) {
  return {fma(a.low, b.low, c.low), fma(a.high, b.high, c.high)};
}
#endif

ALIGNPRO_INLINE float fma1(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// NaN in `a` is dropped: callers that must notice NaN find it in the sum that follows.
ALIGNPRO_INLINE F8 max8(F8 a, F8 b) {
#if defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return where(a > b, a, b);
#endif
}
ALIGNPRO_INLINE F8 abs8(F8 v) {
#if defined(__AVX2__)
  return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v);
#else
  return where(v < splat(0.0f), -v, v);
#endif
}

// One fixed tree: ((0+4)+(2+6)) + ((1+5)+(3+7)).
ALIGNPRO_INLINE float sum_lanes(F8 v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

ALIGNPRO_INLINE int32_t sum_lanes(I8 v) {
#if defined(__AVX2__)
  __m256i sums;
  std::memcpy(&sums, &v, sizeof(sums));
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
#else
  int32_t sum = 0;
  for (int i = 0; i < 8; ++i) sum += v[i];
  return sum;
#endif
}

// Without NaN.
ALIGNPRO_INLINE float max_lanes(F8 v) {
#if defined(__AVX2__)
  v = max8(v, _mm256_permute2f128_ps(v, v, 1));
  v = max8(v, _mm256_permute_ps(v, 0x4e));
  return max8(v, _mm256_permute_ps(v, 0xb1))[0];
#else
  float m = v[0];
  for (int i = 1; i < 8; ++i) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

constexpr float kInf = __builtin_inff();
// Below this exp() is flushed to 0: the smallest normal float is exp(-87.336).
constexpr float kExpMin = -87.3f;
constexpr float kExpMax = 88.3f;

// exp by range reduction to |r| <= ln2 / 2 and a degree-6 polynomial; relative error < 2e-7.
// NaN stays NaN; below kExpMin the result is exactly 0.
ALIGNPRO_INLINE F8 exp8(F8 x) {
  const F8 low = splat(kExpMin);
  const F8 high = splat(kExpMax);
  F8 t = where(x < low, low, x);
  t = where(t > high, high, t);
  const F8 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const F8 biased = fma(t, splat(1.44269504088896341f), magic);
  const F8 n = biased - magic;
  F8 r = fma(n, splat(-0.693359375f), t);
  r = fma(n, splat(2.12194440e-4f), r);
  F8 p = splat(1.3981999507e-3f);
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + splat(1.0f);
  I8 exponent;
  std::memcpy(&exponent, &biased, sizeof(exponent));
  exponent = (exponent - 0x4B400000 + 127) << 23;
  F8 power;
  std::memcpy(&power, &exponent, sizeof(power));
  const F8 y = p * power;
  return where(x < low, splat(0.0f), y);
}

ALIGNPRO_INLINE float exp1(float x) { return exp8(splat(x))[0]; }

// fn(Constant<count>()) for 1 <= count <= kMost; a larger count is kMost, of 0 there is nothing to
// do.
template <int64_t kNumber>
struct Constant {
  static constexpr int64_t kValue = kNumber;
};
template <int64_t kMost, typename Fn>
ALIGNPRO_INLINE void with_count(int64_t count, const Fn& fn) {
  if constexpr (kMost > 0) {
    if (count >= kMost) return fn(Constant<kMost>());
    with_count<kMost - 1>(count, fn);
  }
}

// ---- matrix products -------------------------------------------------------------------------

// Rows that are multiplied together: a packed tile, or two where registers hold the sums of both.
// Six chains would wait for themselves where two multiply-adds of a whole panel begin a cycle.
constexpr int kTileRows = static_cast<int>(kParts == 1 ? 2 * kRowTile : kRowTile);

// So many rows, of packed tiles a_stride apart, against a sub-panel of B. Meanwhile it fetches
// `lines` lines from `ahead` on, one every `every` steps: its share of a sub-panel that comes
// later.
template <int Rows>
ALIGNPRO_INLINE void micro_tile(int64_t k_count, const float* a, int64_t a_stride, const float* b,
                                int64_t ldb, float* c, bool accumulate, const float* ahead,
                                int64_t lines, int64_t every) {
  Wide acc[Rows][kParts] = {};
  const auto step = [&]() __attribute__((always_inline)) {
    Wide bk[kParts];
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) bk[part] = load_wide(b + part * kLanes);
#pragma GCC unroll 12
    for (int m = 0; m < Rows; ++m) {
      const Wide am = splat_wide(m < kRowTile ? a[m] : a[a_stride + m - kRowTile]);
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) acc[m][part] = fma(am, bk[part], acc[m][part]);
    }
    a += kRowTile;
    b += ldb;
  };
  for (int64_t line = 0; line < lines; ++line) {
    __builtin_prefetch(ahead + line * kPanel);
    for (int64_t k = 0; k < every; ++k) step();
  }
  for (int64_t k = lines * every; k < k_count; ++k) step();
#pragma GCC unroll 12
  for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
      float* to = c + m * kPanel + part * kLanes;
      if (accumulate) acc[m][part] = load_wide(to) + acc[m][part];
      store_wide(to, acc[m][part]);
    }
  }
}

void gemm_panel(int64_t rows, int64_t k_count, const float* a, int64_t a_stride, const float* b,
                int64_t ldb, float* c, bool accumulate, bool stream) {
  // In a packed matrix the sub-panel after the next lies two further on. Its lines are fetched
  // evenly over the tiles: all at once they would fill the miss queue and stall the first tile.
  // Past the end a prefetch is ignored. One short tile only streams, which the hardware foresees.
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t lines = stream && rows >= kRowTile ? k_count / tiles : 0;
  const float* ahead = b + 2 * k_count * kPanel;
  int64_t m = 0;
  for (; m + kTileRows <= rows; m += kTileRows) {
    micro_tile<kTileRows>(k_count, a, a_stride, b, ldb, c, accumulate, ahead, lines, tiles);
    a += kTileRows / kRowTile * a_stride;
    c += kTileRows * kPanel;
    ahead += lines * kPanel;
  }
  with_count<kTileRows - 1>(rows - m, [&](auto live) __attribute__((always_inline)) {
    micro_tile<decltype(live)::kValue>(k_count, a, a_stride, b, ldb, c, accumulate, ahead, lines,
                                       tiles);
  });
}

template <int Rows, int Panels>
void gemv_tile(int64_t k_count, const float* a, const float* const* b, int64_t ldb, float* c,
               int64_t c_row, int64_t c_panel, bool accumulate) {
  Wide acc[Rows][Panels * kParts] = {};
  const float* from[Panels];
#pragma GCC unroll 4
  for (int p = 0; p < Panels; ++p) from[p] = b[p];
  for (int64_t k = 0; k < k_count; ++k, a += kRowTile) {
    Wide am[Rows];
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m) am[m] = splat_wide(a[m]);
#pragma GCC unroll 8
    for (int i = 0; i < Panels * kParts; ++i) {
      const Wide bk = load_wide(from[i / kParts] + k * ldb + i % kParts * kLanes);
#pragma GCC unroll 4
      for (int m = 0; m < Rows; ++m) acc[m][i] = fma(am[m], bk, acc[m][i]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 8
    for (int i = 0; i < Panels * kParts; ++i) {
      float* to = c + m * c_row + i / kParts * c_panel + i % kParts * kLanes;
      store_wide(to, accumulate ? load_wide(to) + acc[m][i] : acc[m][i]);
    }
  }
}

template <int Rows>
void gemv_rows(int64_t k_count, const float* a, const float* const* b, int64_t panels, int64_t ldb,
               float* c, int64_t c_row, int64_t c_panel, bool accumulate) {
  // As many chains as registers hold.
  constexpr int kAtOnce = kParts == 1 ? kGemvPanels : Rows < 4 ? kGemvPanels / 2 : 1;
  for (; panels >= kAtOnce; panels -= kAtOnce, b += kAtOnce, c += kAtOnce * c_panel) {
    gemv_tile<Rows, kAtOnce>(k_count, a, b, ldb, c, c_row, c_panel, accumulate);
  }
  for (; panels > 0; --panels, ++b, c += c_panel) {
    gemv_tile<Rows, 1>(k_count, a, b, ldb, c, c_row, c_panel, accumulate);
  }
}

void gemv(int64_t rows, int64_t k_count, const float* a, const float* const* b, int64_t panels,
          int64_t ldb, float* c, int64_t c_row, int64_t c_panel, bool accumulate) {
  with_count<kGemvRows>(rows, [&](auto live) __attribute__((always_inline)) {
    gemv_rows<decltype(live)::kValue>(k_count, a, b, panels, ldb, c, c_row, c_panel, accumulate);
  });
}

#include "alignpro/ops/cpu/panels-inl.h"
// After what it uses.

#include "alignpro/ops/cpu/int8-inl.h"
#if defined(__AVX512VNNI__)
#include "alignpro/ops/cpu/amx-inl.h"
#endif

// Transposes eight rows of eight in registers.
ALIGNPRO_INLINE void transpose_block(F8 r[8]) {
#if defined(__AVX2__)
  const __m256 a0 = _mm256_unpacklo_ps(r[0], r[1]), a1 = _mm256_unpackhi_ps(r[0], r[1]);
  const __m256 a2 = _mm256_unpacklo_ps(r[2], r[3]), a3 = _mm256_unpackhi_ps(r[2], r[3]);
  const __m256 a4 = _mm256_unpacklo_ps(r[4], r[5]), a5 = _mm256_unpackhi_ps(r[4], r[5]);
  const __m256 a6 = _mm256_unpacklo_ps(r[6], r[7]), a7 = _mm256_unpackhi_ps(r[6], r[7]);
  const __m256 b0 = _mm256_shuffle_ps(a0, a2, 0x44), b1 = _mm256_shuffle_ps(a0, a2, 0xEE);
  const __m256 b2 = _mm256_shuffle_ps(a1, a3, 0x44), b3 = _mm256_shuffle_ps(a1, a3, 0xEE);
  const __m256 b4 = _mm256_shuffle_ps(a4, a6, 0x44), b5 = _mm256_shuffle_ps(a4, a6, 0xEE);
  const __m256 b6 = _mm256_shuffle_ps(a5, a7, 0x44), b7 = _mm256_shuffle_ps(a5, a7, 0xEE);
  r[0] = _mm256_permute2f128_ps(b0, b4, 0x20);
  r[1] = _mm256_permute2f128_ps(b1, b5, 0x20);
  r[2] = _mm256_permute2f128_ps(b2, b6, 0x20);
  r[3] = _mm256_permute2f128_ps(b3, b7, 0x20);
  r[4] = _mm256_permute2f128_ps(b0, b4, 0x31);
  r[5] = _mm256_permute2f128_ps(b1, b5, 0x31);
  r[6] = _mm256_permute2f128_ps(b2, b6, 0x31);
  r[7] = _mm256_permute2f128_ps(b3, b7, 0x31);
#else
  float columns[8][8];
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < 8; ++j) columns[j][i] = r[i][j];
  }
  for (int i = 0; i < 8; ++i) r[i] = load(columns[i]);
#endif
}

ALIGNPRO_INLINE void transpose8(const float* from, int64_t from_stride, float* to,
                                int64_t to_stride) {
  F8 block[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) block[i] = load(from + i * from_stride);
  transpose_block(block);
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) store(to + j * to_stride, block[j]);
}

// One tile of up to six rows whose values lie next to each other: eight k at a time are transposed
// and written as overlapping vectors, each covering the two floats too many of the one before.
template <int Live>
ALIGNPRO_INLINE void pack_tile(const float* from, int64_t row_stride, int64_t k_count,
                               float* packed) {
  int64_t k = 0;
  for (; k + 8 <= k_count; k += 8) {
    F8 block[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      block[i] = i < Live ? load(from + i * row_stride + k) : splat(0.0f);
    }
    transpose_block(block);
#pragma GCC unroll 7
    for (int j = 0; j < 7; ++j) store(packed + (k + j) * kRowTile, block[j]);
    // What follows may be another worker's.
    std::memcpy(packed + (k + 7) * kRowTile, &block[7], kRowTile * sizeof(float));
  }
  for (; k < k_count; ++k) {
    for (int i = 0; i < kRowTile; ++i) {
      packed[k * kRowTile + i] = i < Live ? from[i * row_stride + k] : 0.0f;
    }
  }
}

void pack_rows(int64_t rows, int64_t k_count, const float* source, int64_t row_stride,
               int64_t col_stride, float* packed) {
  for (int64_t m = 0; m < rows; m += kRowTile) {
    const int64_t live = rows - m < kRowTile ? rows - m : kRowTile;
    const float* from = source + m * row_stride;
    if (col_stride == 1) {
      with_count<kRowTile>(live, [&](auto rows_of_tile) __attribute__((always_inline)) {
        pack_tile<decltype(rows_of_tile)::kValue>(from, row_stride, k_count, packed);
      });
    } else if (row_stride == 1 && live == kRowTile) {
      for (int64_t k = 0; k < k_count; ++k) {
        std::memcpy(packed + k * kRowTile, from + k * col_stride, kRowTile * sizeof(float));
      }
    } else {
      for (int64_t k = 0; k < k_count; ++k) {
        for (int64_t i = 0; i < kRowTile; ++i) {
          packed[k * kRowTile + i] = i < live ? from[i * row_stride + k * col_stride] : 0.0f;
        }
      }
    }
    packed += k_count * kRowTile;
  }
}

void pack_panel(const float* source, int64_t row_stride, int64_t rows, int64_t k_count,
                float* out) {
  int64_t k = 0;
  if (rows == kPanel) {
    for (; k + 8 <= k_count; k += 8) {
      transpose8(source + k, row_stride, out + k * kPanel, kPanel);
      transpose8(source + 8 * row_stride + k, row_stride, out + k * kPanel + 8, kPanel);
    }
  }
  for (; k < k_count; ++k) {
    for (int64_t n = 0; n < kPanel; ++n) {
      out[k * kPanel + n] = n < rows ? source[n * row_stride + k] : 0.0f;
    }
  }
}

void store_tile(const float* tile, int64_t rows, int64_t columns, float scale, const float* bias,
                const float* residual, float* out, int64_t ldc) {
  if (columns == kPanel) {
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t at = 0; at < kPanel; at += kLanes) {
        Wide v = load_wide(tile + m * kPanel + at) * scale;
        if (bias != nullptr) v = v + load_wide(bias + at);
        if (residual != nullptr) v = v + load_wide(residual + m * ldc + at);
        store_wide(out + m * ldc + at, v);
      }
    }
    return;
  }
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < columns; ++n) {
      float v = tile[m * kPanel + n] * scale;
      if (bias != nullptr) v += bias[n];
      if (residual != nullptr) v += residual[m * ldc + n];
      out[m * ldc + n] = v;
    }
  }
}

void transpose_panels(const float* panels, int64_t k_total, int64_t n_count, int64_t k_begin,
                      float* out) {
  const int64_t k_live = k_total - k_begin < kPanel ? k_total - k_begin : kPanel;
  for (int64_t n = 0; n < n_count; n += kPanel) {
    const float* from = panels + (n / kPanel) * k_total * kPanel + k_begin * kPanel;
    if (n_count - n >= kPanel && k_live == kPanel) {
      for (int64_t i = 0; i < kPanel; i += 8) {
        for (int64_t j = 0; j < kPanel; j += 8) {
          transpose8(from + j * kPanel + i, kPanel, out + (n + i) * kPanel + j, kPanel);
        }
      }
      continue;
    }
    const int64_t n_live = n_count - n < kPanel ? n_count - n : kPanel;
    for (int64_t i = 0; i < n_live; ++i) {
      for (int64_t j = 0; j < kPanel; ++j) {
        out[(n + i) * kPanel + j] = j < k_live ? from[j * kPanel + i] : 0.0f;
      }
    }
  }
}

// ---- rows ------------------------------------------------------------------------------------

float dot(const float* a, const float* b, int64_t n) {
  F8 acc0 = splat(0.0f), acc1 = splat(0.0f);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    acc0 = fma(load(a + i), load(b + i), acc0);
    acc1 = fma(load(a + i + 8), load(b + i + 8), acc1);
  }
  float sum = sum_lanes(acc0 + acc1);
  for (; i < n; ++i) sum = fma1(a[i], b[i], sum);
  return sum;
}

void axpy(float alpha, const float* x, int64_t n, float* y) {
  const F8 factor = splat(alpha);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) store(y + i, fma(factor, load(x + i), load(y + i)));
  for (; i < n; ++i) y[i] = fma1(alpha, x[i], y[i]);
}

float rms_norm_row(const float* x, const float* w, int64_t n, float eps, float* y) {
  const float mean = dot(x, x, n) / static_cast<float>(n);
  const float factor = 1.0f / __builtin_sqrtf(mean + eps);
  const F8 factor8 = splat(factor);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) store(y + i, load(w + i) * (load(x + i) * factor8));
  for (; i < n; ++i) y[i] = w[i] * (x[i] * factor);
  return factor;
}

void rms_norm_backward_row(const float* x, const float* w, const float* dy, float factor, int64_t n,
                           float* dx) {
  // With g = w dy and u = x factor: dx = factor (g - u mean(g u)).
  F8 acc = splat(0.0f);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) acc = fma(load(w + i) * load(dy + i), load(x + i), acc);
  float sum = sum_lanes(acc);
  for (; i < n; ++i) sum = fma1(w[i] * dy[i], x[i], sum);
  const float pull = sum * factor * factor / static_cast<float>(n);
  for (i = 0; i < n; ++i) dx[i] += factor * (w[i] * dy[i] - x[i] * pull);
}

ALIGNPRO_INLINE F8 sigmoid8(F8 x) { return splat(1.0f) / (splat(1.0f) + exp8(-x)); }

// Loads n < 8 floats, the rest zero: tails go through the same vector code as everything else.
ALIGNPRO_INLINE F8 load_tail(const float* p, int64_t n) {
  float lanes[8] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
ALIGNPRO_INLINE void store_tail(float* p, F8 v, int64_t n) {
  float lanes[8];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

// A gate is x sigmoid(u(x)): of SiLU u is x, of GELU's approximation (see gelu()) a cubic.
struct Silu {
  static ALIGNPRO_INLINE F8 inner(F8 x) { return x; }
  static ALIGNPRO_INLINE F8 slope(F8 x) { return x; }  // x u'(x)
};
struct Gelu {
  static ALIGNPRO_INLINE F8 inner(F8 x) {
    return x * fma(x * x, splat(kGeluCubic), splat(kGeluLinear));
  }
  static ALIGNPRO_INLINE F8 slope(F8 x) {
    return x * fma(x * x, splat(3.0f * kGeluCubic), splat(kGeluLinear));
  }
};

template <typename Gate>
void glu_row(const float* gate, const float* up, int64_t n, float* h) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const F8 g = load(gate + i);
    store(h + i, g * sigmoid8(Gate::inner(g)) * load(up + i));
  }
  if (i < n) {
    const F8 g = load_tail(gate + i, n - i);
    store_tail(h + i, g * sigmoid8(Gate::inner(g)) * load_tail(up + i, n - i), n - i);
  }
}

template <typename Gate>
void glu_backward_row(const float* gate, const float* up, const float* dh, int64_t n, float* dgate,
                      float* dup) {
  for (int64_t i = 0; i < n; i += 8) {
    const bool whole = i + 8 <= n;
    const F8 g = whole ? load(gate + i) : load_tail(gate + i, n - i);
    const F8 u = whole ? load(up + i) : load_tail(up + i, n - i);
    const F8 d = whole ? load(dh + i) : load_tail(dh + i, n - i);
    const F8 s = sigmoid8(Gate::inner(g));
    const F8 dg = d * u * s * (splat(1.0f) + Gate::slope(g) * (splat(1.0f) - s));
    const F8 du = d * g * s;
    if (whole) {
      store(dgate + i, dg);
      store(dup + i, du);
    } else {
      store_tail(dgate + i, dg, n - i);
      store_tail(dup + i, du, n - i);
    }
  }
}

void rope_row(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i];
    const float b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

void softmax_row(float* scores, int64_t first, int64_t count, float scale, float* max_out,
                 float* sum_out) {
  const int64_t padded = (count + 15) / 16 * 16;
  for (int64_t j = 0; j < first; ++j) scores[j] = -kInf;
  for (int64_t j = count; j < padded; ++j) scores[j] = -kInf;
  const F8 scale8 = splat(scale);
  F8 m = splat(-kInf);
  for (int64_t j = 0; j < padded; j += 8) {
    const F8 s = load(scores + j) * scale8;
    store(scores + j, s);
    m = max8(s, m);
  }
  const float top = max_lanes(m);
  const F8 top8 = splat(top == -kInf ? 0.0f : top);
  F8 sum = splat(0.0f);
  for (int64_t j = 0; j < padded; j += 8) {
    const F8 e = exp8(load(scores + j) - top8);
    store(scores + j, e);
    sum = sum + e;
  }
  *max_out = top;
  *sum_out = sum_lanes(sum);
}

bool to_halves(const float* x, int64_t n, uint16_t* out) {
  bool held = true;
  int64_t i = 0;
#if defined(__F16C__)
  I8 lost = {};
  for (; i + 8 <= n; i += 8) {
    const F8 v = load(x + i);
    const F8 magnitude = abs8(v);
    lost |= (magnitude >= splat(65520.0f)) & (magnitude < splat(kInf));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  for (int j = 0; j < 8; ++j) held = held && lost[j] == 0;
#endif
  for (; i < n; ++i) {
    const float magnitude = x[i] < 0.0f ? -x[i] : x[i];
    held = held && !(magnitude >= 65520.0f && magnitude < kInf);
    out[i] = float_to_half(x[i]);
  }
  return held;
}

void from_halves(const uint16_t* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    store_wide(out + i, load_halves(reinterpret_cast<const uint8_t*>(x + i)));
  }
  for (; i < n; ++i) out[i] = half_to_float(x[i]);
}

// ---- vocabulary tiles [panels][rows][16] ------------------------------------------------------

void scale_tile_row(float* tile, int64_t rows, int64_t row, int64_t panels, int64_t columns,
                    float inv_temperature) {
  const F8 factor = splat(inv_temperature);
  for (int64_t p = 0; p < panels; ++p) {
    float* z = tile + (p * rows + row) * kPanel;
    store(z, load(z) * factor);
    store(z + 8, load(z + 8) * factor);
    for (int64_t j = columns - p * kPanel < 0 ? 0 : columns - p * kPanel; j < kPanel; ++j) {
      z[j] = -kInf;
    }
  }
}

// What multiplies a weight of exactly 0 counts as 0: keeps 0 * inf out of the sums. NaN passes.
ALIGNPRO_INLINE F8 where_weighted(F8 weight, F8 value) {
  return where(weight == splat(0.0f), splat(0.0f), value);
}

void tile_stats_row(const float* tile, const float* ref_tile, int64_t rows, int64_t row,
                    int64_t panels, TileStats* stats) {
  F8 m = splat(-kInf), rm = splat(-kInf);
  for (int64_t p = 0; p < panels; ++p) {
    const float* z = tile + (p * rows + row) * kPanel;
    m = max8(load(z + 8), max8(load(z), m));
    if (ref_tile != nullptr) {
      const float* q = ref_tile + (p * rows + row) * kPanel;
      rm = max8(load(q + 8), max8(load(q), rm));
    }
  }
  // A tile of -inf alone (or NaN) has no finite maximum; measured from 0 it sums to 0 (or NaN).
  const float top = max_lanes(m), ref_top = max_lanes(rm);
  const F8 top8 = splat(top == -kInf ? 0.0f : top);
  const F8 ref_top8 = splat(ref_top == -kInf ? 0.0f : ref_top);
  F8 sum = splat(0.0f), sum_z = splat(0.0f), ref_sum = splat(0.0f);
  F8 cross = splat(0.0f), ref_cross = splat(0.0f);
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t half = 0; half < kPanel; half += 8) {
      const int64_t at = (p * rows + row) * kPanel + half;
      const F8 d = load(tile + at) - top8;
      const F8 e = exp8(d);
      sum = sum + e;
      sum_z = fma(e, where_weighted(e, d), sum_z);
      if (ref_tile != nullptr) {
        const F8 rd = load(ref_tile + at) - ref_top8;
        const F8 re = exp8(rd);
        ref_sum = ref_sum + re;
        cross = fma(e, where_weighted(e, d - rd), cross);
        ref_cross = fma(re, where_weighted(re, rd - d), ref_cross);
      }
    }
  }
  stats->max = top;
  stats->sum = sum_lanes(sum);
  stats->sum_z = sum_lanes(sum_z);
  stats->ref_max = ref_top;
  stats->ref_sum = sum_lanes(ref_sum);
  stats->sum_cross = sum_lanes(cross);
  stats->ref_cross = sum_lanes(ref_cross);
}

void tile_weights_row(float* tile, float* ref_tile, int64_t rows, int64_t row, int64_t panels,
                      float max, float center, float ref_center) {
  const F8 top = splat(max), c = splat(center), rc = splat(ref_center);
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t half = 0; half < kPanel; half += 8) {
      const int64_t at = (p * rows + row) * kPanel + half;
      const F8 z = load(tile + at);
      const F8 e = exp8(z - top);
      store(tile + at, e);
      if (ref_tile != nullptr) {
        const F8 difference = (z - c) - (load(ref_tile + at) - rc);
        store(ref_tile + at, e * where_weighted(e, difference));
      }
    }
  }
}

void tile_variation_row(const float* tile, const float* ref_tile, int64_t rows, int64_t row,
                        int64_t panels, const RowGradient* s, float* variation, float* mass_above) {
  F8 sum = splat(0.0f), mass = splat(0.0f);
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t half = 0; half < kPanel; half += 8) {
      const int64_t at = (p * rows + row) * kPanel + half;
      const F8 prob = exp8(load(tile + at) - splat(s->lse) - splat(s->lse_low));
      const F8 more = prob - exp8(load(ref_tile + at) - splat(s->ref_lse) - splat(s->ref_lse_low));
      sum = sum + where(more > splat(0.0f), more, splat(0.0f));
      mass = mass + where(more > splat(0.0f), prob, splat(0.0f));
    }
  }
  *variation = sum_lanes(sum);
  *mass_above = sum_lanes(mass);
}

template <bool WithQ>
ALIGNPRO_INLINE void tile_gradient(float* tile, const float* ref_tile, int64_t rows, int64_t row,
                                   int64_t panels, const RowGradient& g, float inv_temperature) {
  const F8 lse = splat(g.lse), lse_low = splat(g.lse_low), zero = splat(0.0f);
  const F8 ref_lse = splat(g.ref_lse), ref_lse_low = splat(g.ref_lse_low);
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t half = 0; half < kPanel; half += 8) {
      const int64_t at = (p * rows + row) * kPanel + half;
      const F8 logp = load(tile + at) - lse - lse_low;
      const F8 prob = exp8(logp);
      F8 factor = splat(-g.d_logprob) - splat(g.d_entropy) * (logp + splat(g.entropy));
      F8 extra = zero;
      if (ref_tile != nullptr) {
        const F8 logq = load(ref_tile + at) - ref_lse - ref_lse_low;
        factor = fma(splat(g.d_kl), logp - logq - splat(g.kl), factor);
        if constexpr (WithQ) {
          const F8 more = prob - exp8(logq);
          const F8 above = where(more > zero, splat(1.0f), zero) - splat(g.mass_above);
          factor = fma(splat(g.d_total_variation), above, factor);
          extra = splat(g.d_reverse_kl) * more;
        }
      }
      store(tile + at, fma(prob, where_weighted(prob, factor), extra) * splat(inv_temperature));
    }
  }
}

void tile_gradient_row(float* tile, const float* ref_tile, int64_t rows, int64_t row,
                       int64_t panels, int64_t first_column, const RowGradient* g,
                       float inv_temperature) {
  if (ref_tile != nullptr && (g->d_reverse_kl != 0.0f || g->d_total_variation != 0.0f)) {
    tile_gradient<true>(tile, ref_tile, rows, row, panels, *g, inv_temperature);
  } else {
    tile_gradient<false>(tile, ref_tile, rows, row, panels, *g, inv_temperature);
  }
  const int64_t column = g->token - first_column;
  if (column >= 0 && column < panels * kPanel) {
    tile[((column / kPanel) * rows + row) * kPanel + column % kPanel] +=
        g->d_logprob * inv_temperature;
  }
}

void tile_exp_row(const float* tile, int64_t rows, int64_t row, int64_t panels, float max,
                  float* e) {
  const F8 top = splat(max);
  for (int64_t p = 0; p < panels; ++p) {
    const float* z = tile + (p * rows + row) * kPanel;
    store(e + p * kPanel, exp8(load(z) - top));
    store(e + p * kPanel + 8, exp8(load(z + 8) - top));
  }
}

// ---- the machine's limits ---------------------------------------------------------------------

// A value that the compiler does not know: equal ones are not merged, none is left out.
ALIGNPRO_INLINE void keep(Wide& v) {
#if defined(__AVX2__)
  __asm__ volatile("" : "+v"(v));
#elif defined(ALIGNPRO_NEON)
  __asm__ volatile("" : "+w"(v));
#else
  __asm__ volatile("" : "+m"(v));
#endif
}

// Enough independent chains to fill two pipes of latency 4 or 5, and four of narrow vectors.
void fma_chains(int64_t steps) {
  constexpr int kChains = kLanes > 4 ? 12 : 24;
  Wide sums[kChains];
  for (Wide& sum : sums) {
    sum = splat_wide(0.0f);
    keep(sum);
  }
  Wide a = splat_wide(0.999f), b = splat_wide(0.001f);
  for (int64_t i = 0; i < steps * (kFmaPerStep / (kChains * kLanes)); ++i) {
#pragma GCC unroll 24
    for (Wide& sum : sums) sum = fma(sum, a, b);
    keep(a);
    keep(b);
  }
  for (Wide& sum : sums) keep(sum);
}

void read_memory(const float* p, int64_t n) {
  constexpr int kSums = 32 / kLanes;
  Wide sums[kSums] = {};
  for (int64_t i = 0; i + 32 <= n; i += 32) {
#pragma GCC unroll 8
    for (int k = 0; k < kSums; ++k) sums[k] = sums[k] + load_wide(p + i + kLanes * k);
  }
  for (Wide& sum : sums) keep(sum);
}

constexpr Kernels table(const char* name, decltype(Kernels::int8_gemm) product) {
  return {
      .name = name,
      .gemm_panel = gemm_panel,
      .gemv = gemv,
      .expand_panel = expand_panel,
      .stream_panels = stream_panels,
      .prefers_stream = prefers_stream,
      .quantize_rows = quantize_rows,
      .int8_gemm = product,
      .pack_rows = pack_rows,
      .transpose_panels = transpose_panels,
      .pack_panel = pack_panel,
      .store_tile = store_tile,
      .rms_norm_row = rms_norm_row,
      .rms_norm_backward_row = rms_norm_backward_row,
      .swiglu_row = glu_row<Silu>,
      .swiglu_backward_row = glu_backward_row<Silu>,
      .geglu_row = glu_row<Gelu>,
      .geglu_backward_row = glu_backward_row<Gelu>,
      .rope_row = rope_row,
      .softmax_row = softmax_row,
      .to_halves = to_halves,
      .from_halves = from_halves,
      .dot = dot,
      .axpy = axpy,
      .scale_tile_row = scale_tile_row,
      .tile_stats_row = tile_stats_row,
      .tile_weights_row = tile_weights_row,
      .tile_variation_row = tile_variation_row,
      .tile_gradient_row = tile_gradient_row,
      .tile_exp_row = tile_exp_row,
      .fma_chains = fma_chains,
      .read_memory = read_memory,
  };
}

}  // namespace

// `extern` in the header gives the tables external linkage; their entries stay internal.
const Kernels kKernels = table(ALIGNPRO_ISA_NAME, int8_gemm);
#if defined(__AVX512VNNI__)
const Kernels kAmxKernels = table("amx", amx_gemm);
#endif

}  // namespace alignpro::ops::cpu::ALIGNPRO_ISA
