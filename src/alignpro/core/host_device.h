#pragma once

// Marks what a CUDA compiler builds for both sides, so that a header says once what host and device
// compute. To any other compiler these are nothing.
#if defined(__CUDACC__)
#define ALIGNPRO_HOST_DEVICE __host__ __device__
// For templates over a caller's function, which may exist on one side only.
#define ALIGNPRO_ANY_SIDE _Pragma("nv_exec_check_disable")
#else
#define ALIGNPRO_HOST_DEVICE
#define ALIGNPRO_ANY_SIDE
#endif
