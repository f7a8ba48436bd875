// How csrc/core, which knows no torch, gets torch's threads.
#pragma once
#include "ops/common.h"

namespace ts {

// work(begin, end) for ranges that cover [0, n), of at least `grain` each but the last.
inline constexpr auto parallel = [](int64_t n, int64_t grain, const auto& work) {
  if (n > 0) torch::stable::parallel_for(0, n, grain, work);
};

}  // namespace ts
