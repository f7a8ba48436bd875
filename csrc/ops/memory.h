// Large outputs.
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "ops/common.h"

namespace ts {

// A fresh output of tens of megabytes costs more in page faults than in arithmetic (a fault for every 4 KiB): where the
// system grants huge pages on request, as most do, ask for them. Advice for memory that is mapped already is harmless.
inline void advise_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096, worthwhile = uintptr_t{4} << 20;
  if (bytes < worthwhile) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) & ~(page - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) & ~(page - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

inline Tensor empty_large(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
  Tensor tensor = torch::stable::empty(sizes, type);
  advise_huge_pages(tensor.mutable_data_ptr(), static_cast<size_t>(tensor.numel()) * tensor.element_size());
  return tensor;
}

}  // namespace ts
