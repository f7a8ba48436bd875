// Loops of LossKernels, written against F32x16; see loops.inl for the rules of such a file.

namespace TS_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

// e^x to within one ulp; 0 below -86.9 and at -inf, inf above 88.72, NaN for NaN.
//
// Range reduction of Cody and Waite (Software Manual for the Elementary Functions, 1980, chapter 6): x = n ln 2 + r,
// |r| <= ln 2 / 2, with ln 2 in two parts so that r keeps its last bits. e^r = 1 + r + r^2 q(r), where q is the minimax
// polynomial for the relative error of e^r (Remez exchange in 40 digits): 3.1e-9, a twentieth of an ulp. The exponent
// is applied as 2 * 2^(n - 1), since n reaches 128.
inline F32x16 exp(F32x16 x) {
  const F32x16 lowest = broadcast(-86.9f), highest = broadcast(89.0f);
  const F32x16 inside = max(lowest, min(highest, x));  // in this order both keep a NaN
  const F32x16 n = round(mul(inside, broadcast(1.44269504f)));
  const F32x16 r = fma(n, broadcast(1.9046543e-9f), fma(n, broadcast(-0.693147182f), inside));
  F32x16 q = broadcast(0.00138144670593f);
  q = fma(q, r, broadcast(0.00836878041118f));
  q = fma(q, r, broadcast(0.0416683942109f));
  q = fma(q, r, broadcast(0.166665201078f));
  q = fma(q, r, broadcast(0.499999934125f));
  const F32x16 power = add(fma(q, mul(r, r), r), broadcast(1.0f));
  const F32x16 scaled = scale_by_power_of_two(add(power, power), sub(n, broadcast(1.0f)));
  return select(greater(lowest, x), broadcast(0.0f), scaled);
}

// log(1 + u) for u in [0, 1], to within 2 ulp also where u is tiny: 2 artanh(t) with t = u / (2 + u) <= 1/3, and
// artanh(t) = t + t^3 p(t^2) with the minimax p of degree 3 (Remez exchange, relative error 4.5e-9).
inline F32x16 log1p(F32x16 u) {
  const F32x16 t = div(u, add(u, broadcast(2.0f)));
  const F32x16 s = mul(t, t);
  F32x16 p = broadcast(0.140122294855f);
  p = fma(p, s, broadcast(0.139995705239f));
  p = fma(p, s, broadcast(0.200108495306f));
  p = fma(p, s, broadcast(0.333332065663f));
  const F32x16 artanh = fma(mul(p, s), t, t);
  return add(artanh, artanh);
}

float max_sum(const float* z, const float* a, size_t n) {
  F32x16 best = broadcast(-kInfinity);
  size_t i = 0;
  for (; i + 16 <= n; i += 16) best = max(add(load(z + i), load(a + i)), best);  // in this order best stays a number
  if (i < n) best = max(add(load_rest(z + i, n - i, -kInfinity), load_rest(a + i, n - i, 0.0f)), best);
  return reduce_max(best);
}

float exp_sum(float* z, const float* a, float shift, size_t n) {
  const F32x16 shifts = broadcast(shift);
  F32x16 sum = broadcast(0.0f);
  size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const F32x16 e = exp(add(sub(load(z + i), shifts), load(a + i)));
    store(z + i, e);
    sum = add(sum, e);
  }
  if (i < n) {
    const F32x16 e = exp(add(sub(load_rest(z + i, n - i, -kInfinity), shifts), load_rest(a + i, n - i, 0.0f)));
    store_rest(z + i, e, n - i);
    sum = add(sum, e);
  }
  return reduce_add(sum);
}

inline F32x16 weighted(F32x16 q, F32x16 z, F32x16 shift) {
  const F32x16 zero = broadcast(0.0f);
  return select(greater(q, zero) | greater(zero, q), mul(q, sub(z, shift)), zero);
}

ts::LossKernels::Weighted weighted_sum(const float* q, const float* z, float shift, size_t n) {
  const F32x16 shifts = broadcast(shift);
  F32x16 mass = broadcast(0.0f), dot = broadcast(0.0f);
  size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    mass = add(mass, load(q + i));
    dot = add(dot, weighted(load(q + i), load(z + i), shifts));
  }
  if (i < n) {
    const F32x16 rest = load_rest(q + i, n - i, 0.0f);
    mass = add(mass, rest);
    dot = add(dot, weighted(rest, load_rest(z + i, n - i, 0.0f), shifts));
  }
  return {reduce_add(mass), reduce_add(dot)};
}

void scale_minus(float* z, float factor, const float* q, size_t n) {
  const F32x16 factors = broadcast(factor);
  size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const F32x16 scaled = mul(load(z + i), factors);
    store(z + i, q == nullptr ? scaled : sub(scaled, load(q + i)));
  }
  for (; i < n; ++i) z[i] = z[i] * factor - (q == nullptr ? 0.0f : q[i]);
}

// Replaces z by the gradient, returns the loss.
inline F32x16 softplus_step(F32x16& z, F32x16 weight) {
  const F32x16 zero = broadcast(0.0f), one = broadcast(1.0f);
  const F32x16 u = exp(min(z, sub(zero, z)));
  const F32x16 loss = add(max(zero, z), log1p(u));
  const F32x16 sigmoid = div(select(greater(zero, z), u, one), add(one, u));
  z = mul(weight, sigmoid);
  return mul(weight, loss);
}

float softplus_sum(float* z, const float* a, const float* c, size_t n) {
  F32x16 sum = broadcast(0.0f);
  size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    F32x16 logits = load(z + i);
    const F32x16 weight = exp(load(a + i));
    sum = add(sum, softplus_step(logits, c == nullptr ? weight : mul(weight, load(c + i))));
    store(z + i, logits);
  }
  if (i < n) {
    F32x16 logits = load_rest(z + i, n - i, -kInfinity);
    const F32x16 weight = exp(load_rest(a + i, n - i, 0.0f));
    sum = add(sum, softplus_step(logits, c == nullptr ? weight : mul(weight, load_rest(c + i, n - i, 0.0f))));
    store_rest(z + i, logits, n - i);
  }
  return reduce_add(sum);
}

constexpr ts::LossKernels loss_kernels{max_sum, exp_sum, weighted_sum, scale_minus, softplus_sum};

}  // namespace
}  // namespace TS_ISA
