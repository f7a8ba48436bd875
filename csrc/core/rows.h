// The row-sparse updates on raw views: each works on a range of the given rows and touches no other row.
//
// Rows of a large layer lie at random places, so what an update waits for is memory. Every function asks for the rows
// a few places ahead of the one that it works on; narrow rows (d < 16, biases with d = 1 above all) are packed into
// full registers first. Rows stored in bfloat16 (uint16_t here) are float32 while they are worked on, and go back
// rounded at random, so that updates smaller than the distance of two numbers count on average.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/row_kernels.h"

namespace ts {

// grad is [n, d], its row i belongs to row rows[i] of the weight and the state; rows are distinct.
template <typename T>
struct RowGrad {
  const int64_t* rows;
  const T* values;
  size_t d;
};

// `step` is the number that rounding depends on, besides the place of a row among the given ones. Adam's exp_avg may be
// null if beta1 is 0.
template <typename T>
void lazy_adam_rows(const AdamScalars& scalars, T* weight, T* exp_avg, T* exp_avg_sq, const RowGrad<T>& grad,
                    uint64_t step, size_t begin, size_t end);

// exp_avg_sq has one element for every row of the weight.
template <typename T>
void rowwise_adam_rows(const AdamScalars& scalars, T* weight, T* exp_avg, float* exp_avg_sq, const RowGrad<T>& grad,
                       uint64_t step, size_t begin, size_t end);

// sum has one element for every row of the weight.
template <typename T>
void rowwise_adagrad_rows(const AdagradScalars& scalars, T* weight, float* sum, const RowGrad<T>& grad, uint64_t step,
                          size_t begin, size_t end);

// momentum_buffer may be null.
template <typename T>
void sgd_rows(const SgdScalars& scalars, T* weight, T* momentum_buffer, const RowGrad<T>& grad, uint64_t step,
              size_t begin, size_t end);

}  // namespace ts
