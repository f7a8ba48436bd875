#include "core/sampled_linear.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "ops/checks.h"
#include "ops/common.h"
#include "ops/memory.h"

namespace ts {
namespace {

constexpr const char* kForward = "sampled_linear";
constexpr const char* kBackward = "sampled_linear_backward";

// Entries that are worth a task of their own.
constexpr int64_t kGrain = 1024;

template <typename Value, typename Row>
SampledView<Value, Row> checked_view(const Tensor& hidden, const Tensor& weight, const Tensor& row_offsets,
                                     const Tensor& ids, const char* op) {
  if (hidden.dim() != 2) reject(op, "hidden", "[B, d]", shape_of(hidden));
  if (weight.dim() != 2 || weight.size(1) != hidden.size(1))
    reject(op, "weight", "[N, " + std::to_string(hidden.size(1)) + "]", shape_of(weight));
  require_shape(row_offsets, {hidden.size(0) + 1}, op, "row_offsets");
  return {data<Value>(hidden, op, "hidden"),
          data<Row>(weight, op, "weight"),
          checked_offsets(row_offsets, ids.numel(), op, "row_offsets"),
          checked_indices(ids, weight.size(0), op, "ids"),
          hidden.size(0),
          hidden.size(1)};
}

template <typename Value, typename Row>
Tensor forward(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& row_offsets,
               const Tensor& ids) {
  const SampledView<Value, Row> view = checked_view<Value, Row>(hidden, weight, row_offsets, ids, kForward);
  if (bias.has_value()) require_shape(*bias, {weight.size(0)}, kForward, "bias");
  const Row* const biases = bias.has_value() ? data<Row>(*bias, kForward, "bias") : nullptr;
  Tensor values = empty<Value>({ids.numel()});
  Value* const out = mutable_data<Value>(values, kForward, "values");
  torch::stable::parallel_for(0, ids.numel(), kGrain,
                              [&](int64_t begin, int64_t end) { sampled_dots(view, biases, begin, end, out); });
  return values;
}

// Memory that nobody has cleared.
template <typename T>
using Scratch = std::unique_ptr<T[]>;

template <typename T>
Scratch<T> scratch(int64_t size) {
  return Scratch<T>(new T[static_cast<size_t>(size)]);
}

// [parts + 1] boundaries of n elements.
std::vector<int64_t> split(int64_t n, int64_t parts) {
  std::vector<int64_t> bounds(static_cast<size_t>(parts) + 1);
  for (int64_t part = 0; part <= parts; ++part) bounds[part] = n * part / parts;
  return bounds;
}

// Sorts by key; other has the same room. Returns where the result lies.
KeyValue* sort_uses(KeyValue* uses, KeyValue* other, const std::vector<int64_t>& blocks, int64_t num_keys) {
  const int64_t num_blocks = static_cast<int64_t>(blocks.size()) - 1;
  const RadixPlan plan(num_keys);
  std::vector<int64_t> places(static_cast<size_t>(num_blocks * plan.digits()));
  for (int pass = 0; pass < plan.passes; ++pass) {
    torch::stable::parallel_for(0, num_blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        count_digits(plan, uses + blocks[b], blocks[b + 1] - blocks[b], pass, places.data() + b * plan.digits());
    });
    digit_places(plan, places.data(), num_blocks);
    torch::stable::parallel_for(0, num_blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        move_by_digit(plan, uses + blocks[b], blocks[b + 1] - blocks[b], pass, places.data() + b * plan.digits(),
                      other);
    });
    std::swap(uses, other);
  }
  return uses;
}

// The rows are cut into chunks, each with a grad_hidden of its own; the number of chunks depends on the sizes only,
// so that the sums are the same for every number of threads.
int64_t num_chunks(int64_t uses, int64_t num_samples) {
  constexpr int64_t most = 16, worthwhile = 4096;
  return std::clamp<int64_t>(uses / std::max(worthwhile, 2 * num_samples), 1, most);
}

