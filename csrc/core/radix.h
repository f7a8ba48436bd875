// A stable radix sort of (key, value) pairs, cut into steps that the caller may run in parallel over blocks. Stable
// means that the result is the same for every number of blocks and threads.
#pragma once
#include <cstdint>

namespace ts {

// Key in the upper half: sorting by it alone leaves equal keys in ascending order of their values when they started so.
struct KeyValue {
  uint32_t key, value;
};

// Passes over digits of equal width, as few as leave room for a block's counts in the first-level cache.
struct RadixPlan {
  explicit RadixPlan(int64_t num_keys);

  int64_t digits() const { return int64_t{1} << bits; }

  int passes, bits;
};

// counts [digits]: how often each digit of this pass occurs among the n items.
void count_digits(const RadixPlan& plan, const KeyValue* items, int64_t n, int pass, int64_t* counts);

// Turns the counts of all blocks, [num_blocks, digits], into the place where each block's first item of each digit
// goes.
void digit_places(const RadixPlan& plan, int64_t* counts, int64_t num_blocks);

// Moves the n items of one block to their places, which are used up.
void move_by_digit(const RadixPlan& plan, const KeyValue* items, int64_t n, int pass, int64_t* places, KeyValue* to);

}  // namespace ts
