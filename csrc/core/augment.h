// The transform that turns the largest inner product into the largest cosine (Bachrach et al., RecSys 2014; Neyshabur
// and Srebro, ICML 2015), with the bias as one more coordinate.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ts {

struct Rows {
  const float* weight;  // [n, d]
  const float* bias;    // [n] or nullptr
  size_t d;

  // sqrt(|weight[row]|^2 + bias[row]^2)
  float norm(size_t row) const;
  // to = [weight[row], bias[row], sqrt(max_norm^2 - norm^2)] / max_norm, of d + 2 coordinates.
  void augment(size_t row, double max_norm, float* to) const;

 private:
  float squared_norm(size_t row) const;
};

}  // namespace ts
