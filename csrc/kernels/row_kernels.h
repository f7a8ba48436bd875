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

// Where rows in bfloat16 (uint16_t) take their random numbers: element i uses those of (key, first + i).
struct Rounding {
  uint32_t key, first;
};

// Element by element, or with fixed reduction order: bit-equal for every ISA. Rows are stored as float, or as bfloat16,
// which is float32 while it is worked on and goes back to one of its two neighbours, with probabilities that make it
// right on average (stochastic rounding: Gupta et al., ICML 2015, section 3).
template <typename T>
struct RowKernels {
  // n elements, of one row or of several that were packed together. Adam's exp_avg may be null if beta1 is 0: the first
  // moment is the gradient then, and nobody has to keep it.
  void (*adam)(const AdamScalars& s, T* w, T* exp_avg, T* exp_avg_sq, const T* grad, size_t n, Rounding rounding);
  // One row of d elements with its one second moment (of the row's mean squared gradients).
  void (*rowwise_adam)(const AdamScalars& s, T* w, T* exp_avg, float* exp_avg_sq, const T* grad, size_t d,
                       Rounding rounding);
  // One row of d elements with its one accumulator (the running sum of the rows' mean squared gradients).
  void (*rowwise_adagrad)(const AdagradScalars& s, T* w, float* sum, const T* grad, size_t d, Rounding rounding);
  // momentum_buffer may be null.
  void (*sgd)(const SgdScalars& s, T* w, T* momentum_buffer, const T* grad, size_t n, Rounding rounding);
};

// sum = the sum over n entries e of scale[e] * values[source[e]], in their order; each of the three lists may be null
// (then the entries are 0 to n - 1, source[e] is e, scale[e] is 1). values is [*, d].
using SumEntries = void (*)(const float* values, size_t d, const int32_t* entries, size_t n, const int64_t* source,
                            const float* scale, float* sum);

}  // namespace ts
