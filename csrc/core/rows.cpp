#include "core/rows.h"

#include <algorithm>
#include <array>
#include <type_traits>
#include <vector>

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

template <typename T>
constexpr bool kStoredWide = std::is_same_v<T, float>;

template <typename T>
void prefetch_row(const T* row, size_t d) {
  const char* const bytes = reinterpret_cast<const char*>(row);
  for (size_t at = 0; at < d * sizeof(T); at += kCacheLine) __builtin_prefetch(bytes + at, 1);
}

// A row of one element is a plain load or store; std::copy_n of an unknown length would be a call of memmove.
template <typename T>
void copy_row(T* to, const T* from, size_t d) {
  if (d == 1)
    *to = *from;
  else
    std::copy_n(from, d, to);
}

// Some of the given rows of N arrays and their gradients, side by side in float32.
template <typename T, size_t N>
class Packed {
 public:
  Packed(const Arrays<T, N>& arrays, const RowGrad<T>& grad, uint64_t step, size_t most)
      : arrays_(arrays),
        grad_(grad),
        stride_(most * grad.d),
        narrow_(grad.d < kLanes ? stride_ : 0),
        wide_((N + 1) * stride_) {
    for (size_t k = 0; k < N; ++k) keys_[k] = static_cast<uint32_t>(Stream(step, kRounding).bits(k));
  }

  float* array(size_t k) { return wide_.data() + k * stride_; }

  const float* gradients(size_t first, size_t count) {
    const T* const values = grad_.values + first * grad_.d;
    if constexpr (kStoredWide<T>) {
      return values;
    } else {
      kernels().rows.widen(values, array(N), count * grad_.d);
      return array(N);
    }
  }

  void gather(size_t first, size_t count) {
    const size_t d = grad_.d;
    for (size_t k = 0; k < N; ++k) {
      const auto row = [&](size_t r) { return arrays_[k] + grad_.rows[first + r] * d; };
      if (d >= kLanes) {
        for (size_t r = 0; r < count; ++r) widen(row(r), array(k) + r * d, d);
      } else {
        for (size_t r = 0; r < count; ++r) copy_row(narrow_.data() + r * d, row(r), d);
        widen(narrow_.data(), array(k), count * d);
      }
    }
  }

  void scatter(size_t first, size_t count) {
    const size_t d = grad_.d;
    for (size_t k = 0; k < N; ++k) {
      const auto row = [&](size_t r) { return arrays_[k] + grad_.rows[first + r] * d; };
      if (d >= kLanes) {
        for (size_t r = 0; r < count; ++r) round(k, array(k) + r * d, row(r), first + r, d);
      } else {
        round(k, array(k), narrow_.data(), first, count * d);
        for (size_t r = 0; r < count; ++r) copy_row(row(r), narrow_.data() + r * d, d);
      }
    }
  }

 private:
  static constexpr uint64_t kRounding = 2;

  static void widen(const float* x, float* out, size_t n) { std::copy_n(x, n, out); }
  static void widen(const uint16_t* x, float* out, size_t n) { kernels().rows.widen(x, out, n); }

  void round(size_t, const float* x, float* out, size_t, size_t n) const { std::copy_n(x, n, out); }
  void round(size_t k, const float* x, uint16_t* out, size_t first, size_t n) const {
    kernels().rows.round_stochastically(x, out, n, keys_[k], static_cast<uint32_t>(first * grad_.d));
  }

  const Arrays<T, N>& arrays_;
  const RowGrad<T>& grad_;
  size_t stride_;
  std::vector<T> narrow_;
  std::vector<float> wide_;  // [N + 1, stride]
  std::array<uint32_t, N> keys_;
};

