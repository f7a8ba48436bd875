// The loop bodies, included once per instruction set inside its target region with TS_ISA naming the namespace.
// Only simd_*.h and builtins may be used here: a std template instantiated in a target region could be the copy that
// the linker keeps for everyone.

namespace TS_ISA {
namespace {

// Four rows by four registers of outputs: enough independent chains to hide the latency of fma.
template <int Rows, int Regs>
inline void project_block(const float* x, size_t d, const float* m, size_t p, float* y) {
  F32x16 acc[Rows][Regs];
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Regs; ++c) acc[r][c] = broadcast(0.0f);
  for (size_t i = 0; i < d; ++i) {
    F32x16 column[Regs];
    for (int c = 0; c < Regs; ++c) column[c] = load(m + i * p + 16 * c);
    for (int r = 0; r < Rows; ++r) {
      const F32x16 xi = broadcast(x[r * d + i]);
      for (int c = 0; c < Regs; ++c) acc[r][c] = fma(xi, column[c], acc[r][c]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Regs; ++c) store(y + r * p + 16 * c, acc[r][c]);
}

template <int Rows>
inline void project_rows(const float* x, size_t d, const float* m, size_t p, float* y) {
  size_t c = 0;
  for (; c + 64 <= p; c += 64) project_block<Rows, 4>(x, d, m + c, p, y + c);
  for (; c < p; c += 16) project_block<Rows, 1>(x, d, m + c, p, y + c);
}

void project(const float* x, size_t n, size_t d, const float* m, size_t p, float* y) {
  size_t r = 0;
  for (; r + 4 <= n; r += 4) project_rows<4>(x + r * d, d, m, p, y + r * p);
  for (; r < n; ++r) project_rows<1>(x + r * d, d, m, p, y + r * p);
}

float squared_norm(const float* x, size_t d) {
  F32x16 acc = broadcast(0.0f);
  size_t i = 0;
  for (; i + 16 <= d; i += 16) {
    const F32x16 v = load(x + i);
    acc = fma(v, v, acc);
  }
  if (i < d) {
    float rest[16] = {};
    for (size_t j = i; j < d; ++j) rest[j - i] = x[j];
    const F32x16 v = load(rest);
    acc = fma(v, v, acc);
  }
  return reduce_add(acc);
}

}  // namespace
}  // namespace TS_ISA
