// The loops of RowKernels, under the rules of loops.inl. Sixteen elements at a time; a rest passes through a buffer.

namespace TS_ISA {
namespace {

using ts::AdagradScalars;
using ts::AdamScalars;
using ts::SgdScalars;

inline void copy_floats(float* to, const float* from, size_t n) {
  for (size_t i = 0; i < n; ++i) to[i] = from[i];
}

// The gradient as the rules see it: signed, with the coupled weight decay. A weight of inf must not meet l2 = 0.
template <class Scalars>
inline F32x16 effective_grad(const Scalars& s, F32x16 w, const float* grad) {
  const F32x16 g = mul(broadcast(s.sign), load(grad));
  return s.l2 == 0.0f ? g : fma(broadcast(s.l2), w, g);
}

inline void adam_block(const AdamScalars& s, float* w, float* exp_avg, float* exp_avg_sq, const float* grad) {
  F32x16 weight = load(w);
  const F32x16 g = effective_grad(s, weight, grad);
  const F32x16 m = fma(broadcast(s.one_minus_beta1), g, mul(broadcast(s.beta1), load(exp_avg)));
  const F32x16 v = fma(mul(broadcast(s.one_minus_beta2), g), g, mul(broadcast(s.beta2), load(exp_avg_sq)));
  const F32x16 denominator = fma(sqrt(v), broadcast(s.inv_root_correction2), broadcast(s.eps));
  weight = fma(broadcast(-s.step_size), div(m, denominator), mul(broadcast(s.keep), weight));
  store(exp_avg, m);
  store(exp_avg_sq, v);
  store(w, weight);
}

void adam(const AdamScalars& s, float* w, float* exp_avg, float* exp_avg_sq, const float* grad, size_t n) {
  size_t i = 0;
  for (; i + 16 <= n; i += 16) adam_block(s, w + i, exp_avg + i, exp_avg_sq + i, grad + i);
  if (i == n) return;
  float rest_w[16] = {}, rest_m[16] = {}, rest_v[16] = {}, rest_g[16] = {};
  copy_floats(rest_w, w + i, n - i);
  copy_floats(rest_m, exp_avg + i, n - i);
  copy_floats(rest_v, exp_avg_sq + i, n - i);
  copy_floats(rest_g, grad + i, n - i);
  adam_block(s, rest_w, rest_m, rest_v, rest_g);
  copy_floats(w + i, rest_w, n - i);
  copy_floats(exp_avg + i, rest_m, n - i);
  copy_floats(exp_avg_sq + i, rest_v, n - i);
}

inline void sgd_block(const SgdScalars& s, float* w, float* momentum_buffer, const float* grad) {
  const F32x16 weight = load(w);
  F32x16 direction = effective_grad(s, weight, grad);
  if (momentum_buffer != nullptr) {
    const F32x16 momentum = broadcast(s.momentum);
    const F32x16 b = fma(broadcast(s.one_minus_dampening), direction, mul(momentum, load(momentum_buffer)));
    store(momentum_buffer, b);
    direction = s.nesterov ? fma(momentum, b, direction) : b;
  }
  store(w, fma(broadcast(-s.lr), direction, weight));
}

void sgd(const SgdScalars& s, float* w, float* momentum_buffer, const float* grad, size_t n) {
  const bool buffered = momentum_buffer != nullptr;
  size_t i = 0;
  for (; i + 16 <= n; i += 16) sgd_block(s, w + i, buffered ? momentum_buffer + i : nullptr, grad + i);
  if (i == n) return;
  float rest_w[16] = {}, rest_b[16] = {}, rest_g[16] = {};
  copy_floats(rest_w, w + i, n - i);
  copy_floats(rest_g, grad + i, n - i);
  if (buffered) copy_floats(rest_b, momentum_buffer + i, n - i);
  sgd_block(s, rest_w, buffered ? rest_b : nullptr, rest_g);
  copy_floats(w + i, rest_w, n - i);
  if (buffered) copy_floats(momentum_buffer + i, rest_b, n - i);
}

inline float adagrad_step(const AdagradScalars& s, float sum) { return -s.lr / (__builtin_sqrtf(sum) + s.eps); }

// Biases have one element a row: what follows for whole registers, for one float.
inline void adagrad_element(const AdagradScalars& s, float* w, float* sum, float grad) {
  const float g = s.l2 == 0.0f ? s.sign * grad : __builtin_fmaf(s.l2, *w, s.sign * grad);
  *sum += g * g;
  *w = __builtin_fmaf(adagrad_step(s, *sum), g, *w);
}

void rowwise_adagrad(const AdagradScalars& s, float* w, float* sum, const float* grad, size_t d) {
  if (d == 1) return adagrad_element(s, w, sum, *grad);
  const size_t whole = d - d % 16;
  float rest_w[16] = {}, rest_g[16] = {};
  copy_floats(rest_w, w + whole, d - whole);
  copy_floats(rest_g, grad + whole, d - whole);
  F32x16 squares = broadcast(0.0f);
  for (size_t i = 0; i < whole; i += 16) {
    const F32x16 g = effective_grad(s, load(w + i), grad + i);
    squares = fma(g, g, squares);
  }
  const F32x16 last = effective_grad(s, load(rest_w), rest_g);
  squares = fma(last, last, squares);
  *sum += reduce_add(squares) / static_cast<float>(d);
  const F32x16 step = broadcast(adagrad_step(s, *sum));
  for (size_t i = 0; i < whole; i += 16) {
    const F32x16 weight = load(w + i);
    store(w + i, fma(step, effective_grad(s, weight, grad + i), weight));
  }
  store(rest_w, fma(step, last, load(rest_w)));
  copy_floats(w + whole, rest_w, d - whole);
}

void rowwise_adam(const AdamScalars& s, float* w, float* exp_avg, float* exp_avg_sq, const float* grad, size_t d) {
  const size_t whole = d - d % 16;
  float rest_w[16] = {}, rest_m[16] = {}, rest_g[16] = {};
  copy_floats(rest_w, w + whole, d - whole);
  copy_floats(rest_m, exp_avg + whole, d - whole);
  copy_floats(rest_g, grad + whole, d - whole);
  F32x16 squares = broadcast(0.0f);
  for (size_t i = 0; i < whole; i += 16) {
    const F32x16 g = effective_grad(s, load(w + i), grad + i);
    squares = fma(g, g, squares);
  }
  const F32x16 last = effective_grad(s, load(rest_w), rest_g);
  squares = fma(last, last, squares);
  const float mean = reduce_add(squares) / static_cast<float>(d);
  *exp_avg_sq = __builtin_fmaf(s.one_minus_beta2, mean, s.beta2 * *exp_avg_sq);
  const float denominator = __builtin_fmaf(__builtin_sqrtf(*exp_avg_sq), s.inv_root_correction2, s.eps);
  const F32x16 step = broadcast(-s.step_size / denominator), keep = broadcast(s.keep);
  const auto update = [&](float* weight, float* moment, const float* gradient) {
    const F32x16 before = load(weight);
    const F32x16 g = effective_grad(s, before, gradient);
    const F32x16 m = fma(broadcast(s.one_minus_beta1), g, mul(broadcast(s.beta1), load(moment)));
    store(moment, m);
    store(weight, fma(step, m, mul(keep, before)));
  };
  for (size_t i = 0; i < whole; i += 16) update(w + i, exp_avg + i, grad + i);
  if (whole == d) return;
  update(rest_w, rest_m, rest_g);
  copy_floats(w + whole, rest_w, d - whole);
  copy_floats(exp_avg + whole, rest_m, d - whole);
}

void widen(const uint16_t* x, float* out, size_t n) {
  size_t i = 0;
  for (; i + 16 <= n; i += 16) store(out + i, load(x + i));
  if (i < n) store_rest(out + i, load_rest(x + i, n - i, uint16_t{0}), n - i);
}

// Sixteen counters to random bits: xor-shift and multiplication in turn, as in MurmurHash3's last steps, with the
// constants that Wellons found by search (lowbias32, public domain). The key is mixed in between, so that neighbouring
// keys share no sequence.
inline U32x16 random_bits(uint32_t key, uint32_t first) {
  U32x16 x = mul(counting_from(first), 0x9e3779b9u);
  x = add(exclusive_or(x, shifted_right(x, 16)), broadcast_bits(key));
  x = mul(exclusive_or(x, shifted_right(x, 16)), 0x7feb352du);
  x = mul(exclusive_or(x, shifted_right(x, 15)), 0x846ca68bu);
  return exclusive_or(x, shifted_right(x, 16));
}

// Adding a number below 2^16 to the bits carries into the upper half as often as the lower half is large.
inline U32x16 rounded_up_at_random(F32x16 x, uint32_t key, uint32_t first) {
  const uint32_t numbers = greater(x, broadcast(-kInfinity)) | greater(broadcast(kInfinity), x);
  const F32x16 quiet = select(numbers, x, broadcast(__builtin_nanf("")));  // a carry would make another NaN a number
  return add(bits_of(quiet), shifted_right(random_bits(key, first), 16));
}

void round_stochastically(const float* x, uint16_t* out, size_t n, uint32_t key, uint32_t first) {
  size_t i = 0;
  for (; i + 16 <= n; i += 16)
    store_upper_half(out + i, rounded_up_at_random(load(x + i), key, first + static_cast<uint32_t>(i)));
  if (i == n) return;
  uint16_t rest[16];
  store_upper_half(rest, rounded_up_at_random(load_rest(x + i, n - i, 0.0f), key, first + static_cast<uint32_t>(i)));
  for (size_t j = i; j < n; ++j) out[j] = rest[j - i];
}

// The entries of one row of a sum: few as a rule, so that the sum stays in registers and every value is read once.
struct Entries {
  const float* values;
  size_t d;
  const int32_t* entries;
  size_t n;
  const int64_t* source;
  const float* scale;

