#include "core/sampled_linear.h"

#include <algorithm>
#include <numeric>

#include "core/bfloat16.h"
#include "kernels/kernels.h"

namespace ts {
namespace {

void dots(const float* x, const float* rows, int64_t d, const int64_t* ids, int64_t n, float* out) {
  kernels().sampled.dots(x, rows, d, ids, n, out);
}
void dots(const float* x, const uint16_t* rows, int64_t d, const int64_t* ids, int64_t n, float* out) {
  kernels().sampled_bf16.dots(x, rows, d, ids, n, out);
}
void dots(const double* x, const double* rows, int64_t d, const int64_t* ids, int64_t n, double* out) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = 0;
    for (int64_t c = 0; c < d; ++c) out[i] += x[c] * rows[ids[i] * d + c];
  }
}

void row_gradients(const float* row, const float* hidden, int64_t d, const int64_t* samples, const float* g, int64_t n,
                   float* grad_row, float* grad_hidden) {
  kernels().sampled.row_gradients(row, hidden, d, samples, g, n, grad_row, grad_hidden);
}
void row_gradients(const uint16_t* row, const float* hidden, int64_t d, const int64_t* samples, const float* g,
                   int64_t n, float* grad_row, float* grad_hidden) {
  kernels().sampled_bf16.row_gradients(row, hidden, d, samples, g, n, grad_row, grad_hidden);
}
void row_gradients(const double* row, const double* hidden, int64_t d, const int64_t* samples, const double* g,
                   int64_t n, double* grad_row, double* grad_hidden) {
  std::fill_n(grad_row, d, 0.0);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < d; ++c) {
      grad_row[c] += g[i] * hidden[samples[i] * d + c];
      grad_hidden[samples[i] * d + c] += g[i] * row[c];
    }
}

// Rows looked ahead in the gradient step; its rows are visited in ascending order.
constexpr int64_t kRowsAhead = 8;

template <typename Row>
void prefetch_row(const Row* row, int64_t width) {
  const char* const bytes = reinterpret_cast<const char*>(row);
  const int64_t size = std::min<int64_t>(width * static_cast<int64_t>(sizeof(Row)), 1024);
  for (int64_t line = 0; line < size; line += 64) __builtin_prefetch(bytes + line);
}

// The sample that entry k belongs to: the last one that starts at or before it.
int64_t sample_of(const int64_t* row_offsets, int64_t num_samples, int64_t k) {
  return std::upper_bound(row_offsets, row_offsets + num_samples + 1, k) - row_offsets - 1;
}

}  // namespace

template <typename Value, typename Row>
void sampled_dots(const SampledView<Value, Row>& view, const Row* bias, int64_t begin, int64_t end, Value* values) {
  for (int64_t sample = sample_of(view.row_offsets, view.num_samples, begin); begin < end; ++sample) {
    const int64_t stop = std::min(end, view.row_offsets[sample + 1]);
    dots(view.hidden + sample * view.width, view.weight, view.width, view.ids + begin, stop - begin, values + begin);
    if (bias != nullptr)
      for (int64_t k = begin; k < stop; ++k) values[k] += widened(bias[view.ids[k]]);
    begin = stop;
  }
}

void list_uses(const int64_t* row_offsets, int64_t num_samples, const int64_t* ids, int64_t begin, int64_t end,
               int64_t* samples, KeyValue* uses) {
  int64_t sample = sample_of(row_offsets, num_samples, begin);
  for (int64_t k = begin; k < end; ++k) {
    while (k >= row_offsets[sample + 1]) ++sample;
    samples[k] = sample;
    uses[k] = {static_cast<uint32_t>(ids[k]), static_cast<uint32_t>(k)};
  }
}

int64_t next_key(const KeyValue* uses, int64_t n, int64_t at) {
  while (at > 0 && at < n && uses[at].key == uses[at - 1].key) ++at;
  return at;
}

int64_t count_keys(const KeyValue* uses, int64_t begin, int64_t end) {
  int64_t keys = 0;
  for (int64_t i = begin; i < end; ++i) keys += i == begin || uses[i].key != uses[i - 1].key;
  return keys;
}

template <typename Value, typename Row>
void sampled_gradients(const SampledView<Value, Row>& view, const SampledUses<Value>& uses, int64_t begin, int64_t end,
                       int64_t* rows, Value* grad_rows, Value* grad_bias, Value* grad_hidden) {
  const int64_t d = view.width;
  while (begin < end) {
    const int64_t id = uses.sorted[begin].key, stop = next_key(uses.sorted, end, begin + 1);
    for (int64_t ahead = begin + kRowsAhead; ahead < std::min(stop + kRowsAhead, end); ++ahead)
      if (uses.sorted[ahead].key != uses.sorted[ahead - 1].key)
        prefetch_row(view.weight + uses.sorted[ahead].key * d, d);
    row_gradients(view.weight + id * d, view.hidden, d, uses.samples + begin, uses.gradients + begin, stop - begin,
                  grad_rows, grad_hidden);
    *rows++ = id;
    *grad_bias++ = std::accumulate(uses.gradients + begin, uses.gradients + stop, Value(0));
    grad_rows += d;
    begin = stop;
  }
}

#define TS_INSTANTIATE(Value, Row)                                                                             \
  template void sampled_dots(const SampledView<Value, Row>&, const Row*, int64_t, int64_t, Value*);            \
  template void sampled_gradients(const SampledView<Value, Row>&, const SampledUses<Value>&, int64_t, int64_t, \
                                  int64_t*, Value*, Value*, Value*);
TS_INSTANTIATE(float, float)
TS_INSTANTIATE(float, uint16_t)
TS_INSTANTIATE(double, double)
#undef TS_INSTANTIATE

}  // namespace ts
