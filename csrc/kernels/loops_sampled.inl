// Loops of SampledKernels, written against F32x16; see loops.inl for the rules of such a file.

namespace TS_ISA {
namespace {

// Rows looked ahead: enough to keep all line fill buffers of a core busy, few enough to stay in L1.
constexpr size_t kRowsAhead = 8;
// A longer row's remaining lines are found by the processor's own prefetcher.
constexpr size_t kPrefetchBytes = 1024;

template <typename Row>
inline void prefetch_row(const Row* row, size_t d) {
  const char* const bytes = reinterpret_cast<const char*>(row);
  const size_t size = d * sizeof(Row) < kPrefetchBytes ? d * sizeof(Row) : kPrefetchBytes;
  for (size_t line = 0; line < size; line += 64) __builtin_prefetch(bytes + line);
}

// Several products at a time, so that their chains of fma overlap.
template <int Products, typename Row>
inline void dot_block(const float* hidden, const Row* weight, size_t d, const int32_t* samples, const int64_t* rows,
                      float* out) {
  const float* x[Products];
  const Row* row[Products];
  F32x16 acc[Products];
  for (int p = 0; p < Products; ++p) {
    x[p] = hidden + static_cast<size_t>(samples[p]) * d;
    row[p] = weight + static_cast<size_t>(rows[p]) * d;
    acc[p] = broadcast(0.0f);
  }
  size_t i = 0;
  for (; i + 16 <= d; i += 16)
    for (int p = 0; p < Products; ++p) acc[p] = fma(load(x[p] + i), load(row[p] + i), acc[p]);
  if (i < d)
    for (int p = 0; p < Products; ++p)
      acc[p] = fma(load_rest(x[p] + i, d - i, 0.0f), load_rest(row[p] + i, d - i, Row{}), acc[p]);
  for (int p = 0; p < Products; ++p) out[p] = reduce_add(acc[p]);
}

template <typename Row>
void dots(const float* hidden, const Row* weight, size_t d, const int32_t* samples, const int64_t* rows, size_t n,
          float* out) {
  const auto prefetch = [&](size_t i) {
    if (i < n && (i == 0 || rows[i] != rows[i - 1])) prefetch_row(weight + static_cast<size_t>(rows[i]) * d, d);
  };
  for (size_t i = 0; i < kRowsAhead; ++i) prefetch(i);
  size_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (size_t next = i + kRowsAhead; next < i + kRowsAhead + 4; ++next) prefetch(next);
    dot_block<4>(hidden, weight, d, samples + i, rows + i, out + i);
  }
  for (; i < n; ++i) dot_block<1>(hidden, weight, d, samples + i, rows + i, out + i);
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
