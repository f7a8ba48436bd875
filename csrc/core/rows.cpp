#include "core/rows.h"

#include <algorithm>
#include <array>

#include "core/random.h"
#include "kernels/kernels.h"

namespace ts {
namespace {

constexpr size_t kLanes = 16;
constexpr size_t kCacheLine = 64;
constexpr size_t kRowsAhead = 8;
constexpr size_t kPacked = 256;

template <typename T, size_t N>
using Arrays = std::array<T*, N>;

const RowKernels<float>& kernels_of(const float*) { return kernels().rows; }
const RowKernels<uint16_t>& kernels_of(const uint16_t*) { return kernels().rows_bf16; }

template <typename T>
void prefetch_row(const T* row, size_t d) {
  const char* const bytes = reinterpret_cast<const char*>(row);
  for (size_t at = 0; at < d * sizeof(T); at += kCacheLine) __builtin_prefetch(bytes + at, 1);
}

// The random numbers of a step depend on an element's place among those given, not on how these are cut into ranges.
class Roundings {
 public:
  Roundings(uint64_t step, size_t d) : key_(static_cast<uint32_t>(Stream(step, kPurpose).bits(0))), d_(d) {}
  Rounding from_row(size_t i) const { return {key_, static_cast<uint32_t>(i * d_)}; }

