#include <cstdlib>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/target.h"

namespace ts {

extern const Kernels kernels_scalar;
#if TS_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512bf16;
#endif

namespace {

struct Choice {
  const Kernels* kernels;
  std::string error;
};

// Narrowest first.
std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> levels{&kernels_scalar};
#if TS_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) levels.push_back(&kernels_avx2);
  if (avx512) levels.push_back(&kernels_avx512);
  if (avx512 && __builtin_cpu_supports("avx512bf16")) levels.push_back(&kernels_avx512bf16);
#endif
  return levels;
}

Choice choose() {
  const std::vector<const Kernels*> levels = runnable();
  const char* const wanted = std::getenv("TORCH_SLIDE_ISA");
  if (wanted == nullptr || *wanted == '\0') return {levels.back(), ""};
  std::string names;
  for (const Kernels* level : levels) {
    if (std::string(wanted) == level->isa) return {level, ""};
    names += (names.empty() ? "" : ", ") + std::string(level->isa);
  }
  return {levels.back(), "TORCH_SLIDE_ISA: expected the instruction set to be one that this processor runs (" + names +
                             "), got " + wanted};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *choice().kernels; }
const std::string& isa_error() { return choice().error; }

}  // namespace ts
