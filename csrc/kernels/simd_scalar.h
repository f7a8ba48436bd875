// Sixteen float lanes in plain C++: the fallback, and the meaning of every other simd_*.h.
//
// std::fma, not a*b+c: the wider ISAs fuse, and codes must be bit-equal on all of them. Where the processor has FMA
// but the build has not, libm forwards to the instruction.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace TS_ISA {

struct F32x16 {
  float lane[16];
};

constexpr int kTileRows = 4, kTileRegs = 1;

#define TS_LANES for (int i = 0; i < 16; ++i)
inline F32x16 load(const float* p) {
  F32x16 r;
  std::memcpy(r.lane, p, sizeof r.lane);
  return r;
}
inline void store(float* p, const F32x16& a) { std::memcpy(p, a.lane, sizeof a.lane); }
inline F32x16 broadcast(float x) {
  F32x16 r;
  TS_LANES r.lane[i] = x;
  return r;
}
inline F32x16 add(const F32x16& a, const F32x16& b) {
  F32x16 r;
  TS_LANES r.lane[i] = a.lane[i] + b.lane[i];
  return r;
}
inline F32x16 sub(const F32x16& a, const F32x16& b) {
  F32x16 r;
  TS_LANES r.lane[i] = a.lane[i] - b.lane[i];
  return r;
}
inline F32x16 mul(const F32x16& a, const F32x16& b) {
  F32x16 r;
  TS_LANES r.lane[i] = a.lane[i] * b.lane[i];
  return r;
}
inline F32x16 div(const F32x16& a, const F32x16& b) {
  F32x16 r;
  TS_LANES r.lane[i] = a.lane[i] / b.lane[i];
  return r;
}
inline F32x16 sqrt(const F32x16& a) {
  F32x16 r;
  TS_LANES r.lane[i] = std::sqrt(a.lane[i]);
  return r;
}
inline F32x16 fma(const F32x16& a, const F32x16& b, const F32x16& c) {
  F32x16 r;
  TS_LANES r.lane[i] = std::fma(a.lane[i], b.lane[i], c.lane[i]);
  return r;
}
// As vmaxps/vminps: the second operand when either is NaN.
inline F32x16 max(const F32x16& a, const F32x16& b) {
  F32x16 r;
  TS_LANES r.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
  return r;
}
inline F32x16 min(const F32x16& a, const F32x16& b) {
  F32x16 r;
  TS_LANES r.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
  return r;
}
inline F32x16 round(const F32x16& a) {
  F32x16 r;
  TS_LANES r.lane[i] = std::nearbyint(a.lane[i]);
  return r;
}
// a * 2^n for integral n in [-126, 127].
inline F32x16 scale_by_power_of_two(const F32x16& a, const F32x16& n) {
  F32x16 r;
  TS_LANES {
    const int32_t bits = (static_cast<int32_t>(n.lane[i]) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    r.lane[i] = a.lane[i] * power;
  }
  return r;
}
// Bit i is set where a.lane[i] > b.lane[i].
inline uint32_t greater(const F32x16& a, const F32x16& b) {
  uint32_t m = 0;
  TS_LANES m |= static_cast<uint32_t>(a.lane[i] > b.lane[i]) << i;
  return m;
}
inline F32x16 select(uint32_t mask, const F32x16& yes, const F32x16& no) {
  F32x16 r;
  TS_LANES r.lane[i] = (mask >> i & 1u) ? yes.lane[i] : no.lane[i];
  return r;
}
// bfloat16 travels as uint16_t; widening is exact.
inline F32x16 load(const uint16_t* p) {
  F32x16 r;
  TS_LANES {
    const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
    std::memcpy(&r.lane[i], &bits, sizeof bits);
  }
  return r;
}

struct U32x16 {
  uint32_t lane[16];
};
inline U32x16 bits_of(const F32x16& a) {
  U32x16 r;
  std::memcpy(r.lane, a.lane, sizeof r.lane);
  return r;
}
inline U32x16 broadcast_bits(uint32_t x) {
  U32x16 r;
  TS_LANES r.lane[i] = x;
  return r;
}
inline U32x16 counting_from(uint32_t first) {
  U32x16 r;
  TS_LANES r.lane[i] = first + static_cast<uint32_t>(i);
  return r;
}
inline U32x16 add(const U32x16& a, const U32x16& b) {
  U32x16 r;
  TS_LANES r.lane[i] = a.lane[i] + b.lane[i];
  return r;
}
inline U32x16 mul(const U32x16& a, uint32_t b) {
  U32x16 r;
  TS_LANES r.lane[i] = a.lane[i] * b;
  return r;
}
inline U32x16 exclusive_or(const U32x16& a, const U32x16& b) {
  U32x16 r;
  TS_LANES r.lane[i] = a.lane[i] ^ b.lane[i];
  return r;
}
inline U32x16 shifted_right(const U32x16& a, int by) {
  U32x16 r;
  TS_LANES r.lane[i] = a.lane[i] >> by;
  return r;
}
inline U32x16 lower_half(const U32x16& a) {
  U32x16 r;
  TS_LANES r.lane[i] = a.lane[i] & 0xffffu;
  return r;
}
inline void store_upper_half(uint16_t* p, const U32x16& a) { TS_LANES p[i] = static_cast<uint16_t>(a.lane[i] >> 16); }
#undef TS_LANES

// The fixed reduction tree shared by every ISA: lanes 8 apart, then 4, 2, 1.
inline float reduce_add(const F32x16& a) {
  float s[16];
  std::memcpy(s, a.lane, sizeof s);
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) s[i] += s[i + width];
  return s[0];
}
inline float reduce_max(const F32x16& a) {
  float m = a.lane[0];
  for (int i = 1; i < 16; ++i) m = a.lane[i] > m ? a.lane[i] : m;
  return m;
}

}  // namespace TS_ISA
