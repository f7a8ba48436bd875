// Fixed-capacity buckets as a pure function of the codes: a bucket is always filled by one pass over its rows in
// ascending order, so that refilling only the touched buckets gives bit for bit what a full rebuild gives.
#pragma once
#include <cstdint>

namespace ts {

enum class Policy : int64_t { reservoir = 0, fifo = 1 };

// Raw views of L tables over N rows; slots past min(counts, capacity) hold -1.
struct TablesView {
  int32_t* codes;    // [L, N], negative for a row in no bucket
  int32_t* buckets;  // [L, num_buckets, capacity]
  int32_t* counts;   // [L, num_buckets], rows that belong there, also those that found no room
  int64_t num_tables, num_rows, num_buckets, capacity;
};

// Moves rows[i] to new_codes[i, table] (new_codes is [num, L]) and marks the buckets that it left and entered in
// touched [num_buckets], which the caller has zeroed.
void move_rows(const TablesView& tables, int64_t table, const int64_t* rows, int64_t num, const int32_t* new_codes,
               uint8_t* touched);

// Refills the touched buckets in [first_bucket, last_bucket) of one table; touched == nullptr means all of them.
void fill_buckets(const TablesView& tables, int64_t table, int64_t first_bucket, int64_t last_bucket,
                  const uint8_t* touched, Policy policy, uint64_t seed);

}  // namespace ts
