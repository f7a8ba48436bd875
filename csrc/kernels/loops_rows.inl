// The loops of RowKernels, under the rules of loops.inl. Sixteen elements at a time; a rest passes through a buffer.

namespace TS_ISA {
namespace {

using ts::AdagradScalars;
using ts::AdamScalars;
using ts::Rounding;
using ts::SgdScalars;

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

// How an update stores its results: as they are, or rounded up or down at random.
template <typename T>
struct Stores;

template <>
struct Stores<float> {
  Stores(Rounding, size_t) {}
  void first(float* p, const F32x16& x) const { store(p, x); }
  void second(float* p, const F32x16& x) const { store(p, x); }
  void third(float* p, const F32x16& x) const { store(p, x); }
};

// Rounding wants sixteen random bits: the first two results share a random number, a third has one of its own.
template <>
struct Stores<uint16_t> {
  Stores(Rounding rounding, size_t i)
      : key(rounding.key), counter(rounding.first + static_cast<uint32_t>(i)), random(random_bits(key, counter)) {}

  void first(uint16_t* p, const F32x16& x) const { store_rounded(p, x, shifted_right(random, 16)); }
  void second(uint16_t* p, const F32x16& x) const { store_rounded(p, x, lower_half(random)); }
  void third(uint16_t* p, const F32x16& x) const { store_rounded(p, x, shifted_right(random_bits(~key, counter), 16)); }

  // Adding a number below 2^16 to the bits carries into the upper half as often as the lower half is large.
  static void store_rounded(uint16_t* p, const F32x16& x, const U32x16& below) {
    const uint32_t numbers = greater(x, broadcast(-kInfinity)) | greater(broadcast(kInfinity), x);
    const F32x16 quiet = select(numbers, x, broadcast(__builtin_nanf("")));  // a carry could make another NaN a number
    store_upper_half(p, add(bits_of(quiet), below));
  }

