#pragma once

// The block of sm_90a (bodies/wgmma_tile.h says what it owes), and how a matrix is shown to TMA.
// Kernels that use it have a body where ALIGNPRO_ON_SM90A is defined: in the compiler's pass for
// sm_90a. products.h says when they are launched.

#if !defined(__CUDACC__)
#include "host_hopper.h"  // of the C++ tests
#else

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ALIGNPRO_ON_SM90A
#endif

#include <cuda.h>

#include "bodies/tile_product.h"
#include "bodies/wgmma_tile.h"
#include "device_block.h"
#include "launch.h"

namespace alignpro::cuda {

struct TensorMap {
  CUtensorMap map;
};

// m in boxes of 64 values of `box` rows. The driver's function is found at run time: nothing here
// links libcuda, which is not there where the build is.
inline TensorMap tensor_map(const char* op, const Operand<Bfloat16>& m, int box) {
  using Encode =
      CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                   const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                   CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [op] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                           cudaEnableDefault, &found),
          op);
    require<Unavailable>(found == cudaDriverEntryPointSuccess, "cuda: ", op,
                         ": expected a driver with cuTensorMapEncodeTiled (CUDA "
                         "12 or later), found none");
    return reinterpret_cast<Encode>(function);
  }();
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(m.depth), static_cast<cuuint64_t>(m.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(m.ld) * sizeof(Bfloat16)};
  const cuuint32_t boxes[] = {kStageDepth, static_cast<cuuint32_t>(box)}, steps[] = {1, 1};
  TensorMap made;
  const CUresult status =
      encode(&made.map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<Bfloat16*>(m.data), sizes,
             strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  require<Unavailable>(status == CUDA_SUCCESS, "cuda: ", op, ": cuTensorMapEncodeTiled refused [",
                       m.rows, ", ", m.depth, "] at a distance of ", m.ld, " (error ",
                       static_cast<int>(status), ")");
  return made;
}

// More shared memory than other GPUs have.
template <typename... Params, typename... Args>
void launch_hopper(const char* op, void (*kernel)(Params...), dim3 grid, int threads,
                   int shared_bytes, Stream stream, const Args&... args) {
  launch(op, kernel, grid, threads, shared_bytes, stream, args...);
}

// Operands and results of wgmma in text: 32 sums from d[j] on, and their places.
#define ALIGNPRO_FOUR(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define ALIGNPRO_SUMS(j)                                                              \
  ALIGNPRO_FOUR(j), ALIGNPRO_FOUR(j + 1), ALIGNPRO_FOUR(j + 2), ALIGNPRO_FOUR(j + 3), \
      ALIGNPRO_FOUR(j + 4), ALIGNPRO_FOUR(j + 5), ALIGNPRO_FOUR(j + 6), ALIGNPRO_FOUR(j + 7)
#define ALIGNPRO_PLACES_0                                                       \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, " \
  "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ALIGNPRO_PLACES_32                                                                \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
  "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ALIGNPRO_PLACES_64                                                                \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, " \
  "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define ALIGNPRO_PLACES_96                                                               \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "     \
  "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, " \
  "%124, %125, %126, %127"
// Added to what the sums hold, neither operand negated, both along the contraction.
#define ALIGNPRO_WGMMA(n, places, operands)                                            \
  "{\n.reg .pred keep;\nsetp.ne.b32 keep, 1, 0;\nwgmma.mma_async.sync.aligned.m64n" #n \
  "k16.f32.bf16.bf16 {" places "}, " operands ", keep, 1, 1, 0, 0;\n}"

class HopperBlock : public DeviceBlock {
 public:
  using Map = TensorMap;

  __device__ uint32_t shared_address(const void* shared) const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  }

  __device__ void init_barrier(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(arrivals)
                 : "memory");
  }
  __device__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __device__ void arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
                 : "memory");
  }
  __device__ void expect(uint64_t* barrier, int bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
  }
  __device__ void wait_phase(uint64_t* barrier, uint32_t parity) {
    uint32_t over = 0;
    while (over == 0) {
      asm volatile(
          "{\n.reg .pred over;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
          "selp.u32 %0, 1, 0, over;\n}"
          : "=r"(over)
          : "r"(shared_address(barrier)), "r"(parity)
          : "memory");
    }
  }

  __device__ void load_box(void* shared, const TensorMap& map, int64_t depth, int64_t row,
                           uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%2, %3}], [%4];" ::"r"(shared_address(shared)),
        "l"(&map.map), "r"(static_cast<int>(depth)), "r"(static_cast<int>(row)),
        "r"(shared_address(barrier))
        : "memory");
  }

  template <int kEights>
  __device__ void begin_products(float (&sums)[kEights][4]) {
    hold(sums);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  }
  __device__ void commit_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  }
  template <int kPending, int kEights>
  __device__ void wait_products(float (&sums)[kEights][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
    hold(sums);
  }
  __device__ void multiply_group(float (&d)[8][4], uint64_t a, uint64_t b) {
    asm volatile(ALIGNPRO_WGMMA(64, ALIGNPRO_PLACES_0, "%32, %33")
                 : ALIGNPRO_SUMS(0)
                 : "l"(a), "l"(b));
  }
  __device__ void multiply_group(float (&d)[16][4], uint64_t a, uint64_t b) {
    asm volatile(ALIGNPRO_WGMMA(128, ALIGNPRO_PLACES_0 ", " ALIGNPRO_PLACES_32, "%64, %65")
                 : ALIGNPRO_SUMS(0), ALIGNPRO_SUMS(8)
                 : "l"(a), "l"(b));
  }
  __device__ void multiply_group(float (&d)[32][4], uint64_t a, uint64_t b) {
    asm volatile(ALIGNPRO_WGMMA(256,
                                ALIGNPRO_PLACES_0 ", " ALIGNPRO_PLACES_32 ", " ALIGNPRO_PLACES_64
                                                  ", " ALIGNPRO_PLACES_96,
                                "%128, %129")
                 : ALIGNPRO_SUMS(0), ALIGNPRO_SUMS(8), ALIGNPRO_SUMS(16), ALIGNPRO_SUMS(24)
                 : "l"(a), "l"(b));
  }

  template <int kRegisters>
  __device__ void lower_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
  }
  template <int kRegisters>
  __device__ void raise_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
  }

 private:
  // Keeps the compiler from moving what reads or writes the sums over the products under way.
  template <int kEights>
  __device__ static void hold(float (&d)[kEights][4]) {
#pragma unroll
    for (int j = 0; j < kEights; ++j) asm volatile("" : ALIGNPRO_FOUR(j)::"memory");
  }
};

#undef ALIGNPRO_FOUR
#undef ALIGNPRO_SUMS
#undef ALIGNPRO_PLACES_0
#undef ALIGNPRO_PLACES_32
#undef ALIGNPRO_PLACES_64
#undef ALIGNPRO_PLACES_96
#undef ALIGNPRO_WGMMA

}  // namespace alignpro::cuda

#endif
