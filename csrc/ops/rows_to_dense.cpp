#include <algorithm>
#include <cstring>
#include <vector>

#include "ops/checks.h"
#include "ops/common.h"
#include "ops/memory.h"

namespace ts {

// rows [U] ascending, values [U, ...] -> [N, ...], zero but for these rows. One pass that writes every byte once.
Tensor rows_to_dense(const Tensor& rows, const Tensor& values, int64_t num_rows) {
  constexpr const char* op = "rows_to_dense";
  const int64_t* const places = checked_indices(rows, num_rows, op, "rows");
  const int64_t num = rows.numel();
  for (int64_t i = 1; i < num; ++i)
    if (places[i - 1] >= places[i])
      reject(op, "rows", "ascending and unique",
             std::to_string(places[i - 1]) + " before " + std::to_string(places[i]) + " at " + std::to_string(i));
  if (values.dim() < 1 || values.size(0) != num || !values.is_contiguous() || !values.is_cpu())
    reject(op, "values", "a contiguous CPU tensor of length " + std::to_string(num), shape_of(values));
  std::vector<int64_t> sizes{num_rows};
  for (int64_t i = 1; i < values.dim(); ++i) sizes.push_back(values.size(i));
  Tensor dense = empty_large(sizes, values.scalar_type());
  if (dense.numel() == 0) return dense;

  const int64_t row_bytes = dense.numel() / num_rows * static_cast<int64_t>(dense.element_size());
  const char* const from = static_cast<const char*>(values.const_data_ptr());
  char* const to = static_cast<char*>(dense.mutable_data_ptr());
  constexpr int64_t bytes_per_task = 1 << 18;
  const int64_t grain = std::max<int64_t>(1, bytes_per_task / row_bytes);
  parallel(num_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t next = std::lower_bound(places, places + num, begin) - places; begin < end; ++next) {
      const int64_t row = next < num ? std::min(places[next], end) : end;
      std::memset(to + begin * row_bytes, 0, static_cast<size_t>((row - begin) * row_bytes));
      if (row < end) std::memcpy(to + row * row_bytes, from + next * row_bytes, static_cast<size_t>(row_bytes));
      begin = row + 1;
    }
  });
  return dense;
}

STABLE_TORCH_LIBRARY_FRAGMENT(torch_slide, m) {
  m.def("rows_to_dense(Tensor rows, Tensor values, SymInt num_rows) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torch_slide, CPU, m) { m.impl("rows_to_dense", TORCH_BOX(&rows_to_dense)); }

}  // namespace ts
