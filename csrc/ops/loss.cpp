#include "core/candidate_loss.h"
#include "ops/checks.h"
#include "ops/common.h"

namespace ts {
namespace {

// One value for every candidate, or, where all rows have the same candidates, one row of values for all of them.
template <typename T>
class PerCandidate {
 public:
  PerCandidate() = default;
  PerCandidate(const Tensor& tensor, const int64_t* row_offsets, int64_t num_rows, const char* op, const char* argument)
      : data_(data<T>(tensor, op, argument)), shared_(tensor.numel() != row_offsets[num_rows]) {
    for (int64_t b = 0; shared_ && b < num_rows; ++b)
      if (row_offsets[b + 1] - row_offsets[b] != tensor.numel())
        reject(op, argument,
               "of " + std::to_string(row_offsets[num_rows]) + " elements, or as many as every row has candidates",
               std::to_string(tensor.numel()) + " elements where row " + std::to_string(b) + " has " +
                   std::to_string(row_offsets[b + 1] - row_offsets[b]));
  }
  PerCandidate(const std::optional<Tensor>& tensor, const int64_t* row_offsets, int64_t num_rows, const char* op,
               const char* argument) {
    if (tensor.has_value()) *this = PerCandidate(*tensor, row_offsets, num_rows, op, argument);
  }

  // The values of the row that begins at candidate `begin`; null when there are none.
  const T* row(int64_t begin) const { return data_ == nullptr || shared_ ? data_ : data_ + begin; }

 private:
  const T* data_ = nullptr;
  bool shared_ = false;
};

// The arguments that both losses have, checked.
template <typename T>
struct LossArguments {
  LossArguments(const char* op, const Tensor& logits, const Tensor& row_offsets, const Tensor& log_weights,
                const Tensor& label_offsets, const Tensor& label_positions, const Tensor& label_values)
      : values(mutable_data<T>(logits, op, "logits")),
        rows(checked_offsets(row_offsets, logits.numel(), op, "row_offsets")),
        num_rows(row_offsets.numel() - 1),
        inclusion(log_weights, rows, num_rows, op, "log_weights"),
        label_rows(checked_offsets(label_offsets, label_positions.numel(), op, "label_offsets")),
        positions(data<int64_t>(label_positions, op, "label_positions")),
        shares(data<T>(label_values, op, "label values")) {
    require_shape(label_offsets, {num_rows + 1}, op, "label_offsets");
    require_shape(label_values, {label_positions.numel()}, op, "label values");
    for (int64_t b = 0; b < num_rows; ++b)
      for (int64_t l = label_rows[b]; l < label_rows[b + 1]; ++l)
        if (positions[l] < 0 || positions[l] >= rows[b + 1] - rows[b])
          reject<std::out_of_range>(op, "label_positions",
                                    "in [0, " + std::to_string(rows[b + 1] - rows[b]) + ") in row " + std::to_string(b),
                                    std::to_string(positions[l]));
  }

  Candidates<T> candidates(int64_t b) const {
    return {values + rows[b], inclusion.row(rows[b]), rows[b + 1] - rows[b]};
  }
  RowLabels<T> labels(int64_t b) const {
    return {positions + label_rows[b], shares + label_rows[b], label_rows[b + 1] - label_rows[b]};
  }
  // Rows that are worth a task of their own.
  int64_t grain() const {
    constexpr int64_t elements_per_task = 16384;
    return std::max<int64_t>(1, elements_per_task * num_rows / std::max<int64_t>(1, rows[num_rows]));
  }

