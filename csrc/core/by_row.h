// Entries that name rows, grouped by row: which rows are named, ascending, and by which entries, in their given order.
//
// The sort is stable, so every sum over a row's entries runs in the order in which they were given, whatever the number
// of blocks and threads.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/radix.h"

namespace ts {

// The entries of row rows[r] are entries[starts[r]] to entries[starts[r + 1] - 1].
struct ByRow {
  const int64_t* rows;     // [num_rows], ascending, distinct
  const int64_t* starts;   // [num_rows + 1]
  const int32_t* entries;  // [starts[num_rows]]
  int64_t num_rows;

  int64_t num_entries() const { return starts[num_rows]; }

  // The row at which part `part` of `parts` starts: parts of about as many entries each, cut by the sizes alone.
  int64_t cut(int64_t part, int64_t parts) const {
    return std::lower_bound(starts, starts + num_rows, num_entries() * part / parts) - starts;
  }
};

// Parallel is called as parallel(n, grain, work), and calls work(begin, end) for ranges that cover [0, n).
class RowSort {
 public:
  // ids [n] in [0, num_keys); n < 2^31, num_keys <= 2^32.
  template <typename Parallel>
  RowSort(const int64_t* ids, int64_t n, int64_t num_keys, const Parallel& parallel)
      : n_(n), blocks_(std::clamp<int64_t>(n / kWorthwhile, 1, kMostBlocks)), sorted_(new KeyValue[n]) {
    parallel(n, kWorthwhile, [&](int64_t begin, int64_t end) { list(ids, begin, end); });
    const RadixPlan plan(num_keys);
    std::unique_ptr<KeyValue[]> spare(new KeyValue[n]);
    std::vector<int64_t> places(static_cast<size_t>(blocks_ * plan.digits()));
    const auto counts = [&](int64_t block) { return places.data() + block * plan.digits(); };
    for (int pass = 0; pass < plan.passes; ++pass) {
      each_block(parallel, [&](int64_t block, int64_t begin, int64_t end) {
        count_digits(plan, sorted_.get() + begin, end - begin, pass, counts(block));
      });
      digit_places(plan, places.data(), blocks_);
      each_block(parallel, [&](int64_t block, int64_t begin, int64_t end) {
        move_by_digit(plan, sorted_.get() + begin, end - begin, pass, counts(block), spare.get());
      });
      sorted_.swap(spare);
    }
    first_row_.assign(static_cast<size_t>(blocks_) + 1, 0);
    each_block(parallel, [&](int64_t block, int64_t begin, int64_t end) {
      first_row_[static_cast<size_t>(block) + 1] = count_rows(begin, end);
    });
    for (int64_t block = 0; block < blocks_; ++block) first_row_[block + 1] += first_row_[block];
  }

  int64_t num_rows() const { return first_row_.back(); }

  // Into memory of the sizes that ByRow states.
  template <typename Parallel>
  void write(int64_t* rows, int64_t* starts, int32_t* entries, const Parallel& parallel) const {
    each_block(parallel, [&](int64_t block, int64_t begin, int64_t end) {
      write_block(begin, end, first_row_[block], rows, starts, entries);
    });
    starts[num_rows()] = n_;
  }

 private:
  static constexpr int64_t kWorthwhile = 4096, kMostBlocks = 16;

  template <typename Parallel, typename Work>
  void each_block(const Parallel& parallel, const Work& work) const {
    parallel(blocks_, 1, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) work(block, n_ * block / blocks_, n_ * (block + 1) / blocks_);
    });
  }
  bool starts_row(int64_t i) const { return i == 0 || sorted_[i].key != sorted_[i - 1].key; }
  void list(const int64_t* ids, int64_t begin, int64_t end);
  int64_t count_rows(int64_t begin, int64_t end) const;
  void write_block(int64_t begin, int64_t end, int64_t row, int64_t* rows, int64_t* starts, int32_t* entries) const;

  int64_t n_, blocks_;
  std::unique_ptr<KeyValue[]> sorted_;
  std::vector<int64_t> first_row_;  // of each block
};

// sums[r] = sum over the entries e of rows[r] of scale[e] * values[source[e]], for r in [begin, end), each of d
// elements. source and scale may be null: then source[e] = e, scale[e] = 1.
void sum_entries(const ByRow& by_row, const float* values, const int64_t* source, const float* scale, size_t d,
                 float* sums, int64_t begin, int64_t end);

}  // namespace ts
