// Products of samples with rows of their own choice, and their gradients: the per-sample form of SLIDE (Chen et al.
// 2020, section 3.1), where each sample has an active set of its own.
//
// Both directions go row by row, not sample by sample: a row is then read once for all samples that use it.
#pragma once
#include <cstdint>

#include "core/by_row.h"

namespace ts {

// Value is what is computed in: float for float and bfloat16 rows (as uint16_t), double for double rows.
template <typename Value, typename Row>
struct SampledView {
  const Value* hidden;     // [B, d]
  const Row* weight;       // [N, d]
  ByRow uses;              // the entries are numbers of values
  const int32_t* samples;  // [nnz]: entries[i] belongs to sample samples[i]
  int64_t width;           // d
};

// values[e] = hidden[sample of e] . weight[row] + bias[row] for the entries e of the rows number [begin, end); bias may
// be null.
template <typename Value, typename Row>
void sampled_dots(const SampledView<Value, Row>& view, const Row* bias, int64_t begin, int64_t end, Value* values);

// Gradients of the rows number [begin, end) from those of the values, in the order of the entries: gradients[i] is that
// of entries[i]. grad_rows [U, d] and grad_bias [U] are written, grad_hidden [B, d] is added to.
template <typename Value, typename Row>
void sampled_gradients(const SampledView<Value, Row>& view, const Value* gradients, int64_t begin, int64_t end,
                       Value* grad_rows, Value* grad_bias, Value* grad_hidden);

}  // namespace ts
