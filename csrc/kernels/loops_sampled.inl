// Loops of SampledKernels, written against F32x16; see loops.inl for the rules of such a file.

namespace TS_ISA {
namespace {

// Several uses at a time, so that their chains of fma overlap and each part of the row is loaded once for all.
template <int Uses, typename Row>
inline void dot_block(const Row* row, const float* hidden, size_t d, const int32_t* samples, float* out) {
  const float* x[Uses];
  F32x16 acc[Uses];
  for (int u = 0; u < Uses; ++u) {
    x[u] = hidden + static_cast<size_t>(samples[u]) * d;
    acc[u] = broadcast(0.0f);
  }
  size_t i = 0;
  for (; i + 16 <= d; i += 16) {
    const F32x16 part = load(row + i);
    for (int u = 0; u < Uses; ++u) acc[u] = fma(load(x[u] + i), part, acc[u]);
  }
  if (i < d) {
    const F32x16 part = load_rest(row + i, d - i, Row{});
    for (int u = 0; u < Uses; ++u) acc[u] = fma(load_rest(x[u] + i, d - i, 0.0f), part, acc[u]);
  }
  for (int u = 0; u < Uses; ++u) out[u] = reduce_add(acc[u]);
}

template <typename Row>
void dots(const Row* row, const float* hidden, size_t d, const int32_t* samples, size_t n, float* out) {
  for (; n >= 4; n -= 4, samples += 4, out += 4) dot_block<4>(row, hidden, d, samples, out);
  if (n == 3) dot_block<3>(row, hidden, d, samples, out);
  if (n == 2) dot_block<2>(row, hidden, d, samples, out);
  if (n == 1) dot_block<1>(row, hidden, d, samples, out);
}

template <int Regs, typename Row>
inline void gradient_block(const Row* row, const float* hidden, size_t d, const int32_t* samples, const float* g,
                           size_t n, float* grad_row, float* grad_hidden) {
  F32x16 acc[Regs];
  for (int c = 0; c < Regs; ++c) acc[c] = broadcast(0.0f);
  for (size_t i = 0; i < n; ++i) {
    const size_t sample = static_cast<size_t>(samples[i]) * d;
    const F32x16 gi = broadcast(g[i]);
    for (int c = 0; c < Regs; ++c) {
      float* const back = grad_hidden + sample + 16 * c;
      acc[c] = fma(gi, load(hidden + sample + 16 * c), acc[c]);
      store(back, fma(gi, load(row + 16 * c), load(back)));
    }
  }
  for (int c = 0; c < Regs; ++c) store(grad_row + 16 * c, acc[c]);
}

inline float widened(float x) { return x; }
inline float widened(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename Row>
void row_gradients(const Row* row, const float* hidden, size_t d, const int32_t* samples, const float* g, size_t n,
                   float* grad_row, float* grad_hidden) {
  size_t c = 0;
  for (; c + 64 <= d; c += 64) gradient_block<4>(row + c, hidden + c, d, samples, g, n, grad_row + c, grad_hidden + c);
  for (; c + 16 <= d; c += 16) gradient_block<1>(row + c, hidden + c, d, samples, g, n, grad_row + c, grad_hidden + c);
  for (; c < d; ++c) {
    const float weight = widened(row[c]);
    float sum = 0.0f;
    for (size_t i = 0; i < n; ++i) {
      const size_t at = static_cast<size_t>(samples[i]) * d + c;
      sum = __builtin_fmaf(g[i], hidden[at], sum);
      grad_hidden[at] = __builtin_fmaf(g[i], weight, grad_hidden[at]);
    }
    grad_row[c] = sum;
  }
}

template <typename Row>
constexpr ts::SampledKernels<Row> sampled_kernels{dots<Row>, row_gradients<Row>};

}  // namespace
}  // namespace TS_ISA
