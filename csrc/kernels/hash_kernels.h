// The inner loops of hashing. Codes choose neurons, so every one of these is bit-equal for every instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ts {

constexpr size_t kPanelWidth = 32;  // columns of a packed panel: 32 x 130 floats stay in a first-level cache
constexpr size_t kLanes = 16;       // vectors side by side in the winner-take-all kernels
constexpr size_t kBinSize = 8;      // coordinates of a bin: an arg-max in it is worth three bits

struct HashKernels {
  // y[r, c] = sum_i x[r, i] * panel[i, c] for the columns of one panel [d, kPanelWidth], each sum one fused chain over
  // ascending i. x is [n, d]; the rows of y are y_stride apart.
  void (*project)(const float* x, size_t n, size_t d, const float* panel, float* y, size_t y_stride);

  // Bit c of masks[r * mask_stride] says whether y[r, c] > bounds[r], for the columns of one panel.
  void (*above)(const float* y, size_t n, size_t y_stride, const float* bounds, uint32_t* masks, size_t mask_stride);

  // For kLanes vectors at once: the position (0 to 7, lowest on ties) of the largest coordinate in every bin, and
  // whether the bin holds any non-zero. x is [d, kLanes], bins [num_bins, kBinSize], winners [num_bins, kLanes]; bit v
  // of occupied[b] belongs to vector v.
  void (*bin_argmax)(const float* x, const int32_t* bins, size_t num_bins, float* winners, uint16_t* occupied);
};

}  // namespace ts