  T* values;
  const int64_t* rows;
  int64_t num_rows;
  PerCandidate<T> inclusion;
  const int64_t* label_rows;
  const int64_t* positions;
  const T* shares;
};

template <typename T>
Tensor softmax_cross_entropy_of(const Tensor& logits, const Tensor& row_offsets, const Tensor& log_weights,
                                const std::optional<Tensor>& smoothing, const Tensor& label_offsets,
                                const Tensor& label_positions, const Tensor& label_weights,
                                const std::optional<Tensor>& bias) {
  constexpr const char* op = "softmax_cross_entropy_";
  const LossArguments<T> args(op, logits, row_offsets, log_weights, label_offsets, label_positions, label_weights);
  const PerCandidate<T> smooth(smoothing, args.rows, args.num_rows, op, "smoothing");
  const PerCandidate<T> biases(bias, args.rows, args.num_rows, op, "bias");
  Tensor loss = empty<T>({args.num_rows}), scratch = empty<T>({label_positions.numel()});
  T* const losses = mutable_data<T>(loss, op, "loss");
  T* const label_logits = mutable_data<T>(scratch, op, "scratch");
  parallel(args.num_rows, args.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      add_bias(args.candidates(b), biases.row(args.rows[b]));
      losses[b] = softmax_cross_entropy(args.candidates(b), smooth.row(args.rows[b]), args.labels(b),
                                        label_logits + args.label_rows[b]);
    }
  });
  return loss;
}

template <typename T>
Tensor bce_with_logits_of(const Tensor& logits, const Tensor& row_offsets, const Tensor& log_weights,
                          const Tensor& label_offsets, const Tensor& label_positions, const Tensor& label_targets,
                          const std::optional<Tensor>& class_weight, const std::optional<Tensor>& pos_weight) {
  constexpr const char* op = "bce_with_logits_";
  const LossArguments<T> args(op, logits, row_offsets, log_weights, label_offsets, label_positions, label_targets);
  const PerCandidate<T> class_weights(class_weight, args.rows, args.num_rows, op, "class_weight");
  const PerCandidate<T> pos_weights(pos_weight, args.rows, args.num_rows, op, "pos_weight");
  Tensor loss = empty<T>({args.num_rows}), scratch = empty<T>({label_positions.numel()});
  T* const losses = mutable_data<T>(loss, op, "loss");
  T* const label_logits = mutable_data<T>(scratch, op, "scratch");
  parallel(args.num_rows, args.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      losses[b] = bce_with_logits(args.candidates(b), args.labels(b), class_weights.row(args.rows[b]),
                                  pos_weights.row(args.rows[b]), label_logits + args.label_rows[b]);
  });
  return loss;
}

}  // namespace

Tensor softmax_cross_entropy_(const Tensor& logits, const Tensor& row_offsets, const Tensor& log_weights,
                              const std::optional<Tensor>& smoothing, const Tensor& label_offsets,
                              const Tensor& label_positions, const Tensor& label_weights,
                              const std::optional<Tensor>& bias) {
  const auto run =
      logits.scalar_type() == ScalarType::Double ? &softmax_cross_entropy_of<double> : &softmax_cross_entropy_of<float>;
  return run(logits, row_offsets, log_weights, smoothing, label_offsets, label_positions, label_weights, bias);
}

Tensor bce_with_logits_(const Tensor& logits, const Tensor& row_offsets, const Tensor& log_weights,
                        const Tensor& label_offsets, const Tensor& label_positions, const Tensor& label_targets,
                        const std::optional<Tensor>& class_weight, const std::optional<Tensor>& pos_weight) {
  const auto run =
      logits.scalar_type() == ScalarType::Double ? &bce_with_logits_of<double> : &bce_with_logits_of<float>;
  return run(logits, row_offsets, log_weights, label_offsets, label_positions, label_targets, class_weight, pos_weight);
}

STABLE_TORCH_LIBRARY_FRAGMENT(torch_slide, m) {
  m.def(
      "softmax_cross_entropy_(Tensor(a!) logits, Tensor row_offsets, Tensor log_weights, Tensor? smoothing, "
      "Tensor label_offsets, Tensor label_positions, Tensor label_weights, Tensor? bias=None) -> Tensor");
  m.def(
      "bce_with_logits_(Tensor(a!) logits, Tensor row_offsets, Tensor log_weights, Tensor label_offsets, "
      "Tensor label_positions, Tensor label_targets, Tensor? class_weight, Tensor? pos_weight) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torch_slide, CPU, m) {
  m.impl("softmax_cross_entropy_", TORCH_BOX(&softmax_cross_entropy_));
  m.impl("bce_with_logits_", TORCH_BOX(&bce_with_logits_));
}

}  // namespace ts
