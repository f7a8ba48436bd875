#include "core/by_row.h"

#include "kernels/kernels.h"

namespace ts {

void RowSort::list(const int64_t* ids, int64_t begin, int64_t end) {
  for (int64_t e = begin; e < end; ++e) sorted_[e] = {static_cast<uint32_t>(ids[e]), static_cast<uint32_t>(e)};
}

int64_t RowSort::count_rows(int64_t begin, int64_t end) const {
  int64_t rows = 0;
  for (int64_t i = begin; i < end; ++i) rows += starts_row(i);
  return rows;
}

void RowSort::write_block(int64_t begin, int64_t end, int64_t row, int64_t* rows, int64_t* starts,
                          int32_t* entries) const {
  for (int64_t i = begin; i < end; ++i) {
    if (starts_row(i)) {
      rows[row] = sorted_[i].key;
      starts[row++] = i;
    }
    entries[i] = static_cast<int32_t>(sorted_[i].value);
  }
}

void sum_entries(const ByRow& by_row, const float* values, const int64_t* source, const float* scale, size_t d,
                 float* sums, int64_t begin, int64_t end) {
  const auto sum = kernels().sum_entries;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t first = by_row.starts[r];
    sum(values, d, by_row.entries + first, static_cast<size_t>(by_row.starts[r + 1] - first), source, scale,
        sums + r * static_cast<int64_t>(d));
  }
}

}  // namespace ts