  const float* row(size_t i) const {
    return values + (source == nullptr ? entries[i] : static_cast<size_t>(source[entries[i]])) * d;
  }
  float factor(size_t i) const { return scale == nullptr ? 1.0f : scale[entries[i]]; }
};

template <int Regs>
inline void sum_columns(const Entries& e, size_t column, float* sum) {
  F32x16 total[Regs];
  for (int c = 0; c < Regs; ++c) total[c] = broadcast(0.0f);
  for (size_t i = 0; i < e.n; ++i) {
    const float* row = e.row(i) + column;
    const F32x16 factor = broadcast(e.factor(i));
    for (int c = 0; c < Regs; ++c) total[c] = fma(factor, load(row + 16 * c), total[c]);
  }
  for (int c = 0; c < Regs; ++c) store(sum + column + 16 * c, total[c]);
}

void sum_entries(const float* values, size_t d, const int32_t* entries, size_t n, const int64_t* source,
                 const float* scale, float* sum) {
  const Entries e{values, d, entries, n, source, scale};
  size_t column = 0;
  for (; column + 64 <= d; column += 64) sum_columns<4>(e, column, sum);
  for (; column + 16 <= d; column += 16) sum_columns<1>(e, column, sum);
  for (; column < d; ++column) {
    float total = 0.0f;
    for (size_t i = 0; i < n; ++i) total = __builtin_fmaf(e.factor(i), e.row(i)[column], total);
    sum[column] = total;
  }
}

}  // namespace
}  // namespace TS_ISA
