// Instruction sets that fuse multiply and add give equal bits: AVX2, AVX-512 and AMX; on aarch64
// NEON and the portable kernels. Every kernel of all, on awkward sizes.

#include <algorithm>
#include <cmath>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <doctest/doctest.h>
#include "alignpro/core/cpu_isa.h"
#include "alignpro/core/error.h"
#include "alignpro/ops/cpu/kernels.h"
#include "alignpro/ops/cpu/panel_layout.h"
#include "alignpro/ops/quantized_panel.h"
#include "numbers.h"
#include "quantized_rows.h"

using namespace alignpro;
using namespace alignpro::ops;

namespace {

#if defined(__aarch64__)
constexpr CpuIsa kOne = CpuIsa::kGeneric, kOthers[] = {CpuIsa::kNeon};
#else
constexpr CpuIsa kOne = CpuIsa::kAvx2, kOthers[] = {CpuIsa::kAvx512, CpuIsa::kAmx};
#endif

bool has_several() { return machine_supports(kOne) && machine_supports(kOthers[0]); }

// What run(kernels, out) writes, which must be the same bits.
template <typename Run>
Floats agreed(size_t size, const Run& run) {
  Floats a(size, NAN);
  run(cpu::kernels_of(kOne), a.data());
  for (const CpuIsa other : kOthers) {
    if (!machine_supports(other)) continue;
    CAPTURE(cpu_isa_name(other));
    Floats b(size, -1.0f);
    run(cpu::kernels_of(other), b.data());
    CHECK(same_bits(a.data(), b.data(), size));
  }
  return a;
}

// The same of what run(kernels, row, more) does to a row in place, and writes beside it.
template <typename Run>
void agreed_rows(const Floats& row, size_t more, const Run& run) {
  agreed(row.size() + more, [&](const cpu::Kernels& k, float* out) {
    std::copy(row.begin(), row.end(), out);
    run(k, out, out + row.size());
  });
}

}  // namespace

TEST_CASE("isa is chosen or refused") {
  CHECK_EQ(choose_cpu_isa("generic"), CpuIsa::kGeneric);
  CHECK_THROWS_WITH_AS((void)(choose_cpu_isa("sse9")), doctest::Contains("sse9"), InvalidArgument);
  const auto compiled = compiled_isas();
  CpuIsa best = CpuIsa::kGeneric;
  for (const CpuIsa isa : {CpuIsa::kNeon, CpuIsa::kAvx2, CpuIsa::kAvx512, CpuIsa::kAmx}) {
    const bool has = std::find(compiled.begin(), compiled.end(), isa) != compiled.end();
    if (has && machine_supports(isa)) {
      best = isa;
      CHECK_EQ(choose_cpu_isa(cpu_isa_name(isa)), isa);
    } else {
      CHECK_THROWS_WITH_AS((void)(choose_cpu_isa(cpu_isa_name(isa))),
                           doctest::Contains(std::string(cpu_isa_name(isa)).c_str()), Unavailable);
    }
  }
  CHECK_EQ(choose_cpu_isa(""), best);
}

