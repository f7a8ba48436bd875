#include "core/tables.h"

#include <algorithm>

#include "core/random.h"

namespace ts {

void move_rows(const TablesView& tables, int64_t table, const int64_t* rows, int64_t num, const int32_t* new_codes,
               uint8_t* touched) {
  int32_t* const codes = tables.codes + table * tables.num_rows;
  for (int64_t i = 0; i < num; ++i) {
    const int32_t to = new_codes[i * tables.num_tables + table];
    int32_t& code = codes[rows[i]];
    if (code == to) continue;
    if (code >= 0) touched[code] = 1;
    touched[to] = 1;
    code = to;
  }
}

void fill_buckets(const TablesView& tables, int64_t table, int64_t first_bucket, int64_t last_bucket,
                  const uint8_t* touched, Policy policy, uint64_t seed) {
  const int32_t* const codes = tables.codes + table * tables.num_rows;
  int32_t* const counts = tables.counts + table * tables.num_buckets;
  int32_t* const buckets = tables.buckets + table * tables.num_buckets * tables.capacity;
  const auto capacity = static_cast<int32_t>(tables.capacity);
  const Stream stream = Stream(seed, 1).fork(static_cast<uint64_t>(table));

  for (int64_t bucket = first_bucket; bucket < last_bucket; ++bucket) {
    if (touched != nullptr && touched[bucket] == 0) continue;
    counts[bucket] = 0;
    std::fill_n(buckets + bucket * capacity, capacity, -1);
  }
  for (int64_t row = 0; row < tables.num_rows; ++row) {
    const int32_t bucket = codes[row];
    if (bucket < first_bucket || bucket >= last_bucket || (touched != nullptr && touched[bucket] == 0)) continue;
    const int32_t arrival = counts[bucket]++;
    int64_t slot = arrival;
    if (arrival >= capacity) {
      // Algorithm R (Vitter 1985): the k-th arrival stays with probability capacity / k.
      slot = policy == Policy::fifo ? arrival % capacity
                                    : static_cast<int64_t>(stream.fork(bucket).below(arrival, arrival + 1u));
      if (slot >= capacity) continue;
    }
    buckets[bucket * capacity + slot] = static_cast<int32_t>(row);
  }
}

}  // namespace ts
