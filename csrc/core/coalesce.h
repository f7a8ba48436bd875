// Row ids with repetitions -> each id once, and the sum of what belongs to it.
//
// Entries are sorted by a stable radix sort, so that every sum runs over its entries in the order in which they were
// given: results are bit-equal for any number of threads.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace ts {

// The entries of row k of the result are entries[starts[k]] to entries[starts[k + 1]], ascending.
struct EntriesByRow {
  std::vector<uint32_t> entries;
  std::vector<uint32_t> starts;
  std::vector<uint32_t> ids;  // ascending
};

// ids are less than 2^32, and there are fewer than 2^32 of them.
EntriesByRow group_by_row(const int64_t* ids, size_t n);

// sums[k] = sum over the entries e of row k of scale[e] * values[source[e]], for the rows k in [begin, end).
// source and scale may be null: then source[e] = e, scale[e] = 1.
void sum_entries(const EntriesByRow& groups, const float* values, const int64_t* source, const float* scale, size_t d,
                 float* sums, size_t begin, size_t end);

}  // namespace ts