TEST_CASE("products agree to the bit") {
  if (!has_several()) return;
  const cpu::Kernels& one = cpu::kernels_of(kOne);
  CHECK(std::string_view(one.name) != cpu::kernels_of(kOthers[0]).name);
  const int64_t cols = 512, panels = 5, rows = 13;
  static_assert(rows <= cpu::kQuantizedGemvRows);
  const Floats x = normal(static_cast<size_t>(cpu::kQuantizedGemvRows * cols), 3);
  Floats tiles(static_cast<size_t>(18 * cols));
  one.pack_rows(rows, cols, x.data(), cols, 1, tiles.data());
  for (const DType stored : kAllTypes) {
    const auto bytes = quantized_rows(stored, panels * 16, cols, 4);
    const auto source = rows_in(stored, bytes, cols);
    const DType dtype = cpu::panel_type(stored);
    const int64_t stride = cpu::panel_bytes(dtype, cols);
    std::vector<std::byte> packed(static_cast<size_t>(panels * stride));
    for (size_t p = 0; p < panels; ++p) {
      std::byte* to = packed.data() + static_cast<int64_t>(p) * stride;
      if (dtype == DType::kF32) {
        one.pack_panel(
            reinterpret_cast<const float*>(bytes.data()) + static_cast<int64_t>(p) * 16 * cols,
            cols, 16, cols, reinterpret_cast<float*>(to));
      } else {
        pack_quantized_panel(dtype, std::span(source).subspan(p * 16, 16), cols, to);
      }
    }
    const Floats panel = agreed(static_cast<size_t>(cols * 16), [&](const auto& k, float* out) {
      k.expand_panel(dtype, packed.data(), cols, 0, cols, out);
    });
    for (int64_t few = 1; few <= cpu::kQuantizedGemvRows; ++few) {
      agreed(static_cast<size_t>(panels * few * 16), [&](const auto& k, float* out) {
        k.stream_panels(dtype, packed.data(), stride, panels, cols, few, x.data(), cols, out);
      });
    }
    agreed(static_cast<size_t>(rows * 16), [&](const auto& k, float* out) {
      k.gemm_panel(rows, cols, tiles.data(), 6 * cols, panel.data(), 16, out, false, false);
      k.gemm_panel(rows, cols, tiles.data(), 6 * cols, panel.data(), 16, out, true, true);
    });
    const float* const three[] = {panel.data(), panel.data() + 16, panel.data() + 32};
    for (int64_t few = 1; few <= cpu::kGemvRows; ++few) {
      agreed(static_cast<size_t>(few * 48), [&](const auto& k, float* out) {
        k.gemv(few, cols - 2, tiles.data(), three, 3, 16, out, 48, 16, false);
        k.gemv(few, cols - 2, tiles.data(), three, 3, 16, out, 48, 16, true);
      });
    }
    if (!cpu::is_quantized(dtype)) continue;
    const int64_t tile = cols / cpu::kGroup * cpu::kInt8GroupBytes;
    const int64_t most = 27;
    const Floats many = normal(static_cast<size_t>(most * cols), 5);
    const Floats codes = agreed(static_cast<size_t>(tile / 2), [&](const auto& k, float* out) {
      auto* to = reinterpret_cast<uint8_t*>(out);
      k.quantize_rows(cpu::kInt8TileRows, cols, many.data(), cols, to);
      k.quantize_rows(most - cpu::kInt8TileRows, cols, many.data() + cpu::kInt8TileRows * cols,
                      cols, to + tile);
    });
    // Few rows, and whole tiles and parts of them.
    for (const int64_t live : {int64_t{1}, int64_t{7}, rows, cpu::kInt8TileRows, most}) {
      agreed(static_cast<size_t>(live * 16 + 1), [&](const auto& k, float* out) {
        out[live * 16] = 1.0f;  // and not beyond them
        k.int8_gemm(dtype, live, cols, reinterpret_cast<const uint8_t*>(codes.data()), tile,
                    packed.data(), out);
      });
    }
  }
}

TEST_CASE("what is packed and stored agrees to the bit") {
  if (!has_several()) return;
  const Floats x = normal(40 * 23, 1), bias = normal(16, 2);
  agreed(18 * 23, [&](const auto& k, float* out) { k.pack_rows(13, 23, x.data(), 23, 1, out); });
  agreed(18 * 23, [&](const auto& k, float* out) { k.pack_rows(13, 23, x.data(), 1, 40, out); });
  for (const int64_t rows : {11, 16}) {
    agreed(23 * 16, [&](const auto& k, float* out) { k.pack_panel(x.data(), 23, rows, 23, out); });
  }
  for (const int64_t begin : {0, 16}) {  // of panels [2][23][16]
    agreed(24 * 16,
           [&](const auto& k, float* out) { k.transpose_panels(x.data(), 23, 24, begin, out); });
  }
  for (const int64_t columns : {11, 16}) {
    agreed_rows(normal(5 * 16, 3), 0, [&](const auto& k, float* out, float*) {
      k.store_tile(x.data(), 5, columns, 0.3f, bias.data(), x.data() + 100, out, 16);
    });
  }
}

