#pragma once

#include <cstdint>

#include "alignpro/core/parallel.h"

namespace alignpro::ops {

// h [rows, n] = silu(gate) * up, from gate_up [rows, 2n] = [gate | up] (Shazeer 2020).
void swiglu(int64_t rows, int64_t n, const float* gate_up, float* h, ThreadPool& pool);

// dgate_up [rows, 2n] from dh [rows, n]; may not alias gate_up.
void swiglu_backward(int64_t rows, int64_t n, const float* gate_up, const float* dh,
                     float* dgate_up, ThreadPool& pool);

// The same of h = gelu(gate) * up, with gelu()'s approximation.
void geglu(int64_t rows, int64_t n, const float* gate_up, float* h, ThreadPool& pool);
void geglu_backward(int64_t rows, int64_t n, const float* gate_up, const float* dh, float* dgate_up,
                    ThreadPool& pool);

}  // namespace alignpro::ops
