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

void rowwise_adagrad(const AdagradScalars& s, float* w, float* sum, const float* grad, size_t d) {
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
  const F32x16 step = broadcast(-s.lr / (__builtin_sqrtf(*sum) + s.eps));
  for (size_t i = 0; i < whole; i += 16) {
    const F32x16 weight = load(w + i);
    store(w + i, fma(step, effective_grad(s, weight, grad + i), weight));
  }
  store(rest_w, fma(step, last, load(rest_w)));
  copy_floats(w + whole, rest_w, d - whole);
}

void add_scaled(float* y, const float* x, float scale, size_t n) {
  const F32x16 factor = broadcast(scale);
  size_t i = 0;
  for (; i + 16 <= n; i += 16) store(y + i, fma(factor, load(x + i), load(y + i)));
  if (i == n) return;
  float rest_y[16] = {}, rest_x[16] = {};
  copy_floats(rest_y, y + i, n - i);
  copy_floats(rest_x, x + i, n - i);
  store(rest_y, fma(factor, load(rest_x), load(rest_y)));
  copy_floats(y + i, rest_y, n - i);
}

}  // namespace
}  // namespace TS_ISA
