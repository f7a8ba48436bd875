// The last n < 16 elements of an array, for loops over F32x16. Included after a simd_*.h.
#pragma once

namespace TS_ISA {

// The lanes behind the n elements hold fill.
template <typename Element>
inline F32x16 load_rest(const Element* p, size_t n, Element fill) {
  Element lanes[16];
  for (size_t i = 0; i < 16; ++i) lanes[i] = i < n ? p[i] : fill;
  return load(lanes);
}

inline void store_rest(float* p, F32x16 v, size_t n) {
  float lanes[16];
  store(lanes, v);
  for (size_t i = 0; i < n; ++i) p[i] = lanes[i];
}

}  // namespace TS_ISA
