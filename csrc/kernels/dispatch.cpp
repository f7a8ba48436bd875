#include <cstdlib>
#include <cstring>

#include "kernels/kernels.h"
#include "kernels/target.h"

namespace ts {

extern const Kernels kernels_scalar;
#if TS_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

namespace {

struct Level {
  const Kernels* kernels;
  bool supported;
};

struct Choice {
  const Kernels* kernels = nullptr;
  const char* error = "";
};

Choice choose() {
#if TS_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const Level levels[] = {{&kernels_avx512, avx512}, {&kernels_avx2, avx2}, {&kernels_scalar, true}};
#else
  const Level levels[] = {{&kernels_scalar, true}};
#endif
  const char* wanted = std::getenv("TORCH_SLIDE_ISA");
  Choice best;
  for (const Level& level : levels)
    if (level.supported && best.kernels == nullptr) best.kernels = level.kernels;
  if (wanted == nullptr || *wanted == '\0') return best;
  for (const Level& level : levels)
    if (std::strcmp(level.kernels->isa, wanted) == 0)
      return level.supported ? Choice{level.kernels, ""} : Choice{best.kernels, "this processor does not support it"};
  return {best.kernels, "no such instruction set; choose scalar, avx2, avx512 or avx512bf16"};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *choice().kernels; }
const char* isa_error() { return choice().error; }

}  // namespace ts
