// The row-sparse optimisers as ops. They update tensors in place, on the given rows and no others: float32, or bfloat16
// with rounding at random, which depends on the step. What there is one of a row is float32 always.
#include "core/rows.h"

#include <algorithm>
#include <cmath>

#include "ops/common.h"

namespace ts {
namespace {

// What all of them are given, checked: rows ascend strictly, so that no two threads ever meet in one row.
template <typename T>
struct RowUpdate {
  T* weight;
  RowGrad<T> grad;
  int64_t num_rows;  // of the weight
  int64_t n;         // given rows
  uint64_t step;

  RowUpdate(const char* op, const Tensor& weight_, const Tensor& rows, const Tensor& values, double step_)
      : weight(mutable_data<T>(weight_, op, "weight")),
        num_rows(weight_.dim() == 0 ? 1 : weight_.size(0)),
        n(rows.numel()),
        step(static_cast<uint64_t>(step_)) {
    const size_t d = num_rows == 0 ? 0 : weight_.numel() / num_rows;
    grad = {data<int64_t>(rows, op, "rows"), data<T>(values, op, "grad"), d};
    require(rows.dim() == 1, op, "rows", "of one dimension");
    require(values.numel() == n * static_cast<int64_t>(d), op, "grad", "of shape [len(rows), *weight.shape[1:]]");
    require(step_ >= 1, op, "step", "at least 1");
    bool ascending = true;
    int64_t previous = -1;
    for (int64_t i = 0; i < n; ++i) {
      ascending &= grad.rows[i] > previous;
      previous = grad.rows[i];
    }
    require(ascending, op, "rows", "sorted, unique and not negative");
    require(previous < num_rows, op, "rows", "less than the number of rows of weight");
  }

  // What Adam has none of if it is the gradient itself.
  T* first_moment(const char* op, const std::optional<Tensor>& exp_avg, double beta1) const {
    require(exp_avg.has_value() || beta1 == 0, op, "exp_avg", "given if beta1 is not 0");
    return exp_avg ? elementwise_state(op, *exp_avg, "exp_avg") : nullptr;
  }
  T* elementwise_state(const char* op, const Tensor& tensor, const char* name) const {
    return state<T>(op, tensor, name, num_rows * static_cast<int64_t>(grad.d));
  }
  float* rowwise_state(const char* op, const Tensor& tensor, const char* name) const {
    return state<float>(op, tensor, name, num_rows);
  }

  template <class Update>
  void in_parallel(const Update& update) const {
    constexpr int64_t kElementsPerThread = 8192;
    if (n == 0 || grad.d == 0) return;
    const int64_t grain = std::max<int64_t>(1, kElementsPerThread / static_cast<int64_t>(grad.d));
    parallel(n, grain, update);
  }

