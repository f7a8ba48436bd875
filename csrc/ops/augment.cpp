#include "core/augment.h"

#include "ops/common.h"

namespace ts {
namespace {

Rows rows_of(const Tensor& weight, const std::optional<Tensor>& bias, const char* op) {
  require(weight.dim() == 2, op, "weight", "[n, d]");
  Rows rows{data<float>(weight, op, "weight"), nullptr, static_cast<size_t>(weight.size(1))};
  if (bias.has_value()) {
    require(bias->dim() == 1 && bias->size(0) == weight.size(0), op, "bias", "one for each row of weight");
    rows.bias = data<float>(*bias, op, "bias");
  }
  return rows;
}

}  // namespace

// weight [n, d], bias [n] or none -> [n]
Tensor row_norms(const Tensor& weight, const std::optional<Tensor>& bias) {
  constexpr const char* op = "row_norms";
  const Rows from = rows_of(weight, bias, op);
  Tensor norms = empty<float>({weight.size(0)});
  float* const to = mutable_data<float>(norms, op, "norms");
  parallel(weight.size(0), 256, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) to[row] = from.norm(row);
  });
  return norms;
}

// weight [n, d], bias [n] or none, rows [m] or none (all) -> [m, d + 2]
Tensor augment_rows(const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& rows,
                    double max_norm) {
  constexpr const char* op = "augment_rows";
  const Rows from = rows_of(weight, bias, op);
  require(max_norm > 0, op, "max_norm", "positive");
  const int64_t num = rows.has_value() ? rows->numel() : weight.size(0), width = weight.size(1) + 2;
  const int64_t* const index = rows.has_value() ? data<int64_t>(*rows, op, "rows") : nullptr;
  for (int64_t i = 0; index != nullptr && i < num; ++i)
    if (index[i] < 0 || index[i] >= weight.size(0))
      throw std::out_of_range("augment_rows: expected rows to be in [0, " + std::to_string(weight.size(0)) + "), got " +
                              std::to_string(index[i]));
  Tensor augmented = empty<float>({num, width});
  float* const to = mutable_data<float>(augmented, op, "augmented");
  parallel(num, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) from.augment(index == nullptr ? i : index[i], max_norm, to + i * width);
  });
  return augmented;
}

STABLE_TORCH_LIBRARY_FRAGMENT(torch_slide, m) {
  m.def("row_norms(Tensor weight, Tensor? bias) -> Tensor");
  m.def("augment_rows(Tensor weight, Tensor? bias, Tensor? rows, float max_norm) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torch_slide, CPU, m) {
  m.impl("row_norms", TORCH_BOX(&row_norms));
  m.impl("augment_rows", TORCH_BOX(&augment_rows));
}

}  // namespace ts
