// bfloat16 travels as uint16_t, the upper half of a float32; widening is exact. Other types are wide enough.
#pragma once
#include <cstdint>
#include <cstring>

namespace ts {

inline float widened(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float widened(float x) { return x; }
inline double widened(double x) { return x; }

}  // namespace ts
