#include "core/coalesce.h"

#include <algorithm>
#include <array>

#include "kernels/kernels.h"

namespace ts {
namespace {

constexpr int kDigitBits = 11;
constexpr size_t kDigits = size_t{1} << kDigitBits;

// The id above, the entry below: one comparison of the upper half sorts both.
constexpr int kIdShift = 32;

void sort_by_id(std::vector<uint64_t>& keys, uint32_t largest_id) {
  std::vector<uint64_t> sorted(keys.size());
  for (int shift = 0; shift < 32 && (largest_id >> shift) != 0; shift += kDigitBits) {
    const auto digit = [shift](uint64_t key) { return (key >> (kIdShift + shift)) & (kDigits - 1); };
    std::array<uint32_t, kDigits> next{};
    for (const uint64_t key : keys) ++next[digit(key)];
    uint32_t before = 0;
    for (uint32_t& position : next) {
      const uint32_t count = position;
      position = before;
      before += count;
    }
    for (const uint64_t key : keys) sorted[next[digit(key)]++] = key;
    keys.swap(sorted);
  }
}

}  // namespace

EntriesByRow group_by_row(const int64_t* ids, size_t n) {
  std::vector<uint64_t> keys(n);
  uint32_t largest_id = 0;
  for (size_t e = 0; e < n; ++e) {
    keys[e] = static_cast<uint64_t>(ids[e]) << kIdShift | e;
    largest_id = std::max(largest_id, static_cast<uint32_t>(ids[e]));
  }
  sort_by_id(keys, largest_id);
  EntriesByRow groups;
  groups.entries.resize(n);
  for (size_t e = 0; e < n; ++e) {
    const auto id = static_cast<uint32_t>(keys[e] >> kIdShift);
    groups.entries[e] = static_cast<uint32_t>(keys[e]);
    if (groups.ids.empty() || groups.ids.back() != id) {
      groups.ids.push_back(id);
      groups.starts.push_back(static_cast<uint32_t>(e));
    }
  }
  groups.starts.push_back(static_cast<uint32_t>(n));
  return groups;
}

void sum_entries(const EntriesByRow& groups, const float* values, const int64_t* source, const float* scale, size_t d,
                 float* sums, size_t begin, size_t end) {
  const auto sum = kernels().rows.sum_entries;
  for (size_t k = begin; k < end; ++k) {
    const uint32_t first = groups.starts[k];
    sum(values, d, groups.entries.data() + first, groups.starts[k + 1] - first, source, scale, sums + k * d);
  }
}

}  // namespace ts
