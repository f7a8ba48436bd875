#include "core/augment.h"

#include <algorithm>
#include <cmath>

#include "kernels/kernels.h"

namespace ts {

float Rows::squared_norm(size_t row) const {
  const float of_weight = kernels().squared_norm(weight + row * d, d);
  return bias == nullptr ? of_weight : std::fma(bias[row], bias[row], of_weight);
}

float Rows::norm(size_t row) const { return std::sqrt(squared_norm(row)); }

void Rows::augment(size_t row, double max_norm, float* to) const {
  const auto scale = static_cast<float>(1.0 / max_norm);
  for (size_t i = 0; i < d; ++i) to[i] = weight[row * d + i] * scale;
  to[d] = bias == nullptr ? 0.0f : bias[row] * scale;
  to[d + 1] = static_cast<float>(std::sqrt(std::max(0.0, 1.0 - squared_norm(row) / (max_norm * max_norm))));
}

}  // namespace ts