 private:
  template <typename State>
  State* state(const char* op, const Tensor& tensor, const char* name, int64_t numel) const {
    require(tensor.numel() == numel, op, name, "of a shape that matches weight");
    return mutable_data<State>(tensor, op, name);
  }
};

// Calls the update with the type that the weight is stored in.
template <class Update>
void with_stored_type(const Tensor& weight, const Update& update) {
  if (weight.scalar_type() == ScalarType::BFloat16)
    update(uint16_t{});
  else
    update(float{});
}

float as_float(double x) { return static_cast<float>(x); }
float sign_of(bool maximize) { return maximize ? -1.0f : 1.0f; }

AdamScalars adam_scalars(double lr, double beta1, double beta2, double eps, double weight_decay, bool decoupled,
                         bool maximize, double step) {
  return {sign_of(maximize),
          as_float(decoupled ? 0 : weight_decay),
          as_float(decoupled ? 1 - lr * weight_decay : 1),
          as_float(beta1),
          as_float(1 - beta1),
          as_float(beta2),
          as_float(1 - beta2),
          as_float(lr / (1 - std::pow(beta1, step))),
          as_float(1 / std::sqrt(1 - std::pow(beta2, step))),
          as_float(eps)};
}

}  // namespace

void lazy_adam_(Tensor weight, std::optional<Tensor> exp_avg, Tensor exp_avg_sq, const Tensor& rows, const Tensor& grad,
                double lr, double beta1, double beta2, double eps, double weight_decay, bool decoupled, bool maximize,
                double step) {
  constexpr const char* op = "lazy_adam_";
  const AdamScalars scalars = adam_scalars(lr, beta1, beta2, eps, weight_decay, decoupled, maximize, step);
  with_stored_type(weight, [&](auto stored) {
    const RowUpdate<decltype(stored)> update(op, weight, rows, grad, step);
    auto* const m = update.first_moment(op, exp_avg, beta1);
    auto* const v = update.elementwise_state(op, exp_avg_sq, "exp_avg_sq");
    update.in_parallel([&](int64_t begin, int64_t end) {
      lazy_adam_rows(scalars, update.weight, m, v, update.grad, update.step, begin, end);
    });
  });
}

void rowwise_adam_(Tensor weight, std::optional<Tensor> exp_avg, Tensor exp_avg_sq, const Tensor& rows,
                   const Tensor& grad, double lr, double beta1, double beta2, double eps, double weight_decay,
                   bool decoupled, bool maximize, double step) {
  constexpr const char* op = "rowwise_adam_";
  const AdamScalars scalars = adam_scalars(lr, beta1, beta2, eps, weight_decay, decoupled, maximize, step);
  with_stored_type(weight, [&](auto stored) {
    const RowUpdate<decltype(stored)> update(op, weight, rows, grad, step);
    auto* const m = update.first_moment(op, exp_avg, beta1);
    float* const v = update.rowwise_state(op, exp_avg_sq, "exp_avg_sq");
    update.in_parallel([&](int64_t begin, int64_t end) {
      rowwise_adam_rows(scalars, update.weight, m, v, update.grad, update.step, begin, end);
    });
  });
}

void rowwise_adagrad_(Tensor weight, Tensor sum, const Tensor& rows, const Tensor& grad, double lr, double eps,
                      double weight_decay, bool maximize, double step) {
  constexpr const char* op = "rowwise_adagrad_";
  const AdagradScalars scalars{sign_of(maximize), as_float(weight_decay), as_float(lr), as_float(eps)};
  with_stored_type(weight, [&](auto stored) {
    const RowUpdate<decltype(stored)> update(op, weight, rows, grad, step);
    float* const sums = update.rowwise_state(op, sum, "sum");
    update.in_parallel([&](int64_t begin, int64_t end) {
      rowwise_adagrad_rows(scalars, update.weight, sums, update.grad, update.step, begin, end);
    });
  });
}

void row_sgd_(Tensor weight, std::optional<Tensor> momentum_buffer, const Tensor& rows, const Tensor& grad, double lr,
              double momentum, double dampening, bool nesterov, double weight_decay, bool maximize, double step) {
  constexpr const char* op = "row_sgd_";
  const SgdScalars scalars{sign_of(maximize),  as_float(weight_decay),  as_float(lr),
                           as_float(momentum), as_float(1 - dampening), nesterov};
  with_stored_type(weight, [&](auto stored) {
    using Stored = decltype(stored);
    const RowUpdate<Stored> update(op, weight, rows, grad, step);
    Stored* const buffer =
        momentum_buffer ? update.elementwise_state(op, *momentum_buffer, "momentum_buffer") : nullptr;
    update.in_parallel([&](int64_t begin, int64_t end) {
      sgd_rows(scalars, update.weight, buffer, update.grad, update.step, begin, end);
    });
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(torch_slide, m) {
  m.def(
      "lazy_adam_(Tensor(a!) weight, Tensor(b!)? exp_avg, Tensor(c!) exp_avg_sq, Tensor rows, Tensor grad, float lr, "
      "float beta1, float beta2, float eps, float weight_decay, bool decoupled, bool maximize, float step) -> ()");
  m.def(
      "rowwise_adam_(Tensor(a!) weight, Tensor(b!)? exp_avg, Tensor(c!) exp_avg_sq, Tensor rows, Tensor grad, float "
      "lr, "
      "float beta1, float beta2, float eps, float weight_decay, bool decoupled, bool maximize, float step) -> ()");
  m.def(
      "rowwise_adagrad_(Tensor(a!) weight, Tensor(b!) sum, Tensor rows, Tensor grad, float lr, float eps, "
      "float weight_decay, bool maximize, float step) -> ()");
  m.def(
      "row_sgd_(Tensor(a!) weight, Tensor(b!)? momentum_buffer, Tensor rows, Tensor grad, float lr, float momentum, "
      "float dampening, bool nesterov, float weight_decay, bool maximize, float step) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(torch_slide, CPU, m) {
  m.impl("lazy_adam_", TORCH_BOX(&lazy_adam_));
  m.impl("rowwise_adam_", TORCH_BOX(&rowwise_adam_));
  m.impl("rowwise_adagrad_", TORCH_BOX(&rowwise_adagrad_));
  m.impl("row_sgd_", TORCH_BOX(&row_sgd_));
}

}  // namespace ts
