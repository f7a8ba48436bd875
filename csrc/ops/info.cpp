#include "kernels/kernels.h"
#include "ops/common.h"

namespace ts {

std::string isa() {
  if (!isa_error().empty()) throw std::invalid_argument(isa_error());
  return kernels().isa;
}

int64_t num_threads() { return torch::stable::get_num_threads(); }

STABLE_TORCH_LIBRARY_FRAGMENT(torch_slide, m) {
  m.def("isa() -> str");
  m.def("num_threads() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(torch_slide, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("num_threads", TORCH_BOX(&num_threads));
}

}  // namespace ts
