#include "core/sampled_linear.h"

#include <algorithm>

#include "ops/checks.h"
#include "ops/common.h"
#include "ops/memory.h"

namespace ts {
namespace {

constexpr const char* kForward = "sampled_linear";
constexpr const char* kBackward = "sampled_linear_backward";

// Elements and uses that are worth a task of their own.
constexpr int64_t kGrain = 1024;

// What uses_by_row (ops/by_row.cpp) returned.
struct Uses {
  const Tensor &rows, &starts, &entries, &samples;
};

const int32_t* checked_numbers(const Tensor& tensor, int64_t bound, const char* op, const char* argument) {
  const int32_t* const numbers = data<int32_t>(tensor, op, argument);
  if (!all_below(numbers, tensor.numel(), bound))
    reject<std::out_of_range>(op, argument, "in [0, " + std::to_string(bound) + ")", "others");
  return numbers;
}

template <typename Value, typename Row>
SampledView<Value, Row> checked_view(const Tensor& hidden, const Tensor& weight, const Uses& uses, const char* op) {
  if (hidden.dim() != 2) reject(op, "hidden", "[B, d]", shape_of(hidden));
  if (weight.dim() != 2 || weight.size(1) != hidden.size(1))
    reject(op, "weight", "[N, " + std::to_string(hidden.size(1)) + "]", shape_of(weight));
  const int64_t num_rows = uses.rows.numel(), num_uses = uses.entries.numel();
  require_shape(uses.starts, {num_rows + 1}, op, "starts");
  require_shape(uses.samples, {num_uses}, op, "samples");
  return {data<Value>(hidden, op, "hidden"),
          data<Row>(weight, op, "weight"),
          {checked_indices(uses.rows, weight.size(0), op, "rows"), checked_offsets(uses.starts, num_uses, op, "starts"),
           checked_numbers(uses.entries, num_uses, op, "entries"), num_rows},
          checked_numbers(uses.samples, hidden.size(0), op, "samples"),
          hidden.size(1)};
}

template <typename Value, typename Row>
Tensor forward(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Uses& uses) {
  const SampledView<Value, Row> view = checked_view<Value, Row>(hidden, weight, uses, kForward);
  if (bias.has_value()) require_shape(*bias, {weight.size(0)}, kForward, "bias");
  const Row* const biases = bias.has_value() ? data<Row>(*bias, kForward, "bias") : nullptr;
  Tensor values = empty<Value>({uses.entries.numel()});
  Value* const out = mutable_data<Value>(values, kForward, "values");
  const int64_t parts = view.uses.num_entries() / kGrain + 1;
  parallel(parts, 1, [&](int64_t begin, int64_t end) {
    sampled_dots(view, biases, view.uses.cut(begin, parts), view.uses.cut(end, parts), out);
  });
  return values;
}

// The rows are cut into chunks, each with a grad_hidden of its own; the number of chunks depends on the sizes only,
// so that the sums are the same for every number of threads.
int64_t num_chunks(int64_t uses, int64_t num_samples) {
  constexpr int64_t most = 16, worthwhile = 4096;
  return std::clamp<int64_t>(uses / std::max(worthwhile, 2 * num_samples), 1, most);
}

template <typename Value, typename Row>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_values, const Tensor& hidden, const Tensor& weight,
                                            const Uses& uses) {
  const SampledView<Value, Row> view = checked_view<Value, Row>(hidden, weight, uses, kBackward);
  const int64_t num_uses = uses.entries.numel(), num_rows = view.uses.num_rows, d = view.width;
  const int64_t num_samples = hidden.size(0), hidden_size = hidden.numel();
  require_shape(grad_values, {num_uses}, kBackward, "grad_values");
  const Value* const gradients = data<Value>(grad_values, kBackward, "grad_values");
  const Tensor by_use = empty<Value>({num_uses});
  Value* const gradient_of_use = mutable_data<Value>(by_use, kBackward, "by_use");
  parallel(num_uses, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) gradient_of_use[i] = gradients[view.uses.entries[i]];
  });

  const int64_t chunks = num_chunks(num_uses, num_samples);
  Tensor grad_rows = empty_large({num_rows, d}, scalar_type_of<Value>()), grad_bias = empty<Value>({num_rows});
  Tensor partial = empty<Value>({chunks, num_samples, d}), grad_hidden = empty<Value>({num_samples, d});
  Value* const row_gradients = mutable_data<Value>(grad_rows, kBackward, "grad_rows");
  Value* const bias_gradients = mutable_data<Value>(grad_bias, kBackward, "grad_bias");
  Value* const partials = mutable_data<Value>(partial, kBackward, "partial");
  Value* const hidden_gradients = mutable_data<Value>(grad_hidden, kBackward, "grad_hidden");
  parallel(chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      std::fill_n(partials + c * hidden_size, hidden_size, Value(0));
      sampled_gradients(view, gradient_of_use, view.uses.cut(c, chunks), view.uses.cut(c + 1, chunks), row_gradients,
                        bias_gradients, partials + c * hidden_size);
    }
  });
  parallel(hidden_size, kGrain, [&](int64_t begin, int64_t end) {
    std::copy(partials + begin, partials + end, hidden_gradients + begin);
    for (int64_t c = 1; c < chunks; ++c)
      for (int64_t i = begin; i < end; ++i) hidden_gradients[i] += partials[c * hidden_size + i];
  });
  return {grad_hidden, grad_rows, grad_bias};
}

}  // namespace

// -> values [nnz]
Tensor sampled_linear(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& rows,
                      const Tensor& starts, const Tensor& entries, const Tensor& samples) {
  const auto run = weight.scalar_type() == ScalarType::Double     ? &forward<double, double>
                   : weight.scalar_type() == ScalarType::BFloat16 ? &forward<float, uint16_t>
                                                                  : &forward<float, float>;
  return run(hidden, weight, bias, {rows, starts, entries, samples});
}

// -> grad_hidden [B, d], grad_rows [U, d], grad_bias [U]
std::tuple<Tensor, Tensor, Tensor> sampled_linear_backward(const Tensor& grad_values, const Tensor& hidden,
                                                           const Tensor& weight, const Tensor& rows,
                                                           const Tensor& starts, const Tensor& entries,
                                                           const Tensor& samples) {
  const auto run = weight.scalar_type() == ScalarType::Double     ? &backward<double, double>
                   : weight.scalar_type() == ScalarType::BFloat16 ? &backward<float, uint16_t>
                                                                  : &backward<float, float>;
  return run(grad_values, hidden, weight, {rows, starts, entries, samples});
}

STABLE_TORCH_LIBRARY_FRAGMENT(torch_slide, m) {
  m.def(
      "sampled_linear(Tensor hidden, Tensor weight, Tensor? bias, Tensor rows, Tensor starts, Tensor entries, "
      "Tensor samples) -> Tensor");
  m.def(
      "sampled_linear_backward(Tensor grad_values, Tensor hidden, Tensor weight, Tensor rows, Tensor starts, "
      "Tensor entries, Tensor samples) -> (Tensor grad_hidden, Tensor grad_rows, Tensor grad_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(torch_slide, CPU, m) {
  m.impl("sampled_linear", TORCH_BOX(&sampled_linear));
  m.impl("sampled_linear_backward", TORCH_BOX(&sampled_linear_backward));
}

}  // namespace ts
