#include "core/sampled_linear.h"

#include <algorithm>
#include <array>
#include <numeric>

#include "core/bfloat16.h"
#include "kernels/kernels.h"

namespace ts {
namespace {

void dots(const float* row, const float* hidden, int64_t d, const int32_t* samples, int64_t n, float* out) {
  kernels().sampled.dots(row, hidden, d, samples, n, out);
}
void dots(const uint16_t* row, const float* hidden, int64_t d, const int32_t* samples, int64_t n, float* out) {
  kernels().sampled_bf16.dots(row, hidden, d, samples, n, out);
}
void dots(const double* row, const double* hidden, int64_t d, const int32_t* samples, int64_t n, double* out) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = std::inner_product(hidden + samples[i] * d, hidden + (samples[i] + 1) * d, row, 0.0);
}

void row_gradients(const float* row, const float* hidden, int64_t d, const int32_t* samples, const float* g, int64_t n,
                   float* grad_row, float* grad_hidden) {
  kernels().sampled.row_gradients(row, hidden, d, samples, g, n, grad_row, grad_hidden);
}
void row_gradients(const uint16_t* row, const float* hidden, int64_t d, const int32_t* samples, const float* g,
                   int64_t n, float* grad_row, float* grad_hidden) {
  kernels().sampled_bf16.row_gradients(row, hidden, d, samples, g, n, grad_row, grad_hidden);
}
void row_gradients(const double* row, const double* hidden, int64_t d, const int32_t* samples, const double* g,
                   int64_t n, double* grad_row, double* grad_hidden) {
  std::fill_n(grad_row, d, 0.0);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < d; ++c) {
      grad_row[c] += g[i] * hidden[samples[i] * d + c];
      grad_hidden[samples[i] * d + c] += g[i] * row[c];
    }
}

// Rows looked ahead, which are visited in ascending order.
constexpr int64_t kRowsAhead = 8;

template <typename Row>
void prefetch_row(const Row* row, int64_t width) {
  const char* const bytes = reinterpret_cast<const char*>(row);
  const int64_t size = std::min<int64_t>(width * static_cast<int64_t>(sizeof(Row)), 1024);
  for (int64_t line = 0; line < size; line += 64) __builtin_prefetch(bytes + line);
}

}  // namespace

template <typename Value, typename Row>
void sampled_dots(const SampledView<Value, Row>& view, const Row* bias, int64_t begin, int64_t end, Value* values) {
  constexpr int64_t most = 64;
  std::array<Value, most> products;
  const ByRow& uses = view.uses;
  for (int64_t r = begin; r < end; ++r) {
    if (r + kRowsAhead < end) prefetch_row(view.weight + uses.rows[r + kRowsAhead] * view.width, view.width);
    const Value shift = bias == nullptr ? Value(0) : static_cast<Value>(widened(bias[uses.rows[r]]));
    for (int64_t first = uses.starts[r]; first < uses.starts[r + 1]; first += most) {
      const int64_t n = std::min(most, uses.starts[r + 1] - first);
      dots(view.weight + uses.rows[r] * view.width, view.hidden, view.width, view.samples + first, n, products.data());
      for (int64_t i = 0; i < n; ++i) values[uses.entries[first + i]] = products[i] + shift;
    }
  }
}

template <typename Value, typename Row>
void sampled_gradients(const SampledView<Value, Row>& view, const Value* gradients, int64_t begin, int64_t end,
                       Value* grad_rows, Value* grad_bias, Value* grad_hidden) {
  const int64_t d = view.width;
  const ByRow& uses = view.uses;
  for (int64_t r = begin; r < end; ++r) {
    if (r + kRowsAhead < end) prefetch_row(view.weight + uses.rows[r + kRowsAhead] * d, d);
    const int64_t first = uses.starts[r], stop = uses.starts[r + 1];
    row_gradients(view.weight + uses.rows[r] * d, view.hidden, d, view.samples + first, gradients + first, stop - first,
                  grad_rows + r * d, grad_hidden);
    grad_bias[r] = std::accumulate(gradients + first, gradients + stop, Value(0));
  }
}

#define TS_INSTANTIATE(Value, Row)                                                                                \
  template void sampled_dots(const SampledView<Value, Row>&, const Row*, int64_t, int64_t, Value*);               \
  template void sampled_gradients(const SampledView<Value, Row>&, const Value*, int64_t, int64_t, Value*, Value*, \
                                  Value*);
TS_INSTANTIATE(float, float)
TS_INSTANTIATE(float, uint16_t)
TS_INSTANTIATE(double, double)
#undef TS_INSTANTIATE

}  // namespace ts
