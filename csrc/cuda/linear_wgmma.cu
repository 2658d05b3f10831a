// linear on sm_90: tiles of 128 x 256; half as wide where those would leave multiprocessors idle;
// 64 x 64 for up to 64 rows, where more blocks read the weight and twelve stages have room. A block
// a multiprocessor takes tiles in turn; its producer fills stages of the next tile while the last
// one is stored.

#include "bodies/linear_wgmma.h"
#include "hopper.h"
#include "wgmma.h"

namespace alignpro::cuda {
namespace {

using ManyRows = WgmmaTile<2, 256, 4>;
using SomeRows = WgmmaTile<2, 128, 6>;
using GemvRows = WgmmaTile<1, 64, 12>;

template <typename Tile, bool kLora>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    linear_wgmma_kernel(const __grid_constant__ LinearWgmma<TensorMap> args) {
#if defined(ALIGNPRO_ON_SM90A)
  ALIGNPRO_DYNAMIC_SHARED(shared);
  HopperBlock block;
  linear_wgmma_tiles<Tile, kLora>(block, args, blockIdx.x, gridDim.x, shared);
#endif
}

template <typename Tile>
int64_t tiles_of(const Linear<Bfloat16>& layer) {
  return (layer.x.rows + Tile::kRows - 1) / Tile::kRows *
         ((layer.weight.rows + Tile::kColumns - 1) / Tile::kColumns);
}

template <typename Tile>
void launch_tiles(const char* op, const Linear<Bfloat16>& layer, bool with_lora, Stream stream) {
  LinearWgmma<TensorMap> args = {};
  args.layer = layer;
  args.box_rows = box_rows<Tile>(layer.x.rows);
  args.x = tensor_map(op, layer.x, args.box_rows);
  args.weight = tensor_map(op, layer.weight, Tile::kColumns);
  if (with_lora) {
    args.lora_x = tensor_map(op, layer.lora_x, args.box_rows);
    args.lora_up = tensor_map(op, layer.lora_up, Tile::kColumns);
  }
  launch_hopper(op, with_lora ? linear_wgmma_kernel<Tile, true> : linear_wgmma_kernel<Tile, false>,
                persistent_grid(tiles_of<Tile>(layer)), Tile::kThreads, Tile::kSharedBytes, stream,
                args);
}

}  // namespace

void linear_wgmma(const char* op, const Linear<Bfloat16>& layer, bool with_lora, Stream stream) {
  if (layer.x.rows == 0 || layer.weight.rows == 0) return;  // TMA takes no empty matrix
  if (layer.x.rows <= GemvRows::kRows) {
    launch_tiles<GemvRows>(op, layer, with_lora, stream);
  } else if (tiles_of<ManyRows>(layer) < multiprocessors()) {
    launch_tiles<SomeRows>(op, layer, with_lora, stream);
  } else {
    launch_tiles<ManyRows>(op, layer, with_lora, stream);
  }
}

}  // namespace alignpro::cuda
