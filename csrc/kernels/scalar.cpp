#include "kernels/kernels.h"
#include "kernels/target.h"

#define TS_ISA isa_scalar
#include "kernels/simd_scalar.h"
#include "kernels/widen_bf16.h"

#include "kernels/partial.h"

#include "kernels/loops.inl"
#include "kernels/loops_hash.inl"
#include "kernels/loops_loss.inl"
#include "kernels/loops_rows.inl"
#include "kernels/loops_sampled.inl"

namespace ts {
extern const Kernels kernels_scalar;
const Kernels kernels_scalar{
    "scalar",
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