  uint32_t key, counter;
  U32x16 random;
};

// The last n < 16 elements of an array, in room for sixteen.
template <typename T>
struct Rest {
  Rest(const T* from, size_t n) {
    for (size_t i = 0; i < n; ++i) lanes[i] = from[i];
  }
  void put_back(T* to, size_t n) const {
    for (size_t i = 0; i < n; ++i) to[i] = lanes[i];
  }
  T lanes[16] = {};
};

// The gradient as the rules see it: signed, with the coupled weight decay. A weight of inf must not meet l2 = 0.
template <class Scalars, typename T>
inline F32x16 effective_grad(const Scalars& s, F32x16 w, const T* grad) {
  const F32x16 g = mul(broadcast(s.sign), load(grad));
  return s.l2 == 0.0f ? g : fma(broadcast(s.l2), w, g);
}

// Where nothing is kept of it, beta1 is 0 and the first moment is the gradient.
template <typename T>
inline F32x16 first_moment(const AdamScalars& s, F32x16 g, const T* exp_avg) {
  return exp_avg == nullptr ? g : fma(broadcast(s.one_minus_beta1), g, mul(broadcast(s.beta1), load(exp_avg)));
}

template <typename T>
inline void adam_block(const AdamScalars& s, T* w, T* exp_avg, T* exp_avg_sq, const T* grad, const Stores<T>& to) {
  F32x16 weight = load(w);
  const F32x16 g = effective_grad(s, weight, grad);
  const F32x16 m = first_moment(s, g, exp_avg);
  const F32x16 v = fma(mul(broadcast(s.one_minus_beta2), g), g, mul(broadcast(s.beta2), load(exp_avg_sq)));
  const F32x16 denominator = fma(sqrt(v), broadcast(s.inv_root_correction2), broadcast(s.eps));
  weight = fma(broadcast(-s.step_size), div(m, denominator), mul(broadcast(s.keep), weight));
  to.first(w, weight);
  if (exp_avg != nullptr) to.second(exp_avg, m);
  to.third(exp_avg_sq, v);
}

template <typename T>
void adam(const AdamScalars& s, T* w, T* exp_avg, T* exp_avg_sq, const T* grad, size_t n, Rounding rounding) {
  const bool kept = exp_avg != nullptr;
  size_t i = 0;
  for (; i + 16 <= n; i += 16)
    adam_block(s, w + i, kept ? exp_avg + i : nullptr, exp_avg_sq + i, grad + i, Stores<T>(rounding, i));
  if (i == n) return;
  Rest<T> rest_w(w + i, n - i), rest_m(exp_avg + i, kept ? n - i : 0), rest_v(exp_avg_sq + i, n - i);
  const Rest<T> rest_g(grad + i, n - i);
  adam_block(s, rest_w.lanes, kept ? rest_m.lanes : nullptr, rest_v.lanes, rest_g.lanes, Stores<T>(rounding, i));
  rest_w.put_back(w + i, n - i);
  if (kept) rest_m.put_back(exp_avg + i, n - i);
  rest_v.put_back(exp_avg_sq + i, n - i);
}

template <typename T>
inline void sgd_block(const SgdScalars& s, T* w, T* momentum_buffer, const T* grad, const Stores<T>& to) {
  const F32x16 weight = load(w);
  F32x16 direction = effective_grad(s, weight, grad);
  if (momentum_buffer != nullptr) {
    const F32x16 momentum = broadcast(s.momentum);
    const F32x16 b = fma(broadcast(s.one_minus_dampening), direction, mul(momentum, load(momentum_buffer)));
    to.second(momentum_buffer, b);
    direction = s.nesterov ? fma(momentum, b, direction) : b;
  }
  to.first(w, fma(broadcast(-s.lr), direction, weight));
}

template <typename T>
void sgd(const SgdScalars& s, T* w, T* momentum_buffer, const T* grad, size_t n, Rounding rounding) {
  const bool buffered = momentum_buffer != nullptr;
  size_t i = 0;
  for (; i + 16 <= n; i += 16)
    sgd_block(s, w + i, buffered ? momentum_buffer + i : nullptr, grad + i, Stores<T>(rounding, i));
  if (i == n) return;
  Rest<T> rest_w(w + i, n - i), rest_b(momentum_buffer + i, buffered ? n - i : 0);
  const Rest<T> rest_g(grad + i, n - i);
  sgd_block(s, rest_w.lanes, buffered ? rest_b.lanes : nullptr, rest_g.lanes, Stores<T>(rounding, i));
  rest_w.put_back(w + i, n - i);
  if (buffered) rest_b.put_back(momentum_buffer + i, n - i);
}

template <class Scalars, typename T>
float mean_square(const Scalars& s, const T* w, const T* grad, size_t d) {
  F32x16 squares = broadcast(0.0f);
  size_t i = 0;
  for (; i + 16 <= d; i += 16) {
    const F32x16 g = effective_grad(s, load(w + i), grad + i);
    squares = fma(g, g, squares);
  }
  if (i < d) {
    const Rest<T> rest_w(w + i, d - i), rest_g(grad + i, d - i);
    const F32x16 g = effective_grad(s, load(rest_w.lanes), rest_g.lanes);
    squares = fma(g, g, squares);
  }
  return reduce_add(squares) / static_cast<float>(d);
}

template <typename T>
inline void scaled_momentum_block(const AdamScalars& s, F32x16 step, T* w, T* exp_avg, const T* grad,
                                  const Stores<T>& to) {
  const F32x16 weight = load(w);
  const F32x16 g = effective_grad(s, weight, grad);
  const F32x16 m = first_moment(s, g, exp_avg);
  to.first(w, fma(step, m, mul(broadcast(s.keep), weight)));
  if (exp_avg != nullptr) to.second(exp_avg, m);
}

template <typename T>
void rowwise_adam(const AdamScalars& s, T* w, T* exp_avg, float* exp_avg_sq, const T* grad, size_t d,
                  Rounding rounding) {
  *exp_avg_sq = __builtin_fmaf(s.one_minus_beta2, mean_square(s, w, grad, d), s.beta2 * *exp_avg_sq);
  const float denominator = __builtin_fmaf(__builtin_sqrtf(*exp_avg_sq), s.inv_root_correction2, s.eps);
  const F32x16 step = broadcast(-s.step_size / denominator);
  const bool kept = exp_avg != nullptr;
  size_t i = 0;
  for (; i + 16 <= d; i += 16)
    scaled_momentum_block(s, step, w + i, kept ? exp_avg + i : nullptr, grad + i, Stores<T>(rounding, i));
  if (i == d) return;
  Rest<T> rest_w(w + i, d - i), rest_m(exp_avg + i, kept ? d - i : 0);
  const Rest<T> rest_g(grad + i, d - i);
  scaled_momentum_block(s, step, rest_w.lanes, kept ? rest_m.lanes : nullptr, rest_g.lanes, Stores<T>(rounding, i));
  rest_w.put_back(w + i, d - i);
  if (kept) rest_m.put_back(exp_avg + i, d - i);
}

template <typename T>
void rowwise_adagrad(const AdagradScalars& s, T* w, float* sum, const T* grad, size_t d, Rounding rounding) {
  *sum += mean_square(s, w, grad, d);
  const F32x16 step = broadcast(-s.lr / (__builtin_sqrtf(*sum) + s.eps));
  const auto block = [&](T* weights, const T* gradients, size_t i) {
    const F32x16 weight = load(weights);
    Stores<T>(rounding, i).first(weights, fma(step, effective_grad(s, weight, gradients), weight));
  };
  size_t i = 0;
  for (; i + 16 <= d; i += 16) block(w + i, grad + i, i);
  if (i == d) return;
  Rest<T> rest_w(w + i, d - i);
  const Rest<T> rest_g(grad + i, d - i);
  block(rest_w.lanes, rest_g.lanes, i);
  rest_w.put_back(w + i, d - i);
}

template <typename T>
constexpr ts::RowKernels<T> row_kernels{adam<T>, rowwise_adam<T>, rowwise_adagrad<T>, sgd<T>};

// The entries of one row of a sum: few as a rule, so that the sum stays in registers and every value is read once.
struct Entries {
  const float* values;
  size_t d;
  const int32_t* entries;
  size_t n;
  const int64_t* source;
  const float* scale;

  size_t entry(size_t i) const { return entries == nullptr ? i : static_cast<size_t>(entries[i]); }
  const float* row(size_t i) const {
    return values + (source == nullptr ? entry(i) : static_cast<size_t>(source[entry(i)])) * d;
  }
  float factor(size_t i) const { return scale == nullptr ? 1.0f : scale[entry(i)]; }
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
