// Coalescing of row-sparse gradients, also straight from the gradient of what the rows were summed into.
#include "core/coalesce.h"

#include <algorithm>
#include <tuple>

#include "ops/common.h"

namespace ts {

// ids [n], values [m, d], source [n] into values (n = m without it), scale [n]
// -> the distinct ids, ascending, [k]; the sum of scale[e] * values[source[e]] for each of them, [k, d]
std::tuple<Tensor, Tensor> sum_by_row(const Tensor& ids, const Tensor& values, std::optional<Tensor> source,
                                      std::optional<Tensor> scale) {
  constexpr const char* op = "sum_by_row";
  const int64_t n = ids.numel();
  require(ids.dim() == 1 && values.dim() == 2, op, "ids, values", "of one and two dimensions");
  require(n < (int64_t{1} << 32), op, "ids", "fewer than 2^32");
  const int64_t m = values.size(0), d = values.size(1);
  const int64_t* id = data<int64_t>(ids, op, "ids");
  const float* value = data<float>(values, op, "values");
  const int64_t* from = source ? data<int64_t>(*source, op, "source") : nullptr;
  const float* factor = scale ? data<float>(*scale, op, "scale") : nullptr;
  require(source ? source->numel() == n : m == n, op, "source", "as long as ids");
  require(!scale || scale->numel() == n, op, "scale", "as long as ids");
  const auto within = [n](const int64_t* x, int64_t bound) {
    return std::all_of(x, x + n, [bound](int64_t value) { return value >= 0 && value < bound; });
  };
  require(within(id, int64_t{1} << 32), op, "ids", "between 0 and 2^32 - 1");
  require(from == nullptr || within(from, m), op, "source", "rows of values");
  const EntriesByRow groups = group_by_row(id, n);
  const auto k = static_cast<int64_t>(groups.ids.size());
  Tensor rows = empty<int64_t>({k}), sums = empty<float>({k, d});
  std::copy(groups.ids.begin(), groups.ids.end(), mutable_data<int64_t>(rows, op, "rows"));
  float* sum = mutable_data<float>(sums, op, "sums");
  constexpr int64_t kElementsPerThread = 8192;
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, d));
  if (k > 0)
    torch::stable::parallel_for(
        0, k, grain, [&](int64_t begin, int64_t end) { sum_entries(groups, value, from, factor, d, sum, begin, end); });
  return {rows, sums};
}

STABLE_TORCH_LIBRARY_FRAGMENT(torch_slide, m) {
  m.def("sum_by_row(Tensor ids, Tensor values, Tensor? source=None, Tensor? scale=None) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(torch_slide, CPU, m) { m.impl("sum_by_row", TORCH_BOX(&sum_by_row)); }

}  // namespace ts
