// Products of samples with rows of their own choice, and their gradients: the per-sample form of SLIDE (Chen et al.
// 2020, section 3.1), where each sample has an active set of its own.
#pragma once
#include <cstdint>

#include "core/radix.h"

namespace ts {

// Value is what is computed in: float for float and bfloat16 rows (as uint16_t), double for double rows.
template <typename Value, typename Row>
struct SampledView {
  const Value* hidden;         // [B, d]
  const Row* weight;           // [N, d]
  const int64_t* row_offsets;  // [B + 1]: the active rows of sample b are ids[row_offsets[b]:row_offsets[b + 1]]
  const int64_t* ids;          // [nnz]
  int64_t num_samples, width;
};

// values[k] = hidden[sample of k] . weight[ids[k]] + bias[ids[k]] for k in [begin, end); bias may be null.
template <typename Value, typename Row>
void sampled_dots(const SampledView<Value, Row>& view, const Row* bias, int64_t begin, int64_t end, Value* values);

// samples[k] = the sample of k, and uses[k] = (ids[k], k), for k in [begin, end).
void list_uses(const int64_t* row_offsets, int64_t num_samples, const int64_t* ids, int64_t begin, int64_t end,
               int64_t* samples, KeyValue* uses);

// The first index >= at where a new key starts in uses [n], sorted by key.
int64_t next_key(const KeyValue* uses, int64_t n, int64_t at);

int64_t count_keys(const KeyValue* uses, int64_t begin, int64_t end);

// The uses by ascending row, those of one row by ascending k.
template <typename Value>
struct SampledUses {
  const KeyValue* sorted;
  const int64_t* samples;
  const Value* gradients;
};

// Gradients of the rows in uses.sorted[begin:end], which holds all uses of each. rows, grad_rows and grad_bias start at
// the first of these rows and are overwritten, grad_hidden [B, d] is added to.
template <typename Value, typename Row>
void sampled_gradients(const SampledView<Value, Row>& view, const SampledUses<Value>& uses, int64_t begin, int64_t end,
                       int64_t* rows, Value* grad_rows, Value* grad_bias, Value* grad_hidden);

}  // namespace ts