template <typename Value, typename Row>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_values, const Tensor& hidden,
                                                    const Tensor& weight, const Tensor& row_offsets,
                                                    const Tensor& ids) {
  const SampledView<Value, Row> view = checked_view<Value, Row>(hidden, weight, row_offsets, ids, kBackward);
  const int64_t nnz = ids.numel(), d = view.width, hidden_size = hidden.numel();
  require_shape(grad_values, {nnz}, kBackward, "grad_values");
  const Value* const gradients = data<Value>(grad_values, kBackward, "grad_values");
  constexpr int64_t most = std::numeric_limits<uint32_t>::max();
  if (std::max({nnz, weight.size(0), view.num_samples}) > most)
    reject(kBackward, "ids, weight and hidden", "of at most " + std::to_string(most) + " entries or rows",
           std::to_string(nnz) + ", " + std::to_string(weight.size(0)) + " and " + std::to_string(view.num_samples));

  const int64_t chunks = num_chunks(nnz, view.num_samples);
  std::vector<int64_t> bounds = split(nnz, chunks);
  const Scratch<KeyValue> uses = scratch<KeyValue>(nnz), other = scratch<KeyValue>(nnz);
  const Scratch<int64_t> samples = scratch<int64_t>(nnz), sorted_samples = scratch<int64_t>(nnz);
  const Scratch<Value> sorted_gradients = scratch<Value>(nnz);
  torch::stable::parallel_for(0, nnz, kGrain, [&](int64_t begin, int64_t end) {
    list_uses(view.row_offsets, view.num_samples, view.ids, begin, end, samples.get(), uses.get());
  });
  const KeyValue* const sorted = sort_uses(uses.get(), other.get(), bounds, weight.size(0));
  torch::stable::parallel_for(0, nnz, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      sorted_samples[i] = samples[sorted[i].value];
      sorted_gradients[i] = gradients[sorted[i].value];
    }
  });

  for (int64_t& bound : bounds) bound = next_key(sorted, nnz, bound);
  std::vector<int64_t> first_row(bounds.size(), 0);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) first_row[c + 1] = count_keys(sorted, bounds[c], bounds[c + 1]);
  });
  for (int64_t c = 0; c < chunks; ++c) first_row[c + 1] += first_row[c];

  const int64_t num_rows = first_row[chunks];
  Tensor rows = empty<int64_t>({num_rows}), grad_bias = empty<Value>({num_rows});
  Tensor grad_rows = empty_large({num_rows, d}, scalar_type_of<Value>());
  Tensor partial = empty<Value>({chunks, view.num_samples, d}), grad_hidden = empty<Value>({view.num_samples, d});
  int64_t* const row_ids = mutable_data<int64_t>(rows, kBackward, "rows");
  Value* const row_gradients = mutable_data<Value>(grad_rows, kBackward, "grad_rows");
  Value* const bias_gradients = mutable_data<Value>(grad_bias, kBackward, "grad_bias");
  Value* const partials = mutable_data<Value>(partial, kBackward, "partial");
  Value* const hidden_gradients = mutable_data<Value>(grad_hidden, kBackward, "grad_hidden");
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      std::fill_n(partials + c * hidden_size, hidden_size, Value(0));
      sampled_gradients(view, SampledUses<Value>{sorted, sorted_samples.get(), sorted_gradients.get()}, bounds[c],
                        bounds[c + 1], row_ids + first_row[c], row_gradients + first_row[c] * d,
                        bias_gradients + first_row[c], partials + c * hidden_size);
    }
  });
  torch::stable::parallel_for(0, hidden_size, kGrain, [&](int64_t begin, int64_t end) {
    std::copy(partials + begin, partials + end, hidden_gradients + begin);
    for (int64_t c = 1; c < chunks; ++c)
      for (int64_t i = begin; i < end; ++i) hidden_gradients[i] += partials[c * hidden_size + i];
  });
  return {grad_hidden, rows, grad_rows, grad_bias};
}

}  // namespace

// -> values [nnz]
Tensor sampled_linear(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                      const Tensor& row_offsets, const Tensor& ids) {
  const auto run = weight.scalar_type() == ScalarType::Double     ? &forward<double, double>
                   : weight.scalar_type() == ScalarType::BFloat16 ? &forward<float, uint16_t>
                                                                  : &forward<float, float>;
  return run(hidden, weight, bias, row_offsets, ids);
}

// -> grad_hidden [B, d], rows [U], grad_rows [U, d], grad_bias [U]
std::tuple<Tensor, Tensor, Tensor, Tensor> sampled_linear_backward(const Tensor& grad_values, const Tensor& hidden,
                                                                   const Tensor& weight, const Tensor& row_offsets,
                                                                   const Tensor& ids) {
  const auto run = weight.scalar_type() == ScalarType::Double     ? &backward<double, double>
                   : weight.scalar_type() == ScalarType::BFloat16 ? &backward<float, uint16_t>
                                                                  : &backward<float, float>;
  return run(grad_values, hidden, weight, row_offsets, ids);
}

STABLE_TORCH_LIBRARY_FRAGMENT(torch_slide, m) {
  m.def("sampled_linear(Tensor hidden, Tensor weight, Tensor? bias, Tensor row_offsets, Tensor ids) -> Tensor");
  m.def(
      "sampled_linear_backward(Tensor grad_values, Tensor hidden, Tensor weight, Tensor row_offsets, Tensor ids) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(torch_slide, CPU, m) {
  m.impl("sampled_linear", TORCH_BOX(&sampled_linear));
  m.impl("sampled_linear_backward", TORCH_BOX(&sampled_linear_backward));
}

}  // namespace ts
