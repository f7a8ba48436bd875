#include "core/rows.h"

#include <algorithm>
#include <array>

#include "kernels/kernels.h"

namespace ts {
namespace {

constexpr size_t kLanes = 16;
constexpr size_t kCacheLine = 64 / sizeof(float);
constexpr size_t kRowsAhead = 8;
constexpr size_t kPacked = 256;

template <size_t N>
using Arrays = std::array<float*, N>;

inline void prefetch_row(const float* row, size_t d) {
  for (size_t i = 0; i < d; i += kCacheLine) __builtin_prefetch(row + i, 1);
}

// A row of one element is a plain load or store; std::copy_n of an unknown length would be a call of memmove.
void gather_rows(float* packed, const float* array, const int64_t* rows, size_t count, size_t d) {
  for (size_t r = 0; r < count; ++r)
    if (d == 1)
      packed[r] = array[rows[r]];
    else
      std::copy_n(array + rows[r] * d, d, packed + r * d);
}

void scatter_rows(const float* packed, float* array, const int64_t* rows, size_t count, size_t d) {
  for (size_t r = 0; r < count; ++r)
    if (d == 1)
      array[rows[r]] = packed[r];
    else
      std::copy_n(packed + r * d, d, array + rows[r] * d);
}

template <size_t N, class Update>
void update_wide_rows(const Arrays<N>& arrays, const RowGrad& grad, size_t begin, size_t end, const Update& update) {
  for (size_t i = begin; i < end; ++i) {
    if (i + kRowsAhead < end)
      for (const float* array : arrays) prefetch_row(array + grad.rows[i + kRowsAhead] * grad.d, grad.d);
    Arrays<N> row;
    for (size_t k = 0; k < N; ++k) row[k] = arrays[k] + grad.rows[i] * grad.d;
    update(row, grad.values + i * grad.d, grad.d);
  }
}

template <size_t N, class Update>
void update_narrow_rows(const Arrays<N>& arrays, const RowGrad& grad, size_t begin, size_t end, const Update& update) {
  const size_t d = grad.d, rows_at_once = kPacked / d;
  float packed[N][kPacked];
  Arrays<N> block;
  for (size_t k = 0; k < N; ++k) block[k] = packed[k];
  for (size_t i = begin; i < end; i += rows_at_once) {
    const size_t count = std::min(rows_at_once, end - i);
    const int64_t* rows = grad.rows + i;
    for (size_t k = 0; k < N; ++k) gather_rows(packed[k], arrays[k], rows, count, d);
    update(block, grad.values + i * d, count * d);
    for (size_t k = 0; k < N; ++k) scatter_rows(packed[k], arrays[k], rows, count, d);
  }
}

// For rules that look at one element at a time. update(arrays, grad, n) gets n contiguous elements of each array.
template <size_t N, class Update>
void update_elements(const Arrays<N>& arrays, const RowGrad& grad, size_t begin, size_t end, const Update& update) {
  if (grad.d < kLanes)
    update_narrow_rows(arrays, grad, begin, end, update);
  else
    update_wide_rows(arrays, grad, begin, end, update);
}

}  // namespace

void lazy_adam_rows(const AdamScalars& scalars, float* weight, float* exp_avg, float* exp_avg_sq, const RowGrad& grad,
                    size_t begin, size_t end) {
  const auto adam = kernels().rows.adam;
  update_elements<3>({weight, exp_avg, exp_avg_sq}, grad, begin, end,
                     [&](const Arrays<3>& a, const float* g, size_t n) { adam(scalars, a[0], a[1], a[2], g, n); });
}

void rowwise_adagrad_rows(const AdagradScalars& scalars, float* weight, float* sum, const RowGrad& grad, size_t begin,
                          size_t end) {
  const auto adagrad = kernels().rows.rowwise_adagrad;
  const size_t d = grad.d;
  for (size_t i = begin; i < end; ++i) {
    if (i + kRowsAhead < end) {
      const int64_t next = grad.rows[i + kRowsAhead];
      __builtin_prefetch(sum + next, 1);
      prefetch_row(weight + next * d, d);
    }
    adagrad(scalars, weight + grad.rows[i] * d, sum + grad.rows[i], grad.values + i * d, d);
  }
}

void sgd_rows(const SgdScalars& scalars, float* weight, float* momentum_buffer, const RowGrad& grad, size_t begin,
              size_t end) {
  const auto sgd = kernels().rows.sgd;
  if (momentum_buffer == nullptr)
    update_elements<1>({weight}, grad, begin, end,
                       [&](const Arrays<1>& a, const float* g, size_t n) { sgd(scalars, a[0], nullptr, g, n); });
  else
    update_elements<2>({weight, momentum_buffer}, grad, begin, end,
                       [&](const Arrays<2>& a, const float* g, size_t n) { sgd(scalars, a[0], a[1], g, n); });
}

}  // namespace ts
