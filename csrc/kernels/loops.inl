// The loop bodies, included once per instruction set inside its target region with TS_ISA naming the namespace.
// Only simd_*.h and builtins may be used here: a std template instantiated in a target region could be the copy that
// the linker keeps for everyone.

namespace TS_ISA {
namespace {

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

float dot_bf16(const uint16_t* a, const uint16_t* b, size_t n) {
  F32x16 acc = broadcast(0.0f);
  size_t i = 0;
  for (; i + 32 <= n; i += 32) acc = fma_bf16(a + i, b + i, acc);
  if (i < n) {
    uint16_t rest_a[32] = {}, rest_b[32] = {};
    for (size_t j = i; j < n; ++j) {
      rest_a[j - i] = a[j];
      rest_b[j - i] = b[j];
    }
    acc = fma_bf16(rest_a, rest_b, acc);
  }
  return reduce_add(acc);
}

}  // namespace
}  // namespace TS_ISA
