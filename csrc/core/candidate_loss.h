// Losses of one sample over its candidates. The logits are replaced by their gradient: a second array of that size
// would cost more than all the arithmetic.
#pragma once
#include <cstdint>

namespace ts {

// One sample's candidates; pointers to `size` elements each.
template <typename T>
struct Candidates {
  T* logits;             // replaced by d loss / d logits
  const T* log_weights;  // log of how many neurons a candidate stands for; not read at the row's own labels, where
                         // it is 0: of these the row is certain
  int64_t size;
};

template <typename T>
struct RowLabels {
  const int64_t* positions;  // within the candidates
  const T* values;           // shares of the target distribution, or for BCE the targets
  int64_t size;
};

// Adds a bias, if there is one, to the logits.
template <typename T>
void add_bias(const Candidates<T>& row, const T* bias) {
  if (bias == nullptr) return;
  for (int64_t j = 0; j < row.size; ++j) row.logits[j] += bias[j];
}

// s * log sum_j exp(z_j + a_j) - sum_j T_j z_j, where T are the labels' shares plus smoothing (may be null; it contains
// e^a, which is taken out at the row's own labels) and s is their sum. Labels may repeat: their shares add up. A row
// without labels, or with s = 0, is ignored: loss and gradient are exactly 0, whatever the logits. scratch has room for
// labels.size elements.
template <typename T>
T softmax_cross_entropy(const Candidates<T>& row, const T* smoothing, const RowLabels<T>& labels, T* scratch);

// sum_j e^a_j w_j [(1 - t_j) softplus(z_j) + p_j t_j softplus(-z_j)], with t = 0 but at the labels, whose positions
// are distinct, and w (class_weight) or p (pos_weight) all ones where null. scratch has room for labels.size elements.
template <typename T>
T bce_with_logits(const Candidates<T>& row, const RowLabels<T>& labels, const T* class_weight, const T* pos_weight,
                  T* scratch);

}  // namespace ts
