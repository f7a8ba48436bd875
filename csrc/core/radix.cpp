#include "core/radix.h"

#include <algorithm>

namespace ts {
namespace {

struct Digit {
  Digit(const RadixPlan& plan, int pass) : shift(pass * plan.bits), mask(static_cast<uint32_t>(plan.digits() - 1)) {}
  uint32_t of(KeyValue item) const { return item.key >> shift & mask; }

  int shift;
  uint32_t mask;
};

}  // namespace

RadixPlan::RadixPlan(int64_t num_keys) {
  constexpr int most_bits = 11;
  int key_bits = 1;
  while (num_keys > int64_t{1} << key_bits) ++key_bits;
  passes = (key_bits + most_bits - 1) / most_bits;
  bits = (key_bits + passes - 1) / passes;
}

void count_digits(const RadixPlan& plan, const KeyValue* items, int64_t n, int pass, int64_t* counts) {
  const Digit digit(plan, pass);
  std::fill_n(counts, plan.digits(), 0);
  for (int64_t i = 0; i < n; ++i) ++counts[digit.of(items[i])];
}

void digit_places(const RadixPlan& plan, int64_t* counts, int64_t num_blocks) {
  int64_t place = 0;
  for (int64_t d = 0; d < plan.digits(); ++d)
    for (int64_t block = 0; block < num_blocks; ++block) {
      const int64_t count = counts[block * plan.digits() + d];
      counts[block * plan.digits() + d] = place;
      place += count;
    }
}

void move_by_digit(const RadixPlan& plan, const KeyValue* items, int64_t n, int pass, int64_t* places, KeyValue* to) {
  const Digit digit(plan, pass);
  for (int64_t i = 0; i < n; ++i) to[places[digit.of(items[i])]++] = items[i];
}

}  // namespace ts
