#include "kernels/kernels.h"
#include "kernels/target.h"

#define TS_ISA isa_scalar
#include "kernels/simd_scalar.h"
#include "kernels/loops.inl"
#include "kernels/loops_rows.inl"

namespace ts {
extern const Kernels kernels_scalar;
const Kernels kernels_scalar{
    "scalar",
    TS_ISA::project,
    TS_ISA::squared_norm,
    {TS_ISA::adam, TS_ISA::rowwise_adagrad, TS_ISA::sgd, TS_ISA::add_scaled},
};
}  // namespace ts
