#include "kernels/kernels.h"
#include "kernels/target.h"

#if TS_X86
TS_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma")
#define TS_ISA isa_avx512
#include "kernels/simd_avx512.h"

#include "kernels/partial.h"

#include "kernels/loops.inl"
#include "kernels/loops_loss.inl"
#include "kernels/loops_sampled.inl"
TS_TARGET_END

namespace ts {
extern const Kernels kernels_avx512;
const Kernels kernels_avx512{
    "avx512",
    TS_ISA::project,
    TS_ISA::squared_norm,
    {TS_ISA::max_sum, TS_ISA::exp_sum, TS_ISA::weighted_sum, TS_ISA::scale_minus, TS_ISA::softplus_sum},
    {TS_ISA::dots<float>, TS_ISA::row_gradients<float>},
    {TS_ISA::dots<uint16_t>, TS_ISA::row_gradients<uint16_t>},
};
}  // namespace ts
#endif
