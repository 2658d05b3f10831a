// Part of kernels-inl.h: integer products of many rows in AMX's tiles. Sums are the integers of
// int8-inl.h and are scaled in its order, so bits are the same.

// What ldtilecfg reads.
struct alignas(64) TileShapes {
  uint8_t palette = 1, first_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// From so many rows on a tile is faster, its empty rows included. It is not where a group has two
// scales, and so twice the tiles to store.
constexpr int64_t kAmxRows = 12;

template <DType D>
__attribute__((target("amx-tile,amx-int8"))) void amx_gemm_of(int64_t rows, int64_t cols,
                                                              const uint8_t* x, int64_t x_stride,
                                                              const uint8_t* panel, float* c) {
  constexpr Int8Form kForm = int8_form(D);
  constexpr int64_t kGroups = kContract / kGroup;
  alignas(64) uint8_t codes[kGroups * kForm.group_bytes()];
  alignas(64) int32_t sums[kGroups][kInt8TileRows][kPanel];
  TileShapes shapes;
  shapes.rows[0] = shapes.rows[2] = kInt8TileRows;
  shapes.rows[1] = kGroup / 4;
  shapes.row_bytes[0] = kGroup;
  shapes.row_bytes[1] = shapes.row_bytes[2] = 4 * kPanel;
  // GCC 12 does not know that the tile intrinsics read memory: what they read is written first.
  asm volatile("" : : "r"(&shapes) : "memory");
  _tile_loadconfig(&shapes);
  for (int64_t k = 0; k < cols; k += kContract) {
    const int64_t groups = (cols - k < kContract ? cols - k : kContract) / kGroup;
    expand_int8<D>(panel, cols, k, groups * kGroup, codes);
    constexpr int64_t kStored = panel_layout(D).group_bytes();
    const uint8_t* next = panel + panel_bytes(D, cols) + k / kGroup * kStored;  // the next panel's
    for (int64_t at = 0; at < groups * kStored; at += 64) __builtin_prefetch(next + at, 0, 2);
    asm volatile("" : : "r"(codes) : "memory");
    for (int64_t row = 0; row < rows; row += kInt8TileRows) {
      const uint8_t* tile = x + row / kInt8TileRows * x_stride + k / kGroup * kInt8GroupBytes;
      for (int64_t g = 0; g < groups; ++g) {
        _tile_loadd(0, tile + g * kInt8GroupBytes, kGroup);
        _tile_loadd(1, codes + g * kForm.group_bytes(), 4 * kPanel);
        _tile_zero(2);
        _tile_dpbsud(2, 0, 1);
        _tile_stored(2, sums[g], 4 * kPanel);
      }
      for (int64_t first = 0; first < kInt8TileRows; first += kInt8Rows) {
        float* to = c + (row + first) * kPanel;
        with_count<kInt8Rows>(rows - row - first, [&](auto live) __attribute__((always_inline)) {
          constexpr int kRows = decltype(live)::kValue;
          add_groups<kForm, kRows>(groups, tile, first, codes, to, k > 0,
                                   [&](int64_t g, int, WideInts(&of)[kRows][kParts])
                                       __attribute__((always_inline)) {
#pragma GCC unroll 8
                                         for (int r = 0; r < kRows; ++r)
                                           std::memcpy(of[r], sums[g][first + r], 64);
                                       });
        });
      }
    }
  }
  _tile_release();
}

void amx_gemm(DType dtype, int64_t rows, int64_t cols, const uint8_t* x, int64_t x_stride,
              const void* panel, float* c) {
  with_dtype(dtype, [&](auto type) __attribute__((always_inline)) {
    constexpr DType kType = decltype(type)::kValue;
    if constexpr (is_quantized(kType) && scales_of_group(kType) == 1) {
      if (rows >= kAmxRows) {
        return amx_gemm_of<kType>(rows, cols, x, x_stride, static_cast<const uint8_t*>(panel), c);
      }
    }
    int8_gemm(dtype, rows, cols, x, x_stride, panel, c);
  });
}
