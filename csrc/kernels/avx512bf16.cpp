#include "kernels/kernels.h"
#include "kernels/target.h"

#if TS_X86
TS_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#define TS_ISA isa_avx512bf16
#include "kernels/simd_avx512bf16.h"

#include "kernels/partial.h"

#include "kernels/loops.inl"
#include "kernels/loops_hash.inl"
#include "kernels/loops_loss.inl"
#include "kernels/loops_rows.inl"
#include "kernels/loops_sampled.inl"
TS_TARGET_END

namespace ts {
extern const Kernels kernels_avx512bf16;
const Kernels kernels_avx512bf16{
    "avx512bf16",
    TS_ISA::squared_norm,
    TS_ISA::dot_bf16,
    {TS_ISA::project, TS_ISA::above, TS_ISA::bin_argmax},
    TS_ISA::loss_kernels,
    TS_ISA::sampled_kernels<float>,
    TS_ISA::sampled_kernels<uint16_t>,
    TS_ISA::row_kernels<float>,
    TS_ISA::row_kernels<uint16_t>,
    TS_ISA::sum_entries,
};
}  // namespace ts
#endif
