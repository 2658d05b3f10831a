// The kernels' bodies, compiled once for every instruction set (ALIGNPRO_ISA names the namespace).
//
// Invariants
// * Everything here is in an anonymous namespace, and no inline function of the standard library is
//   called: the linker can never merge a body built for AVX2 into a baseline caller.
// * A vector is 8 floats on every path; lanes and reduction trees are the same, so each path is
//   deterministic on its own. Only FMA (one rounding instead of two) tells the paths apart.
// * An output element never depends on how many rows or sequences sit beside it (contract 2).

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#endif

#include "alignpro/ops/cpu/kernels.h"

namespace alignpro::ops::cpu::ALIGNPRO_ISA {
namespace {

#define ALIGNPRO_INLINE inline __attribute__((always_inline))

typedef float F8 __attribute__((vector_size(32), aligned(32)));
typedef float F8u __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t I8 __attribute__((vector_size(32)));

ALIGNPRO_INLINE F8 load(const float* p) { return *reinterpret_cast<const F8u*>(p); }
ALIGNPRO_INLINE void store(float* p, F8 v) { *reinterpret_cast<F8u*>(p) = v; }
ALIGNPRO_INLINE F8 splat(float x) { return F8{x, x, x, x, x, x, x, x}; }

ALIGNPRO_INLINE F8 fma(F8 a, F8 b, F8 c) {
#if defined(__AVX2__) && defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

ALIGNPRO_INLINE float fma1(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// NaN in `a` is dropped: callers that must notice NaN find it in the sum that follows.
ALIGNPRO_INLINE F8 max8(F8 a, F8 b) { return a > b ? a : b; }

// One fixed tree: ((0+4)+(2+6)) + ((1+5)+(3+7)).
ALIGNPRO_INLINE float sum_lanes(F8 v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

ALIGNPRO_INLINE float max_lanes(F8 v) {
  float m = v[0];
  for (int i = 1; i < 8; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

constexpr float kInf = __builtin_inff();
// Below this exp() is flushed to 0: the smallest normal float is exp(-87.336).
constexpr float kExpMin = -87.3f;
constexpr float kExpMax = 88.3f;
// Clamp of (z - max) where it multiplies exp(z - max): keeps 0 * -inf out of the sums.
constexpr float kGapMin = -104.0f;

// exp by range reduction to |r| <= ln2 / 2 and a degree-6 polynomial; relative error < 2e-7.
// NaN stays NaN; below kExpMin the result is exactly 0.
ALIGNPRO_INLINE F8 exp8(F8 x) {
  const F8 low = splat(kExpMin);
  const F8 high = splat(kExpMax);
  F8 t = x < low ? low : x;
  t = t > high ? high : t;
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
  return x < low ? splat(0.0f) : y;
}

ALIGNPRO_INLINE float exp1(float x) { return exp8(splat(x))[0]; }

// ---- matrix products -------------------------------------------------------------------------

// The first row tile to use a sub-panel of B fetches the one after the next, which lies behind it
// in a packed matrix, while the other tiles compute. Past the end a prefetch is ignored.
template <int Rows, bool Prefetch = false>
ALIGNPRO_INLINE void micro_tile(int64_t k_count, const float* a, const float* b, int64_t ldb,
                                float* c, bool accumulate) {
  F8 acc[Rows][2];
#pragma GCC unroll 6
  for (int m = 0; m < Rows; ++m) acc[m][0] = acc[m][1] = splat(0.0f);
  for (int64_t k = 0; k < k_count; ++k) {
    const F8 b0 = load(b);
    const F8 b1 = load(b + 8);
    if constexpr (Prefetch) __builtin_prefetch(b + 2 * k_count * kPanel);
#pragma GCC unroll 6
    for (int m = 0; m < Rows; ++m) {
      const F8 am = splat(a[m]);
      acc[m][0] = fma(am, b0, acc[m][0]);
      acc[m][1] = fma(am, b1, acc[m][1]);
    }
    a += kRowTile;
    b += ldb;
  }
#pragma GCC unroll 6
  for (int m = 0; m < Rows; ++m) {
    float* row = c + m * kPanel;
    if (accumulate) {
      acc[m][0] = load(row) + acc[m][0];
      acc[m][1] = load(row + 8) + acc[m][1];
    }
    store(row, acc[m][0]);
    store(row + 8, acc[m][1]);
  }
}

void gemm_panel(int64_t rows, int64_t k_count, const float* a, const float* b, int64_t ldb,
                float* c, bool accumulate) {
  int64_t m = 0;
  if (rows >= kRowTile) {
    micro_tile<6, true>(k_count, a, b, ldb, c, accumulate);
    a += k_count * kRowTile;
    c += kRowTile * kPanel;
    m = kRowTile;
  }
  for (; m + kRowTile <= rows; m += kRowTile) {
    micro_tile<6>(k_count, a, b, ldb, c, accumulate);
    a += k_count * kRowTile;
    c += kRowTile * kPanel;
  }
  switch (rows - m) {
    case 1:
      return micro_tile<1>(k_count, a, b, ldb, c, accumulate);
    case 2:
      return micro_tile<2>(k_count, a, b, ldb, c, accumulate);
    case 3:
      return micro_tile<3>(k_count, a, b, ldb, c, accumulate);
    case 4:
      return micro_tile<4>(k_count, a, b, ldb, c, accumulate);
    case 5:
      return micro_tile<5>(k_count, a, b, ldb, c, accumulate);
    default:
      return;
  }
}

void pack_rows(int64_t rows, int64_t k_count, const float* source, int64_t row_stride,
               int64_t col_stride, float* packed) {
  for (int64_t m = 0; m < rows; m += kRowTile) {
    const int64_t live = rows - m < kRowTile ? rows - m : kRowTile;
    const float* from = source + m * row_stride;
    if (live == kRowTile) {
      for (int64_t k = 0; k < k_count; ++k) {
        for (int64_t i = 0; i < kRowTile; ++i) {
          packed[k * kRowTile + i] = from[i * row_stride + k * col_stride];
        }
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

#if defined(__AVX2__)
ALIGNPRO_INLINE void transpose8(const float* from, int64_t from_stride, float* to,
                                int64_t to_stride) {
  const __m256 r0 = _mm256_loadu_ps(from), r1 = _mm256_loadu_ps(from + from_stride);
  const __m256 r2 = _mm256_loadu_ps(from + 2 * from_stride);
  const __m256 r3 = _mm256_loadu_ps(from + 3 * from_stride);
  const __m256 r4 = _mm256_loadu_ps(from + 4 * from_stride);
  const __m256 r5 = _mm256_loadu_ps(from + 5 * from_stride);
  const __m256 r6 = _mm256_loadu_ps(from + 6 * from_stride);
  const __m256 r7 = _mm256_loadu_ps(from + 7 * from_stride);
  const __m256 a0 = _mm256_unpacklo_ps(r0, r1), a1 = _mm256_unpackhi_ps(r0, r1);
  const __m256 a2 = _mm256_unpacklo_ps(r2, r3), a3 = _mm256_unpackhi_ps(r2, r3);
  const __m256 a4 = _mm256_unpacklo_ps(r4, r5), a5 = _mm256_unpackhi_ps(r4, r5);
  const __m256 a6 = _mm256_unpacklo_ps(r6, r7), a7 = _mm256_unpackhi_ps(r6, r7);
  const __m256 b0 = _mm256_shuffle_ps(a0, a2, 0x44), b1 = _mm256_shuffle_ps(a0, a2, 0xEE);
  const __m256 b2 = _mm256_shuffle_ps(a1, a3, 0x44), b3 = _mm256_shuffle_ps(a1, a3, 0xEE);
  const __m256 b4 = _mm256_shuffle_ps(a4, a6, 0x44), b5 = _mm256_shuffle_ps(a4, a6, 0xEE);
  const __m256 b6 = _mm256_shuffle_ps(a5, a7, 0x44), b7 = _mm256_shuffle_ps(a5, a7, 0xEE);
  _mm256_storeu_ps(to, _mm256_permute2f128_ps(b0, b4, 0x20));
  _mm256_storeu_ps(to + to_stride, _mm256_permute2f128_ps(b1, b5, 0x20));
  _mm256_storeu_ps(to + 2 * to_stride, _mm256_permute2f128_ps(b2, b6, 0x20));
  _mm256_storeu_ps(to + 3 * to_stride, _mm256_permute2f128_ps(b3, b7, 0x20));
  _mm256_storeu_ps(to + 4 * to_stride, _mm256_permute2f128_ps(b0, b4, 0x31));
  _mm256_storeu_ps(to + 5 * to_stride, _mm256_permute2f128_ps(b1, b5, 0x31));
  _mm256_storeu_ps(to + 6 * to_stride, _mm256_permute2f128_ps(b2, b6, 0x31));
  _mm256_storeu_ps(to + 7 * to_stride, _mm256_permute2f128_ps(b3, b7, 0x31));
}
#else
ALIGNPRO_INLINE void transpose8(const float* from, int64_t from_stride, float* to,
                                int64_t to_stride) {
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < 8; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  }
}
#endif

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
  F8 v = splat(0.0f);
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
ALIGNPRO_INLINE void store_tail(float* p, F8 v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}

void swiglu_row(const float* gate, const float* up, int64_t n, float* h) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const F8 g = load(gate + i);
    store(h + i, g * sigmoid8(g) * load(up + i));
  }
  if (i < n) {
    const F8 g = load_tail(gate + i, n - i);
    store_tail(h + i, g * sigmoid8(g) * load_tail(up + i, n - i), n - i);
  }
}

void swiglu_backward_row(const float* gate, const float* up, const float* dh, int64_t n,
                         float* dgate, float* dup) {
  for (int64_t i = 0; i < n; i += 8) {
    const bool whole = i + 8 <= n;
    const F8 g = whole ? load(gate + i) : load_tail(gate + i, n - i);
    const F8 u = whole ? load(up + i) : load_tail(up + i, n - i);
    const F8 d = whole ? load(dh + i) : load_tail(dh + i, n - i);
    const F8 s = sigmoid8(g);
    const F8 dg = d * u * s * (splat(1.0f) + g * (splat(1.0f) - s));
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
  F8 sum = splat(0.0f);
  for (int64_t j = 0; j < padded; j += 8) {
    const F8 e = exp8(load(scores + j) - splat(top));
    store(scores + j, e);
    sum = sum + e;
  }
  *max_out = top;
  *sum_out = sum_lanes(sum);
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

ALIGNPRO_INLINE F8 gap(F8 z, F8 top) {
  const F8 d = z - top;
  const F8 low = splat(kGapMin);
  return d < low ? low : d;  // NaN passes through
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
  F8 sum = splat(0.0f), sum_z = splat(0.0f), ref_sum = splat(0.0f), cross = splat(0.0f);
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t half = 0; half < kPanel; half += 8) {
      const int64_t at = (p * rows + row) * kPanel + half;
      const F8 d = gap(load(tile + at), top8);
      const F8 e = exp8(d);
      sum = sum + e;
      sum_z = fma(e, d, sum_z);
      if (ref_tile != nullptr) {
        const F8 rd = gap(load(ref_tile + at), ref_top8);
        ref_sum = ref_sum + exp8(rd);
        cross = fma(e, d - rd, cross);
      }
    }
  }
  stats->max = top;
  stats->sum = sum_lanes(sum);
  stats->sum_z = sum_lanes(sum_z);
  stats->ref_max = ref_top;
  stats->ref_sum = sum_lanes(ref_sum);
  stats->sum_cross = sum_lanes(cross);
}

void tile_gradient_row(float* tile, const float* ref_tile, int64_t rows, int64_t row,
                       int64_t panels, int64_t first_column, const RowGradient* g,
                       float inv_temperature) {
  const F8 lse = splat(g->lse), ref_lse = splat(g->ref_lse), low = splat(kGapMin);
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t half = 0; half < kPanel; half += 8) {
      const int64_t at = (p * rows + row) * kPanel + half;
      const F8 logp = gap(load(tile + at), lse);
      const F8 prob = exp8(logp);
      F8 factor = splat(-g->d_logprob) - splat(g->d_entropy) * (logp + splat(g->entropy));
      if (ref_tile != nullptr) {
        const F8 rz = load(ref_tile + at) - ref_lse;
        const F8 logq = rz < low ? low : rz;
        factor = fma(splat(g->d_kl), logp - logq - splat(g->kl), factor);
      }
      store(tile + at, prob * factor * splat(inv_temperature));
    }
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
    store(e + p * kPanel, exp8(gap(load(z), top)));
    store(e + p * kPanel + 8, exp8(gap(load(z + 8), top)));
  }
}

}  // namespace

// `extern` in the header gives the table external linkage; its entries stay internal.
const Kernels kKernels = {
    .name = ALIGNPRO_ISA_NAME,
    .gemm_panel = gemm_panel,
    .pack_rows = pack_rows,
    .transpose_panels = transpose_panels,
    .rms_norm_row = rms_norm_row,
    .rms_norm_backward_row = rms_norm_backward_row,
    .swiglu_row = swiglu_row,
    .swiglu_backward_row = swiglu_backward_row,
    .rope_row = rope_row,
    .softmax_row = softmax_row,
    .dot = dot,
    .axpy = axpy,
    .scale_tile_row = scale_tile_row,
    .tile_stats_row = tile_stats_row,
    .tile_gradient_row = tile_gradient_row,
    .tile_exp_row = tile_exp_row,
};

}  // namespace alignpro::ops::cpu::ALIGNPRO_ISA
