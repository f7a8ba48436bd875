// The loops of HashKernels, under the rules of loops.inl.

namespace TS_ISA {
namespace {

// A tile of outputs lives in registers; kTileRows * kTileRegs independent chains hide the latency of fma.
template <int Rows, int Regs>
inline void project_tile(const float* x, size_t d, const float* panel, float* y, size_t y_stride) {
  F32x16 sum[Rows][Regs];
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Regs; ++c) sum[r][c] = broadcast(0.0f);
  for (size_t i = 0; i < d; ++i) {
    F32x16 column[Regs];
    for (int c = 0; c < Regs; ++c) column[c] = load(panel + i * ts::kPanelWidth + 16 * c);
    for (int r = 0; r < Rows; ++r) {
      const F32x16 xi = broadcast(x[r * d + i]);
      for (int c = 0; c < Regs; ++c) sum[r][c] = fma(xi, column[c], sum[r][c]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Regs; ++c) store(y + r * y_stride + 16 * c, sum[r][c]);
}

template <int Rows>
inline void project_rows(const float* x, size_t d, const float* panel, float* y, size_t y_stride) {
  for (size_t c = 0; c < ts::kPanelWidth; c += 16 * kTileRegs)
    project_tile<Rows, kTileRegs>(x, d, panel + c, y + c, y_stride);
}

void project(const float* x, size_t n, size_t d, const float* panel, float* y, size_t y_stride) {
  size_t r = 0;
  for (; r + kTileRows <= n; r += kTileRows) project_rows<kTileRows>(x + r * d, d, panel, y + r * y_stride, y_stride);
  for (; r + 4 <= n; r += 4) project_rows<4>(x + r * d, d, panel, y + r * y_stride, y_stride);
  for (; r < n; ++r) project_rows<1>(x + r * d, d, panel, y + r * y_stride, y_stride);
}

void above(const float* y, size_t n, size_t y_stride, const float* bounds, uint32_t* masks, size_t mask_stride) {
  for (size_t r = 0; r < n; ++r) {
    const F32x16 bound = broadcast(bounds[r]);
    const float* const row = y + r * y_stride;
    masks[r * mask_stride] = greater(load(row), bound) | greater(load(row + 16), bound) << 16;
  }
}

struct Winner {
  F32x16 value, position;
};

inline Winner winner_of(const Winner& left, const Winner& right) {
  const uint32_t wins = greater(right.value, left.value);
  return {select(wins, right.value, left.value), select(wins, right.position, left.position)};
}

void bin_argmax(const float* x, const int32_t* bins, size_t num_bins, float* winners, uint16_t* occupied) {
  const F32x16 zero = broadcast(0.0f);
  for (size_t b = 0; b < num_bins; ++b) {
    Winner rest[ts::kBinSize];
    F32x16 lowest = zero;
    for (size_t j = 0; j < ts::kBinSize; ++j) {
      const F32x16 value = load(x + 16 * bins[b * ts::kBinSize + j]);
      lowest = min(value, lowest);
      rest[j] = {value, broadcast(static_cast<float>(j))};
    }
    for (size_t width = ts::kBinSize / 2; width > 0; width /= 2)
      for (size_t j = 0; j < width; ++j) rest[j] = winner_of(rest[2 * j], rest[2 * j + 1]);
    store(winners + 16 * b, rest[0].position);
    occupied[b] = static_cast<uint16_t>(greater(rest[0].value, zero) | greater(zero, lowest));
  }
}

}  // namespace
}  // namespace TS_ISA
