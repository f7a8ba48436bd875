// Inner loops of products with rows picked by number. Rows come as float32, or as bfloat16 in uint16_t.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ts {

template <typename Row>
struct SampledKernels {
  // What the n uses of one row are: out[i] = hidden[samples[i]] . row, of d elements each.
  void (*dots)(const Row* row, const float* hidden, size_t d, const int32_t* samples, size_t n, float* out);

  // What the n uses of one row give back: use i is by sample samples[i] and has the gradient g[i].
  // grad_row = sum_i g[i] * hidden[samples[i]]; grad_hidden[samples[i]] += g[i] * row.
  void (*row_gradients)(const Row* row, const float* hidden, size_t d, const int32_t* samples, const float* g, size_t n,
                        float* grad_row, float* grad_hidden);
};

}  // namespace ts
