// The arithmetic of the row-sparse optimisers. What depends on the step (learning rate, bias corrections) comes as
// scalars that were computed once, in double precision.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ts {

// sign is -1 to maximise; l2 the coupled weight decay; keep = 1 - lr * decoupled weight decay.
struct AdamScalars {
  float sign, l2, keep, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, inv_root_correction2, eps;
};
struct AdagradScalars {
  float sign, l2, lr, eps;
};
struct SgdScalars {
  float sign, l2, lr, momentum, one_minus_dampening;
  bool nesterov;
};

// Element by element, or with fixed reduction order: bit-equal for every ISA.
struct RowKernels {
  // n elements, of one row or of several that were packed together.
  void (*adam)(const AdamScalars& s, float* w, float* exp_avg, float* exp_avg_sq, const float* grad, size_t n);
  // One row of d elements with its one second moment (of the row's mean squared gradients).
  void (*rowwise_adam)(const AdamScalars& s, float* w, float* exp_avg, float* exp_avg_sq, const float* grad, size_t d);
  // One row of d elements with its one accumulator (the running sum of the rows' mean squared gradients).
  void (*rowwise_adagrad)(const AdagradScalars& s, float* w, float* sum, const float* grad, size_t d);
  // momentum_buffer may be null.
  void (*sgd)(const SgdScalars& s, float* w, float* momentum_buffer, const float* grad, size_t n);
  void (*widen)(const uint16_t* x, float* out, size_t n);
  // To one of the two neighbouring bfloat16 numbers, each with a probability that makes the result right on average
  // (stochastic rounding: Gupta et al., ICML 2015, section 3). Element i uses the random number of (key, first + i).
  void (*round_stochastically)(const float* x, uint16_t* out, size_t n, uint32_t key, uint32_t first);
  // sum = the sum over n entries e of scale[e] * values[source[e]], in their order; source and scale may be null (then
  // e itself, and 1). values is [*, d].
  void (*sum_entries)(const float* values, size_t d, const int32_t* entries, size_t n, const int64_t* source,
                      const float* scale, float* sum);
};

}  // namespace ts
