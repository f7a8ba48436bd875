#include "core/simhash.h"

#include <array>
#include <cmath>

#include "kernels/kernels.h"

namespace ts {
namespace {

constexpr size_t kMaxBits = 24;

uint32_t bits_at(const uint32_t* words, size_t first, size_t count) {
  const uint64_t window = static_cast<uint64_t>(words[first / 32 + 1]) << 32 | words[first / 32];
  return static_cast<uint32_t>(window >> first % 32) & ((1u << count) - 1);
}

// The `reach` bits of a code that lie nearest to their hyperplanes, nearest first; ties by position.
std::array<uint32_t, kMaxBits> nearest_bits(const float* projections, size_t bits, size_t reach) {
  std::array<uint32_t, kMaxBits> order{};
  for (size_t k = 0, known = 0; k < bits; ++k) {
    const auto nearer = [&](uint32_t other) { return std::fabs(projections[k]) < std::fabs(projections[other]); };
    if (known == reach && !nearer(order[reach - 1])) continue;
    size_t at = known < reach ? known++ : reach - 1;
    for (; at > 0 && nearer(order[at - 1]); --at) order[at] = order[at - 1];
    order[at] = static_cast<uint32_t>(k);
  }
  return order;
}

}  // namespace

std::vector<uint32_t> flips_by_size(size_t bits, size_t probes) {
  std::vector<uint32_t> flips{0};
  for (size_t size = 1; size <= bits && flips.size() < probes; ++size) {
    uint32_t set = (1u << size) - 1;
    while (set < 1u << bits && flips.size() < probes) {
      flips.push_back(set);
      const uint32_t lowest = set & (0u - set), carried = set + lowest;  // the next integer with as many bits
      set = carried | ((set ^ carried) / lowest >> 2);
    }
  }
  return flips;
}

void SimHash::codes(const float* x, size_t n, int32_t* codes) const {
  const HashKernels& kernel = kernels().hash;
  const size_t width = projections.count * kPanelWidth, words = projections.count + 1, probes = flips.size();
  uint32_t flipped = 0;
  for (const uint32_t ranks : flips) flipped |= ranks;
  const size_t reach = flipped == 0 ? 0 : 32 - static_cast<size_t>(__builtin_clz(flipped));
  const std::array<float, kRowBlock> zeros{};
  std::vector<float> y(kRowBlock * width);
  std::vector<uint32_t> signs(kRowBlock * words);
  for (size_t begin = 0; begin < n; begin += kRowBlock) {
    const size_t rows = std::min(kRowBlock, n - begin);
    for (size_t p = 0; p < projections.count; ++p) {
      float* const block = y.data() + p * kPanelWidth;
      kernel.project(x + begin * projections.d, rows, projections.d, projections[p], block, width);
      kernel.above(block, rows, width, zeros.data(), signs.data() + p, words);
    }
    for (size_t r = 0; r < rows; ++r) {
      int32_t* to = codes + (begin + r) * num_tables * probes;
      for (size_t table = 0; table < num_tables; ++table) {
        const uint32_t code = bits_at(signs.data() + r * words, table * bits, bits);
        *to++ = static_cast<int32_t>(code);
        if (reach == 0) continue;
        const auto order = nearest_bits(y.data() + r * width + table * bits, bits, reach);
        for (size_t probe = 1; probe < probes; ++probe) {
          uint32_t neighbour = code;
          for (uint32_t ranks = flips[probe]; ranks != 0; ranks &= ranks - 1)
            neighbour ^= 1u << order[static_cast<size_t>(__builtin_ctz(ranks))];
          *to++ = static_cast<int32_t>(neighbour);
        }
      }
    }
  }
}

}  // namespace ts
