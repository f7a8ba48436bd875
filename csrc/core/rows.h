// The row-sparse updates on raw views: each works on a range of the given rows and touches no other row.
//
// Rows of a large layer lie at random places, so what an update waits for is memory. Every function asks for the rows
// a few places ahead of the one that it works on; narrow rows (d < 16, biases with d = 1 above all) are packed into
// full registers first.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/row_kernels.h"

namespace ts {

// grad is [n, d], its row i belongs to row rows[i] of the weight and the state; rows are distinct.
struct RowGrad {
  const int64_t* rows;
  const float* values;
  size_t d;
};

void lazy_adam_rows(const AdamScalars& scalars, float* weight, float* exp_avg, float* exp_avg_sq, const RowGrad& grad,
                    size_t begin, size_t end);

// sum has one element for every row of the weight.
void rowwise_adagrad_rows(const AdagradScalars& scalars, float* weight, float* sum, const RowGrad& grad, size_t begin,
                          size_t end);

// momentum_buffer may be null.
void sgd_rows(const SgdScalars& scalars, float* weight, float* momentum_buffer, const RowGrad& grad, size_t begin,
              size_t end);

}  // namespace ts
