#include "core/candidate_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/kernels.h"

namespace ts {
namespace {

// float32 goes through the kernels; these loops are their float64 counterparts, for gradcheck and double models.
float max_sum(const float* z, const float* a, int64_t n) { return kernels().loss.max_sum(z, a, n); }
double max_sum(const double* z, const double* a, int64_t n) {
  double best = -std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < n; ++i) best = z[i] + a[i] > best ? z[i] + a[i] : best;
  return best;
}

float exp_sum(float* z, const float* a, float shift, int64_t n) { return kernels().loss.exp_sum(z, a, shift, n); }
double exp_sum(double* z, const double* a, double shift, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += z[i] = std::exp(z[i] - shift + a[i]);
  return sum;
}

struct Weighted {
  double mass, dot;
};

Weighted weighted_sum(const float* q, const float* z, float shift, int64_t n) {
  const LossKernels::Weighted sums = kernels().loss.weighted_sum(q, z, shift, n);
  return {sums.mass, sums.dot};
}
Weighted weighted_sum(const double* q, const double* z, double shift, int64_t n) {
  Weighted sums{0, 0};
  for (int64_t i = 0; i < n; ++i) {
    sums.mass += q[i];
    if (q[i] != 0) sums.dot += q[i] * (z[i] - shift);
  }
  return sums;
}

void scale_minus(float* z, float factor, const float* q, int64_t n) { kernels().loss.scale_minus(z, factor, q, n); }
void scale_minus(double* z, double factor, const double* q, int64_t n) {
  for (int64_t i = 0; i < n; ++i) z[i] = factor * z[i] - (q == nullptr ? 0.0 : q[i]);
}

double softplus(double z) { return std::max(0.0, z) + std::log1p(std::exp(-std::abs(z))); }
double sigmoid(double z) { return z < 0 ? std::exp(z) / (1 + std::exp(z)) : 1 / (1 + std::exp(-z)); }

float softplus_sum(float* z, const float* a, const float* c, int64_t n) {
  return kernels().loss.softplus_sum(z, a, c, n);
}
double softplus_sum(double* z, const double* a, const double* c, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double weight = std::exp(a[i]) * (c == nullptr ? 1.0 : c[i]);
    sum += weight * softplus(z[i]);
    z[i] = weight * sigmoid(z[i]);
  }
  return sum;
}

// float32 sums run over one block at most, and in double over the blocks: a row may have every neuron of a huge layer.
constexpr int64_t kBlock = 2048;

template <typename Function>
void for_each_block(int64_t size, const Function& function) {
  for (int64_t begin = 0; begin < size; begin += kBlock) function(begin, std::min(kBlock, size - begin));
}

// function(label, position) once for every position; the labels of a row are few.
template <typename T, typename Function>
void for_each_distinct(const RowLabels<T>& labels, const Function& function) {
  for (int64_t l = 0; l < labels.size; ++l) {
    const int64_t* const mine = labels.positions + l;
    if (std::find(labels.positions, mine, *mine) == mine) function(l, *mine);
  }
}

// 0 * inf is 0 here: what has no weight has no part in the loss.
double product(double weight, double value) { return weight == 0 ? 0.0 : weight * value; }

}  // namespace

template <typename T>
T softmax_cross_entropy(const Candidates<T>& row, const T* smoothing, const RowLabels<T>& labels, T* scratch) {
  const auto ignore = [&row] {
    std::fill_n(row.logits, row.size, T(0));
    return T(0);
  };
  if (labels.size == 0) return ignore();
  // The loops below add its log weight to every logit; of its own labels a row is certain.
  for (int64_t l = 0; l < labels.size; ++l) scratch[l] = row.logits[labels.positions[l]];
  for (int64_t l = 0; l < labels.size; ++l)
    row.logits[labels.positions[l]] = scratch[l] - row.log_weights[labels.positions[l]];
  const T shift = max_sum(row.logits, row.log_weights, row.size);
  double mass = 0, picked = 0;
  for (int64_t l = 0; l < labels.size; ++l) {
    mass += labels.values[l];
    picked += product(labels.values[l], static_cast<double>(scratch[l]) - shift);
  }
  if (smoothing != nullptr) {
    for_each_block(row.size, [&](int64_t at, int64_t n) {
      const Weighted sums = weighted_sum(smoothing + at, row.logits + at, shift, n);
      mass += sums.mass;
      picked += sums.dot;
    });
    for_each_distinct(labels, [&](int64_t l, int64_t at) {
      const double counted = smoothing[at], due = counted * std::exp(-static_cast<double>(row.log_weights[at]));
      mass += due - counted;
      picked += product(due, static_cast<double>(scratch[l]) - shift) -
                product(counted, static_cast<double>(row.logits[at]) - shift);
    });
  }
  if (mass == 0) return ignore();
  double sum = 0;
  for_each_block(row.size,
                 [&](int64_t at, int64_t n) { sum += exp_sum(row.logits + at, row.log_weights + at, shift, n); });
  scale_minus(row.logits, static_cast<T>(mass / sum), smoothing, row.size);
  for (int64_t l = 0; l < labels.size; ++l) row.logits[labels.positions[l]] -= labels.values[l];
  if (smoothing != nullptr)
    for_each_distinct(labels,
                      [&](int64_t, int64_t at) { row.logits[at] -= smoothing[at] * std::expm1(-row.log_weights[at]); });
  // With logits and normaliser relative to the maximum, their difference keeps its digits at any height.
  return static_cast<T>(mass * std::log(sum) - picked);
}

template <typename T>
T bce_with_logits(const Candidates<T>& row, const RowLabels<T>& labels, const T* class_weight, const T* pos_weight,
                  T* scratch) {
  for (int64_t l = 0; l < labels.size; ++l) scratch[l] = row.logits[labels.positions[l]];
  // softplus(-inf) = 0 takes the labels out of the sum over the negatives.
  for (int64_t l = 0; l < labels.size; ++l) row.logits[labels.positions[l]] = -std::numeric_limits<T>::infinity();
  double loss = 0;
  for_each_block(row.size, [&](int64_t at, int64_t n) {
    loss +=
        softplus_sum(row.logits + at, row.log_weights + at, class_weight == nullptr ? nullptr : class_weight + at, n);
  });
  for (int64_t l = 0; l < labels.size; ++l) {
    const int64_t at = labels.positions[l];
    const double z = scratch[l], target = labels.values[l];
    const double weight = class_weight == nullptr ? 1 : class_weight[at];
    const double positive = target * (pos_weight == nullptr ? 1 : pos_weight[at]), negative = 1 - target;
    loss += weight * (product(negative, softplus(z)) + product(positive, softplus(-z)));
    row.logits[at] += static_cast<T>(weight * (product(negative, sigmoid(z)) - product(positive, sigmoid(-z))));
  }
  return static_cast<T>(loss);
}

template float softmax_cross_entropy(const Candidates<float>&, const float*, const RowLabels<float>&, float*);
template double softmax_cross_entropy(const Candidates<double>&, const double*, const RowLabels<double>&, double*);
template float bce_with_logits(const Candidates<float>&, const RowLabels<float>&, const float*, const float*, float*);
template double bce_with_logits(const Candidates<double>&, const RowLabels<double>&, const double*, const double*,
                                double*);

}  // namespace ts
