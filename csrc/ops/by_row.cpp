// Sums of rows by bag, as nn.EmbeddingBag's; coalescing of row-sparse gradients, also straight from the gradient of
// such sums; and the uses of a layer's rows by the samples of a batch.
#include "core/by_row.h"

#include <algorithm>
#include <tuple>

#include "kernels/kernels.h"
#include "ops/checks.h"
#include "ops/common.h"

namespace ts {

// ids [n], values [m, d], source [n] into values (n = m without it), scale [n]
// -> the distinct ids, ascending, [k]; the sum of scale[e] * values[source[e]] for each of them, [k, d]
std::tuple<Tensor, Tensor> sum_by_row(const Tensor& ids, const Tensor& values, std::optional<Tensor> source,
                                      std::optional<Tensor> scale) {
  constexpr const char* op = "sum_by_row";
  const int64_t n = ids.numel();
  require(ids.dim() == 1 && values.dim() == 2, op, "ids, values", "of one and two dimensions");
  require(n < (int64_t{1} << 31), op, "ids", "fewer than 2^31");
  const int64_t m = values.size(0), d = values.size(1);
  const int64_t* id = data<int64_t>(ids, op, "ids");
  const float* value = data<float>(values, op, "values");
  const int64_t* from = source ? data<int64_t>(*source, op, "source") : nullptr;
  const float* factor = scale ? data<float>(*scale, op, "scale") : nullptr;
  require(source ? source->numel() == n : m == n, op, "source", "as long as ids");
  require(!scale || scale->numel() == n, op, "scale", "as long as ids");
  require(all_below(id, n, int64_t{1} << 32), op, "ids", "between 0 and 2^32 - 1");
  require(from == nullptr || all_below(from, n, m), op, "source", "rows of values");
  const RowSort sort(id, n, n > 0 ? *std::max_element(id, id + n) + 1 : 1, parallel);
  const int64_t k = sort.num_rows();
  Tensor rows = empty<int64_t>({k}), sums = empty<float>({k, d});
  std::vector<int64_t> starts(static_cast<size_t>(k) + 1);
  std::vector<int32_t> entries(static_cast<size_t>(n));
  sort.write(mutable_data<int64_t>(rows, op, "rows"), starts.data(), entries.data(), parallel);
  const ByRow by_row{data<int64_t>(rows, op, "rows"), starts.data(), entries.data(), k};
  float* sum = mutable_data<float>(sums, op, "sums");
  constexpr int64_t kElementsPerThread = 8192;
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, d));
  parallel(k, grain, [&](int64_t begin, int64_t end) { sum_entries(by_row, value, from, factor, d, sum, begin, end); });
  return {rows, sums};
}

// weight [N, d], ids [n], offsets [B + 1], scale [n] or none -> the sum of scale[e] * weight[ids[e]] over the entries e
// in [offsets[b], offsets[b + 1]), [B, d]
Tensor sum_bags(const Tensor& weight, const Tensor& ids, const Tensor& offsets, std::optional<Tensor> scale) {
  constexpr const char* op = "sum_bags";
  require(weight.dim() == 2, op, "weight", "[N, d]");
  const int64_t n = ids.numel(), num_bags = offsets.numel() - 1, d = weight.size(1);
  const int64_t* const id = checked_indices(ids, weight.size(0), op, "ids");
  const int64_t* const offset = checked_offsets(offsets, n, op, "offsets");
  require(!scale || scale->numel() == n, op, "scale", "as long as ids");
  const float* const values = data<float>(weight, op, "weight");
  const float* const factor = scale ? data<float>(*scale, op, "scale") : nullptr;
  Tensor sums = empty<float>({num_bags, d});
  float* const sum = mutable_data<float>(sums, op, "sums");
  const auto add_up = kernels().sum_entries;
  parallel(num_bags, 8, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = offset[b];
      add_up(values, static_cast<size_t>(d), nullptr, static_cast<size_t>(offset[b + 1] - first), id + first,
             factor == nullptr ? nullptr : factor + first, sum + b * d);
    }
  });
  return sums;
}

// The uses of weight rows by samples: row_offsets [B + 1], ids [nnz] -> rows [U], starts [U + 1], entries [nnz] and
// samples [nnz]; the uses of rows[r] are the entries[starts[r]:starts[r + 1]], by samples of the same places.
std::tuple<Tensor, Tensor, Tensor, Tensor> uses_by_row(const Tensor& row_offsets, const Tensor& ids, int64_t num_rows) {
  constexpr const char* op = "uses_by_row";
  const int64_t n = ids.numel(), num_samples = row_offsets.numel() - 1;
  const int64_t* const id = checked_indices(ids, num_rows, op, "ids");
  const int64_t* const offsets = checked_offsets(row_offsets, n, op, "row_offsets");
  require(std::max(n, num_samples) < (int64_t{1} << 31), op, "ids and row_offsets", "fewer than 2^31");
  require(num_rows <= int64_t{1} << 32, op, "num_rows", "at most 2^32");
  const RowSort sort(id, n, std::max<int64_t>(1, num_rows), parallel);
  Tensor rows = empty<int64_t>({sort.num_rows()}), starts = empty<int64_t>({sort.num_rows() + 1});
  Tensor entries = empty<int32_t>({n}), samples = empty<int32_t>({n});
  int32_t* const entry = mutable_data<int32_t>(entries, op, "entries");
  int32_t* const sample = mutable_data<int32_t>(samples, op, "samples");
  sort.write(mutable_data<int64_t>(rows, op, "rows"), mutable_data<int64_t>(starts, op, "starts"), entry, parallel);
  const Tensor owners = empty<int32_t>({n});
  int32_t* const sample_of = mutable_data<int32_t>(owners, op, "owners");
  parallel(num_samples, 16, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      std::fill(sample_of + offsets[b], sample_of + offsets[b + 1], static_cast<int32_t>(b));
  });
  constexpr int64_t kEntriesPerThread = 8192;
  parallel(n, kEntriesPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sample[i] = sample_of[entry[i]];
  });
  return {rows, starts, entries, samples};
}

STABLE_TORCH_LIBRARY_FRAGMENT(torch_slide, m) {
  m.def("sum_by_row(Tensor ids, Tensor values, Tensor? source=None, Tensor? scale=None) -> (Tensor, Tensor)");
  m.def("sum_bags(Tensor weight, Tensor ids, Tensor offsets, Tensor? scale=None) -> Tensor");
  m.def(
      "uses_by_row(Tensor row_offsets, Tensor ids, int num_rows) "
      "-> (Tensor rows, Tensor starts, Tensor entries, Tensor samples)");
}

STABLE_TORCH_LIBRARY_IMPL(torch_slide, CPU, m) {
  m.impl("sum_by_row", TORCH_BOX(&sum_by_row));
  m.impl("sum_bags", TORCH_BOX(&sum_bags));
  m.impl("uses_by_row", TORCH_BOX(&uses_by_row));
}

}  // namespace ts
