// fma_bf16 for the instruction sets that lack one: both factors widened to float, where it is exact.
#pragma once

namespace TS_ISA {

// acc + the 32 products a[i] * b[i], two to a lane.
inline F32x16 fma_bf16(const uint16_t* a, const uint16_t* b, const F32x16& acc) {
  return fma(load(a + 16), load(b + 16), fma(load(a), load(b), acc));
}

}  // namespace TS_ISA
