// A matrix [d, p] cut into panels of kPanelWidth columns, so that a product streams through the caches.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/hash_kernels.h"

namespace ts {

constexpr size_t kRowBlock = 48;  // rows that meet one panel while it stays in a first-level cache

inline size_t panels_for(size_t columns) { return (columns + kPanelWidth - 1) / kPanelWidth; }

// Copies `columns` neighbouring columns of a row-major matrix, rows `stride` apart; missing columns are zero.
template <typename T>
void pack_panel(const T* matrix, size_t d, size_t stride, size_t columns, float* panel) {
  for (size_t i = 0; i < d; ++i) {
    float* const to = panel + i * kPanelWidth;
    for (size_t c = 0; c < columns; ++c) to[c] = static_cast<float>(matrix[i * stride + c]);
    std::fill(to + columns, to + kPanelWidth, 0.0f);
  }
}

// Panels that lie one behind the other, each [d, kPanelWidth].
struct Panels {
  const float* data;
  size_t d;
  size_t count;
  const float* operator[](size_t i) const { return data + i * d * kPanelWidth; }
};

}  // namespace ts
