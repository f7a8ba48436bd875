// simd_avx512.h with vdpbf16ps, which sums neighbouring pairs and flushes denormals: fast, close, not bit-equal.
#pragma once
#include "kernels/simd_avx512.h"

namespace TS_ISA {

inline F32x16 fma_bf16(const uint16_t* a, const uint16_t* b, const F32x16& acc) {
  const __m512bh x = (__m512bh)_mm512_loadu_si512(a), y = (__m512bh)_mm512_loadu_si512(b);
  return {_mm512_dpbf16_ps(acc.v, x, y)};
}

}  // namespace TS_ISA
