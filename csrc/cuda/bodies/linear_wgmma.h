#pragma once

// A linear layer by the tiles of wgmma_tile.h. The adapter's product comes first and is scaled
// where it stands; the layer's own chain goes on from there, so that one set of sums serves both.

#include <cstdint>

#include "linear.h"
#include "wgmma_tile.h"

namespace alignpro::cuda {

template <typename Map>
struct LinearWgmma {
  Map x, weight, lora_x, lora_up;  // the last two where kLora
  int box_rows;                    // of x and lora_x
  Linear<Bfloat16> layer;
};

template <typename Tile, typename Block>
ALIGNPRO_BODY void store_linear(Block& block, const Linear<Bfloat16>& layer, int64_t row,
                                int64_t column, const typename Tile::Sums& sums) {
  const WgmmaShare<Tile> share(block.thread());
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t r = row + share.row + 8 * h;
    if (r >= layer.x.rows) continue;
#pragma unroll
    for (int j = 0; j < Tile::kColumns / 8; ++j) {
      const int64_t c = column + share.column + 8 * j;
      if (c >= layer.weight.rows) continue;  // whole pairs: rows are multiples of a Pack
      float first = sums[j][2 * h], second = sums[j][2 * h + 1];
      if (layer.bias != nullptr) {
        first += to_float(layer.bias[c]);
        second += to_float(layer.bias[c + 1]);
      }
      if (layer.residual.data != nullptr) {
        const uint32_t pair =
            *reinterpret_cast<const uint32_t*>(layer.residual.data + r * layer.residual.ld + c);
        first += to_float(Bfloat16{static_cast<uint16_t>(pair)});
        second += to_float(Bfloat16{static_cast<uint16_t>(pair >> 16)});
      }
      store_pair(block, layer.out.data + r * layer.out.ld + c, first, second);
    }
  }
}

// Tiles block_index, block_index + blocks, ... of the layer.
template <typename Tile, bool kLora, typename Block>
ALIGNPRO_BODY void linear_wgmma_tiles(Block& block, const LinearWgmma<typename Block::Map>& args,
                                      int64_t block_index, int64_t blocks, unsigned char* shared) {
  const Linear<Bfloat16>& layer = args.layer;
  const TileOrder order{(layer.x.rows + Tile::kRows - 1) / Tile::kRows,
                        (layer.weight.rows + Tile::kColumns - 1) / Tile::kColumns};
  const WgmmaShare<Tile> share(block.thread());
  Ring<Tile> ring = make_ring<Tile>(block, shared);
  share_registers<Tile>(block, share.produces);
  if (share.produces) {
    if (!share.copies) return;
    for (int64_t tile = block_index; tile < order.count(); tile += blocks) {
      int64_t row, column;
      order.at(tile, &row, &column);
      row *= Tile::kRows;
      column *= Tile::kColumns;
      if constexpr (kLora) {
        copy_operands(block, ring, row, column, layer.lora_x.depth, args.box_rows, args.lora_up,
                      args.lora_x);
      }
      copy_operands(block, ring, row, column, layer.x.depth, args.box_rows, args.weight, args.x);
    }
    return;
  }
  for (int64_t tile = block_index; tile < order.count(); tile += blocks) {
    int64_t row, column;
    order.at(tile, &row, &column);
    typename Tile::Sums sums;
    clear(sums);
    if constexpr (kLora) {
      multiply_operands(block, ring, layer.lora_x.depth, sums);
#pragma unroll
      for (auto& four : sums) {
#pragma unroll
        for (float& sum : four) sum *= layer.lora_scale;
      }
    }
    multiply_operands(block, ring, layer.x.depth, sums);
    store_linear<Tile>(block, layer, row * Tile::kRows, column * Tile::kColumns, sums);
  }
}

}  // namespace alignpro::cuda
