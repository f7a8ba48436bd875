// Sixteen float lanes in one zmm register.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace TS_ISA {

struct F32x16 {
  __m512 v;
};

// 24 of the 32 registers hold sums.
constexpr int kTileRows = 12, kTileRegs = 2;

inline F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F32x16 a) { _mm512_storeu_ps(p, a.v); }
inline F32x16 broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline F32x16 add(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32x16 sub(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32x16 mul(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32x16 div(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32x16 sqrt(F32x16 a) { return {_mm512_sqrt_ps(a.v)}; }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32x16 max(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32x16 min(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F32x16 round(F32x16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F32x16 scale_by_power_of_two(F32x16 a, F32x16 n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline uint32_t greater(F32x16 a, F32x16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
inline F32x16 select(uint32_t mask, F32x16 yes, F32x16 no) {
  return {_mm512_mask_blend_ps(static_cast<__mmask16>(mask), no.v, yes.v)};
}
inline F32x16 load(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}

struct U32x16 {
  __m512i v;
};
inline U32x16 bits_of(F32x16 a) { return {_mm512_castps_si512(a.v)}; }
inline U32x16 broadcast_bits(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
inline U32x16 counting_from(uint32_t first) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)), lane)};
}
inline U32x16 add(U32x16 a, U32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline U32x16 mul(U32x16 a, uint32_t b) { return {_mm512_mullo_epi32(a.v, _mm512_set1_epi32(static_cast<int>(b)))}; }
inline U32x16 exclusive_or(U32x16 a, U32x16 b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline U32x16 shifted_right(U32x16 a, int by) { return {_mm512_srl_epi32(a.v, _mm_cvtsi32_si128(by))}; }
inline U32x16 lower_half(U32x16 a) { return {_mm512_and_si512(a.v, _mm512_set1_epi32(0xffff))}; }
inline void store_upper_half(uint16_t* p, U32x16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(a.v, 16)));
}

inline float reduce_add(F32x16 a) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}
inline float reduce_max(F32x16 a) { return _mm512_reduce_max_ps(a.v); }

}  // namespace TS_ISA
