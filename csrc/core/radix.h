// A stable radix sort of (key, value) pairs, cut into steps that the caller may run in parallel over blocks. Stable
// means that the result is the same for every number of blocks and threads.
#pragma once
#include <cstdint>

namespace ts {

// Key in the upper half: sorting by it alone leaves equal keys in ascending order of their values when they started so.
struct KeyValue {
  uint32_t key, value;
};

constexpr int kDigitBits = 9;
constexpr int64_t kDigits = int64_t{1} << kDigitBits;

// Passes that keys below num_keys need.
inline int radix_passes(int64_t num_keys) {
  int passes = 1;
  while (num_keys > int64_t{1} << (passes * kDigitBits)) ++passes;
  return passes;
}

// counts [kDigits]: how often each digit of this pass occurs among the n items.
void count_digits(const KeyValue* items, int64_t n, int pass, int64_t* counts);

// Turns the counts of all blocks, [num_blocks, kDigits], into the place where each block's first item of each digit
// goes.
void digit_places(int64_t* counts, int64_t num_blocks);

// Moves the n items of one block to their places, which are used up.
void move_by_digit(const KeyValue* items, int64_t n, int pass, int64_t* places, KeyValue* to);

}  // namespace ts