// update(first, arrays, gradients, count) for the rows [first, first + count) of the given ones, of which there are at
// most `most` at a time: in place where that is possible, else in a packed copy.
template <typename T, size_t N, class Update>
void for_each_rows(const Arrays<T, N>& arrays, const RowGrad<T>& grad, uint64_t step, size_t begin, size_t end,
                   bool in_place, size_t most, const Update& update) {
  const auto prefetch = [&](size_t i) {
    if (i < end)
      for (const T* array : arrays) prefetch_row(array + grad.rows[i] * grad.d, grad.d);
  };
  if constexpr (kStoredWide<T>) {
    if (in_place) {
      for (size_t i = begin; i < end; ++i) {
        prefetch(i + kRowsAhead);
        Arrays<float, N> row;
        for (size_t k = 0; k < N; ++k) row[k] = arrays[k] + grad.rows[i] * grad.d;
        update(i, row, grad.values + i * grad.d, 1);
      }
      return;
    }
  }
  Packed<T, N> packed(arrays, grad, step, most);
  Arrays<float, N> block;
  for (size_t k = 0; k < N; ++k) block[k] = packed.array(k);
  for (size_t i = begin; i < end; i += most) {
    const size_t count = std::min(most, end - i);
    if (grad.d >= kLanes)
      for (size_t r = 0; r < count; ++r) prefetch(i + r + kRowsAhead);
    packed.gather(i, count);
    update(i, block, packed.gradients(i, count), count);
    packed.scatter(i, count);
  }
}

// For rules that look at one element at a time. update(arrays, grad, n) gets n contiguous elements of each array.
template <typename T, size_t N, class Update>
void update_elements(const Arrays<T, N>& arrays, const RowGrad<T>& grad, uint64_t step, size_t begin, size_t end,
                     const Update& update) {
  for_each_rows(arrays, grad, step, begin, end, grad.d >= kLanes, std::max<size_t>(1, kPacked / grad.d),
                [&](size_t, const Arrays<float, N>& a, const float* g, size_t count) { update(a, g, count * grad.d); });
}

// For rules with one number a row. update(arrays, grad, row) gets the elements of one row, and its number.
template <typename T, size_t N, class Update>
void update_rows(const Arrays<T, N>& arrays, const float* state, const RowGrad<T>& grad, uint64_t step, size_t begin,
                 size_t end, const Update& update) {
  for_each_rows(arrays, grad, step, begin, end, true, 1,
                [&](size_t i, const Arrays<float, N>& a, const float* g, size_t) {
                  if (i + kRowsAhead < end) __builtin_prefetch(state + grad.rows[i + kRowsAhead], 1);
                  update(a, g, grad.rows[i]);
                });
}

}  // namespace

template <typename T>
void lazy_adam_rows(const AdamScalars& scalars, T* weight, T* exp_avg, T* exp_avg_sq, const RowGrad<T>& grad,
                    uint64_t step, size_t begin, size_t end) {
  const auto adam = kernels().rows.adam;
  update_elements<T, 3>({weight, exp_avg, exp_avg_sq}, grad, step, begin, end,
                        [&](const auto& a, const float* g, size_t n) { adam(scalars, a[0], a[1], a[2], g, n); });
}

template <typename T>
void rowwise_adam_rows(const AdamScalars& scalars, T* weight, T* exp_avg, float* exp_avg_sq, const RowGrad<T>& grad,
                       uint64_t step, size_t begin, size_t end) {
  const auto adam = kernels().rows.rowwise_adam;
  update_rows<T, 2>(
      {weight, exp_avg}, exp_avg_sq, grad, step, begin, end,
      [&](const auto& a, const float* g, int64_t row) { adam(scalars, a[0], a[1], exp_avg_sq + row, g, grad.d); });
}

template <typename T>
void rowwise_adagrad_rows(const AdagradScalars& scalars, T* weight, float* sum, const RowGrad<T>& grad, uint64_t step,
                          size_t begin, size_t end) {
  const auto adagrad = kernels().rows.rowwise_adagrad;
  update_rows<T, 1>({weight}, sum, grad, step, begin, end,
                    [&](const auto& a, const float* g, int64_t row) { adagrad(scalars, a[0], sum + row, g, grad.d); });
}

template <typename T>
void sgd_rows(const SgdScalars& scalars, T* weight, T* momentum_buffer, const RowGrad<T>& grad, uint64_t step,
              size_t begin, size_t end) {
  const auto sgd = kernels().rows.sgd;
  if (momentum_buffer == nullptr)
    update_elements<T, 1>({weight}, grad, step, begin, end,
                          [&](const auto& a, const float* g, size_t n) { sgd(scalars, a[0], nullptr, g, n); });
  else
    update_elements<T, 2>({weight, momentum_buffer}, grad, step, begin, end,
                          [&](const auto& a, const float* g, size_t n) { sgd(scalars, a[0], a[1], g, n); });
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
