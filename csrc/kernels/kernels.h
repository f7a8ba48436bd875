// The inner loops, one set of function pointers for each instruction set, chosen once per process.
//
// Kernels manage no memory and no threads and throw nothing; csrc/core splits the work and hands them raw rows.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/hash_kernels.h"
#include "kernels/loss_kernels.h"
#include "kernels/row_kernels.h"
#include "kernels/sampled_kernels.h"

namespace ts {

struct Kernels {
  const char* isa;

  // sum_i x[i]^2 in sixteen interleaved chains and one fixed tree: bit-equal for every ISA.
  float (*squared_norm)(const float* x, size_t d);

  // sum_i a[i] * b[i] of bfloat16 values, summed in float32. Equal to rounding only: avx512bf16 has an order of its
  // own.
  float (*dot_bf16)(const uint16_t* a, const uint16_t* b, size_t n);

  HashKernels hash;
  LossKernels loss;
  SampledKernels<float> sampled;
  SampledKernels<uint16_t> sampled_bf16;
  RowKernels<float> rows;
  RowKernels<uint16_t> rows_bf16;
  SumEntries sum_entries;
};

// The widest set that this processor runs, or the one TORCH_SLIDE_ISA names (scalar, avx2, avx512, avx512bf16).
const Kernels& kernels();

// Why TORCH_SLIDE_ISA could not be obeyed; empty when all is well. The ops layer turns it into an exception.
const std::string& isa_error();

}  // namespace ts
