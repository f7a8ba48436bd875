// The row-sparse optimisers as ops. They update float32 tensors in place, on the given rows and no others.
#include "core/rows.h"

#include <algorithm>
#include <cmath>

#include "ops/common.h"

namespace ts {
namespace {

// What all of them are given, checked: rows ascend strictly, so that no two threads ever meet in one row.
struct RowUpdate {
  float* weight;
  RowGrad grad;
  int64_t num_rows;  // of the weight
  int64_t n;         // given rows

  RowUpdate(const char* op, const Tensor& weight_, const Tensor& rows, const Tensor& values)
      : weight(mutable_data<float>(weight_, op, "weight")),
        num_rows(weight_.dim() == 0 ? 1 : weight_.size(0)),
        n(rows.numel()) {
    const size_t d = num_rows == 0 ? 0 : weight_.numel() / num_rows;
    grad = {data<int64_t>(rows, op, "rows"), data<float>(values, op, "grad"), d};
    require(rows.dim() == 1, op, "rows", "of one dimension");
    require(values.numel() == n * static_cast<int64_t>(d), op, "grad", "of shape [len(rows), *weight.shape[1:]]");
    bool ascending = true;
    int64_t previous = -1;
    for (int64_t i = 0; i < n; ++i) {
      ascending &= grad.rows[i] > previous;
      previous = grad.rows[i];
    }
    require(ascending, op, "rows", "sorted, unique and not negative");
    require(previous < num_rows, op, "rows", "less than the number of rows of weight");
  }

  float* state(const char* op, const Tensor& tensor, const char* name, int64_t numel) const {
    require(tensor.numel() == numel, op, name, "of a shape that matches weight");
    return mutable_data<float>(tensor, op, name);
  }

  float* elementwise_state(const char* op, const Tensor& tensor, const char* name) const {
    return state(op, tensor, name, num_rows * static_cast<int64_t>(grad.d));
  }

  template <class Update>
  void in_parallel(const Update& update) const {
    constexpr int64_t kElementsPerThread = 8192;
    if (n == 0 || grad.d == 0) return;
    const int64_t grain = std::max<int64_t>(1, kElementsPerThread / static_cast<int64_t>(grad.d));
    parallel(n, grain, update);
  }
};

float as_float(double x) { return static_cast<float>(x); }
float sign_of(bool maximize) { return maximize ? -1.0f : 1.0f; }

}  // namespace

void lazy_adam_(Tensor weight, Tensor exp_avg, Tensor exp_avg_sq, const Tensor& rows, const Tensor& grad, double lr,
                double beta1, double beta2, double eps, double weight_decay, bool decoupled, bool maximize,
                double step) {
  constexpr const char* op = "lazy_adam_";
  const RowUpdate update(op, weight, rows, grad);
  float* m = update.elementwise_state(op, exp_avg, "exp_avg");
  float* v = update.elementwise_state(op, exp_avg_sq, "exp_avg_sq");
  require(step >= 1, op, "step", "at least 1");
  const AdamScalars scalars{sign_of(maximize),
                            as_float(decoupled ? 0 : weight_decay),
                            as_float(decoupled ? 1 - lr * weight_decay : 1),
                            as_float(beta1),
                            as_float(1 - beta1),
                            as_float(beta2),
                            as_float(1 - beta2),
                            as_float(lr / (1 - std::pow(beta1, step))),
                            as_float(1 / std::sqrt(1 - std::pow(beta2, step))),
                            as_float(eps)};
  update.in_parallel(
      [&](int64_t begin, int64_t end) { lazy_adam_rows(scalars, update.weight, m, v, update.grad, begin, end); });
}

void rowwise_adagrad_(Tensor weight, Tensor sum, const Tensor& rows, const Tensor& grad, double lr, double eps,
                      double weight_decay, bool maximize) {
  constexpr const char* op = "rowwise_adagrad_";
  const RowUpdate update(op, weight, rows, grad);
  float* sums = update.state(op, sum, "sum", update.num_rows);
  const AdagradScalars scalars{sign_of(maximize), as_float(weight_decay), as_float(lr), as_float(eps)};
  update.in_parallel(
      [&](int64_t begin, int64_t end) { rowwise_adagrad_rows(scalars, update.weight, sums, update.grad, begin, end); });
}

void row_sgd_(Tensor weight, std::optional<Tensor> momentum_buffer, const Tensor& rows, const Tensor& grad, double lr,
              double momentum, double dampening, bool nesterov, double weight_decay, bool maximize) {
  constexpr const char* op = "row_sgd_";
  const RowUpdate update(op, weight, rows, grad);
  float* buffer = momentum_buffer ? update.elementwise_state(op, *momentum_buffer, "momentum_buffer") : nullptr;
  const SgdScalars scalars{sign_of(maximize),  as_float(weight_decay),  as_float(lr),
                           as_float(momentum), as_float(1 - dampening), nesterov};
  update.in_parallel(
      [&](int64_t begin, int64_t end) { sgd_rows(scalars, update.weight, buffer, update.grad, begin, end); });
}

STABLE_TORCH_LIBRARY_FRAGMENT(torch_slide, m) {
  m.def(
      "lazy_adam_(Tensor(a!) weight, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor rows, Tensor grad, float lr, "
      "float beta1, float beta2, float eps, float weight_decay, bool decoupled, bool maximize, float step) -> ()");
  m.def(
      "rowwise_adagrad_(Tensor(a!) weight, Tensor(b!) sum, Tensor rows, Tensor grad, float lr, float eps, "
      "float weight_decay, bool maximize) -> ()");
  m.def(
      "row_sgd_(Tensor(a!) weight, Tensor(b!)? momentum_buffer, Tensor rows, Tensor grad, float lr, float momentum, "
      "float dampening, bool nesterov, float weight_decay, bool maximize) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(torch_slide, CPU, m) {
  m.impl("lazy_adam_", TORCH_BOX(&lazy_adam_));
  m.impl("rowwise_adagrad_", TORCH_BOX(&rowwise_adagrad_));
  m.impl("row_sgd_", TORCH_BOX(&row_sgd_));
}

}  // namespace ts
