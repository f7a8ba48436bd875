#include "core/radix.h"

#include <algorithm>

namespace ts {
namespace {

int64_t digit(KeyValue item, int pass) { return item.key >> (pass * kDigitBits) & (kDigits - 1); }

}  // namespace

void count_digits(const KeyValue* items, int64_t n, int pass, int64_t* counts) {
  std::fill_n(counts, kDigits, 0);
  for (int64_t i = 0; i < n; ++i) ++counts[digit(items[i], pass)];
}

void digit_places(int64_t* counts, int64_t num_blocks) {
  int64_t place = 0;
  for (int64_t d = 0; d < kDigits; ++d)
    for (int64_t block = 0; block < num_blocks; ++block) {
      const int64_t count = counts[block * kDigits + d];
      counts[block * kDigits + d] = place;
      place += count;
    }
}

void move_by_digit(const KeyValue* items, int64_t n, int pass, int64_t* places, KeyValue* to) {
  for (int64_t i = 0; i < n; ++i) to[places[digit(items[i], pass)]++] = items[i];
}

}  // namespace ts