TEST_CASE("rows agree to the bit") {
  if (!has_several()) return;
  for (const int64_t n : {1, 15, 16, 100}) {
    const auto size = static_cast<size_t>(n);
    const Floats row = normal(size, 1, 3.0f), w = normal(size, 2), d = normal(size, 3);
    agreed_rows(row, size + 1, [&](const auto& k, float* x, float* y) {
      y[n] = k.rms_norm_row(x, w.data(), n, 1e-6f, y);
    });
    agreed_rows(row, 0, [&](const auto& k, float* x, float*) {
      k.rms_norm_backward_row(d.data(), w.data(), row.data(), 0.7f, n, x);
    });
    agreed_rows(row, size,
                [&](const auto& k, float* x, float* y) { k.swiglu_row(x, w.data(), n, y); });
    agreed_rows(row, size,
                [&](const auto& k, float* x, float* y) { k.geglu_row(x, w.data(), n, y); });
    agreed_rows(row, 2 * size, [&](const auto& k, float* x, float* y) {
      k.geglu_backward_row(x, w.data(), d.data(), n, y, y + n);
    });
    agreed_rows(row, 2 * size, [&](const auto& k, float* x, float* y) {
      k.swiglu_backward_row(x, w.data(), d.data(), n, y, y + n);
    });
    agreed_rows(row, 0,
                [&](const auto& k, float* x, float*) { k.rope_row(x, w.data(), d.data(), n / 2); });
    agreed_rows(row, 1, [&](const auto& k, float* x, float* y) { *y = k.dot(x, w.data(), n); });
    agreed_rows(row, 0, [&](const auto& k, float* x, float*) { k.axpy(0.3f, w.data(), n, x); });
    agreed_rows(normal((size + 15) / 16 * 16, 4), 2, [&](const auto& k, float* x, float* y) {
      k.softmax_row(x, n / 3, n, 0.7f, y, y + 1);
    });
  }
}

TEST_CASE("half floats agree to the bit") {
  if (!has_several()) return;
  Floats x = normal(100, 1);
  const float edges[] = {0.0f,   -0.0f,    0x1p-24f, 0x1p-25f, 0x1.8p-24f, 0x1.ff8p-15f,
                         -2e-6f, 65519.0f, 65520.0f, INFINITY, -INFINITY};
  std::copy(std::begin(edges), std::end(edges), x.begin());
  agreed_rows(x, 1 + 50, [&](const auto& k, float* row, float* out) {
    auto* halves = reinterpret_cast<uint16_t*>(out + 1);
    *out = k.to_halves(row, 100, halves) ? 1.0f : 0.0f;
    k.from_halves(halves, 100, row);
  });
}

TEST_CASE("vocabulary tiles agree to the bit") {
  if (!has_several()) return;
  const int64_t rows = 3, row = 1, panels = 4;
  const Floats tile = normal(static_cast<size_t>(rows * panels * 16), 1, 3.0f);
  Floats scaled = tile, reference = normal(tile.size(), 2, 3.0f);
  cpu::kernels_of(kOne).scale_tile_row(scaled.data(), rows, row, panels, 55, 1.3f);
  cpu::kernels_of(kOne).scale_tile_row(reference.data(), rows, row, panels, 55, 1.3f);
  agreed_rows(tile, 0, [&](const auto& k, float* z, float*) {
    k.scale_tile_row(z, rows, row, panels, 55, 1.3f);
  });
  agreed_rows(scaled, static_cast<size_t>(panels * 16), [&](const auto& k, float* z, float* e) {
    k.tile_exp_row(z, rows, row, panels, 5.0f, e);
  });
  const RowGradient gradient = {4.0f, 1e-7f, 3.9f, -1e-7f, 2.0f,  0.5f, 0.4f,
                                0.3f, 0.2f,  0.1f, 0.6f,   -0.7f, 20};
  RowGradient plain = gradient;
  plain.d_reverse_kl = plain.d_total_variation = 0.0f;
  for (const bool with_reference : {false, true}) {
    const float* q = with_reference ? reference.data() : nullptr;
    agreed_rows(scaled, sizeof(TileStats) / 4, [&](const auto& k, float* z, float* stats) {
      k.tile_stats_row(z, q, rows, row, panels, reinterpret_cast<TileStats*>(stats));
    });
    for (const RowGradient& g : {plain, gradient}) {
      agreed_rows(scaled, 0, [&](const auto& k, float* z, float*) {
        k.tile_gradient_row(z, q, rows, row, panels, 16, &g, 1.3f);
      });
    }
    agreed_rows(scaled, reference.size(), [&](const auto& k, float* z, float* r) {
      std::copy(reference.begin(), reference.end(), r);
      k.tile_weights_row(z, with_reference ? r : nullptr, rows, row, panels, 5.0f, 0.3f, 0.2f);
    });
  }
  agreed_rows(scaled, 2, [&](const auto& k, float* z, float* sums) {
    k.tile_variation_row(z, reference.data(), rows, row, panels, &gradient, sums, sums + 1);
  });
}
