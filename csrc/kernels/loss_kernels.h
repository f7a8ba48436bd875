// Inner loops of the losses over candidates: exponentials, sums and gradients of one block of a row.
#pragma once
#include <cstddef>

namespace ts {

struct LossKernels {
  struct Weighted {
    float mass, dot;
  };

  // max_i z[i] + a[i], NaN terms passed over; -inf for n = 0.
  float (*max_sum)(const float* z, const float* a, size_t n);

  // z[i] <- exp(z[i] - shift + a[i]); returns the sum of the results.
  float (*exp_sum)(float* z, const float* a, float shift, size_t n);

  // sum_i q[i] and sum_i q[i] * (z[i] - shift), where q[i] = 0 silences an infinite z[i].
  Weighted (*weighted_sum)(const float* q, const float* z, float shift, size_t n);

  // z[i] <- factor * z[i] - q[i]; a null q stands for zeros.
  void (*scale_minus)(float* z, float factor, const float* q, size_t n);

  // With w[i] = exp(a[i]) * c[i], a null c standing for ones: returns sum_i w[i] * softplus(z[i]), the loss of so many
  // negatives; z[i] <- w[i] * sigmoid(z[i]), its gradient.
  float (*softplus_sum)(float* z, const float* a, const float* c, size_t n);
};

}  // namespace ts
