#include "kernels/kernels.h"
#include "ops/common.h"

namespace ts {

// x [n, d], m [d, p] -> [n, p]
Tensor project(const Tensor& x, const Tensor& m) {
  constexpr const char* op = "project";
  require(x.dim() == 2 && m.dim() == 2 && x.size(1) == m.size(0), op, "x, m", "[n, d] and [d, p]");
  require(m.size(1) % 16 == 0, op, "m", "of a width divisible by 16");
  const int64_t n = x.size(0), d = x.size(1), p = m.size(1);
  const float* px = data<float>(x, op, "x");
  const float* pm = data<float>(m, op, "m");
  Tensor y = empty<float>({n, p});
  float* py = mutable_data<float>(y, op, "y");
  torch::stable::parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
    kernels().project(px + begin * d, end - begin, d, pm, p, py + begin * p);
  });
  return y;
}

STABLE_TORCH_LIBRARY_FRAGMENT(torch_slide, m) { m.def("project(Tensor x, Tensor m) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(torch_slide, CPU, m) { m.impl("project", TORCH_BOX(&project)); }

}  // namespace ts