 private:
  static constexpr uint64_t kPurpose = 2;
  uint32_t key_;
  size_t d_;
};

// A row of one element is a plain load or store; std::copy_n of an unknown length would be a call of memmove.
template <typename T>
void copy_row(T* to, const T* from, size_t d) {
  if (d == 1)
    *to = *from;
  else
    std::copy_n(from, d, to);
}

template <typename T, size_t N, class Update>
void update_wide_rows(const Arrays<T, N>& arrays, const RowGrad<T>& grad, size_t begin, size_t end,
                      const Update& update) {
  for (size_t i = begin; i < end; ++i) {
    if (i + kRowsAhead < end)
      for (const T* array : arrays) prefetch_row(array + grad.rows[i + kRowsAhead] * grad.d, grad.d);
    Arrays<T, N> row;
    for (size_t k = 0; k < N; ++k) row[k] = arrays[k] + grad.rows[i] * grad.d;
    update(row, i, size_t{1});
  }
}

template <typename T, size_t N, class Update>
void update_narrow_rows(const Arrays<T, N>& arrays, const RowGrad<T>& grad, size_t begin, size_t end,
                        const Update& update) {
  const size_t d = grad.d, rows_at_once = kPacked / d;
  T packed[N][kPacked];
  Arrays<T, N> block;
  for (size_t k = 0; k < N; ++k) block[k] = packed[k];
  for (size_t i = begin; i < end; i += rows_at_once) {
    const size_t count = std::min(rows_at_once, end - i);
    const int64_t* const rows = grad.rows + i;
    for (size_t k = 0; k < N; ++k)
      for (size_t r = 0; r < count; ++r) copy_row(packed[k] + r * d, arrays[k] + rows[r] * d, d);
    update(block, i, count);
    for (size_t k = 0; k < N; ++k)
      for (size_t r = 0; r < count; ++r) copy_row(arrays[k] + rows[r] * d, packed[k] + r * d, d);
  }
}

// For rules that look at one element at a time. update(arrays, first, count) gets the elements of `count` of the given
// rows from `first` on, side by side.
template <typename T, size_t N, class Update>
void update_elements(const Arrays<T, N>& arrays, const RowGrad<T>& grad, size_t begin, size_t end,
                     const Update& update) {
  if (grad.d < kLanes)
    update_narrow_rows(arrays, grad, begin, end, update);
  else
    update_wide_rows(arrays, grad, begin, end, update);
}

// For rules with one number a row, which are asked for ahead as well.
template <typename T, size_t N, class Update>
void update_rows(const Arrays<T, N>& arrays, const float* of_rows, const RowGrad<T>& grad, size_t begin, size_t end,
                 const Update& update) {
  update_wide_rows(arrays, grad, begin, end, [&](const Arrays<T, N>& row, size_t i, size_t) {
    if (i + kRowsAhead < end) __builtin_prefetch(of_rows + grad.rows[i + kRowsAhead], 1);
    update(row, i);
  });
}

}  // namespace

template <typename T>
void lazy_adam_rows(const AdamScalars& scalars, T* weight, T* exp_avg, T* exp_avg_sq, const RowGrad<T>& grad,
                    uint64_t step, size_t begin, size_t end) {
  const auto adam = kernels_of(weight).adam;
  const Roundings roundings(step, grad.d);
  const auto update = [&](T* w, T* m, T* v, size_t i, size_t count) {
    adam(scalars, w, m, v, grad.values + i * grad.d, count * grad.d, roundings.from_row(i));
  };
  if (exp_avg == nullptr)
    update_elements<T, 2>({weight, exp_avg_sq}, grad, begin, end,
                          [&](const auto& a, size_t i, size_t count) { update(a[0], nullptr, a[1], i, count); });
  else
    update_elements<T, 3>({weight, exp_avg, exp_avg_sq}, grad, begin, end,
                          [&](const auto& a, size_t i, size_t count) { update(a[0], a[1], a[2], i, count); });
}

template <typename T>
void rowwise_adam_rows(const AdamScalars& scalars, T* weight, T* exp_avg, float* exp_avg_sq, const RowGrad<T>& grad,
                       uint64_t step, size_t begin, size_t end) {
  const auto adam = kernels_of(weight).rowwise_adam;
  const Roundings roundings(step, grad.d);
  const auto update = [&](T* w, T* m, size_t i) {
    adam(scalars, w, m, exp_avg_sq + grad.rows[i], grad.values + i * grad.d, grad.d, roundings.from_row(i));
  };
  if (exp_avg == nullptr)
    update_rows<T, 1>({weight}, exp_avg_sq, grad, begin, end,
                      [&](const auto& a, size_t i) { update(a[0], nullptr, i); });
  else
    update_rows<T, 2>({weight, exp_avg}, exp_avg_sq, grad, begin, end,
                      [&](const auto& a, size_t i) { update(a[0], a[1], i); });
}

template <typename T>
void rowwise_adagrad_rows(const AdagradScalars& scalars, T* weight, float* sum, const RowGrad<T>& grad, uint64_t step,
                          size_t begin, size_t end) {
  const auto adagrad = kernels_of(weight).rowwise_adagrad;
  const Roundings roundings(step, grad.d);
  update_rows<T, 1>({weight}, sum, grad, begin, end, [&](const auto& a, size_t i) {
    adagrad(scalars, a[0], sum + grad.rows[i], grad.values + i * grad.d, grad.d, roundings.from_row(i));
  });
}

template <typename T>
void sgd_rows(const SgdScalars& scalars, T* weight, T* momentum_buffer, const RowGrad<T>& grad, uint64_t step,
              size_t begin, size_t end) {
  const auto sgd = kernels_of(weight).sgd;
  const Roundings roundings(step, grad.d);
  const auto update = [&](T* w, T* buffer, size_t i, size_t count) {
    sgd(scalars, w, buffer, grad.values + i * grad.d, count * grad.d, roundings.from_row(i));
  };
  if (momentum_buffer == nullptr)
    update_elements<T, 1>({weight}, grad, begin, end,
                          [&](const auto& a, size_t i, size_t count) { update(a[0], nullptr, i, count); });
  else
    update_elements<T, 2>({weight, momentum_buffer}, grad, begin, end,
                          [&](const auto& a, size_t i, size_t count) { update(a[0], a[1], i, count); });
}

#define TS_INSTANTIATE(T)                                                                                             \
  template void lazy_adam_rows(const AdamScalars&, T*, T*, T*, const RowGrad<T>&, uint64_t, size_t, size_t);          \
  template void rowwise_adam_rows(const AdamScalars&, T*, T*, float*, const RowGrad<T>&, uint64_t, size_t, size_t);   \
  template void rowwise_adagrad_rows(const AdagradScalars&, T*, float*, const RowGrad<T>&, uint64_t, size_t, size_t); \
  template void sgd_rows(const SgdScalars&, T*, T*, const RowGrad<T>&, uint64_t, size_t, size_t);
TS_INSTANTIATE(float)
TS_INSTANTIATE(uint16_t)
#undef TS_INSTANTIATE

}  // namespace ts
