// The inner loops, one set of function pointers for each instruction set, chosen once per process.
//
// Kernels manage no memory and no threads and throw nothing; csrc/core splits the work and hands them raw rows.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/row_kernels.h"

namespace ts {

struct Kernels {
  const char* isa;

  // y[r, p] = sum_i x[r, i] * m[i, p], each sum one fused chain over ascending i: bit-equal for every ISA.
  // x is [n, d], m is [d, p] with p a multiple of 16, y is [n, p].
  void (*project)(const float* x, size_t n, size_t d, const float* m, size_t p, float* y);

  // sum_i x[i]^2 in sixteen interleaved chains and one fixed tree: bit-equal for every ISA.
  float (*squared_norm)(const float* x, size_t d);

  RowKernels rows;
};

// The widest set that this processor runs, or the one TORCH_SLIDE_ISA names (scalar, avx2, avx512, avx512bf16).
const Kernels& kernels();

// Why TORCH_SLIDE_ISA could not be obeyed; empty when all is well. The ops layer turns it into an exception.
const char* isa_error();

}  // namespace ts
