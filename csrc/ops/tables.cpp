#include "core/tables.h"

#include <vector>

#include "ops/checks.h"
#include "ops/common.h"

namespace ts {
namespace {

TablesView view(const Tensor& codes, const Tensor& buckets, const Tensor& counts, const char* op) {
  require(codes.dim() == 2 && buckets.dim() == 3 && counts.dim() == 2, op, "codes, buckets, counts",
          "[L, N], [L, num_buckets, capacity] and [L, num_buckets]");
  const int64_t num_tables = codes.size(0);
  require(buckets.size(0) == num_tables && counts.size(0) == num_tables && buckets.size(1) == counts.size(1), op,
          "buckets, counts", "of the same tables as codes");
  return {mutable_data<int32_t>(codes, op, "codes"),
          mutable_data<int32_t>(buckets, op, "buckets"),
          mutable_data<int32_t>(counts, op, "counts"),
          num_tables,
          codes.size(1),
          buckets.size(1),
          buckets.size(2)};
}

// Few tables and many threads: split a table's buckets, at the price of one more pass over its codes for each part.
int64_t parts_per_table(int64_t num_tables) {
  const int64_t threads = torch::stable::get_num_threads();
  return std::max<int64_t>(1, (threads + num_tables - 1) / std::max<int64_t>(1, num_tables));
}

}  // namespace

void update_tables_(const Tensor& codes, const Tensor& buckets, const Tensor& counts, const Tensor& rows,
                    const Tensor& new_codes, int64_t policy, int64_t seed) {
  constexpr const char* op = "update_tables_";
  const TablesView tables = view(codes, buckets, counts, op);
  const int64_t* const moved = checked_indices(rows, tables.num_rows, op, "rows");
  const int32_t* const to = data<int32_t>(new_codes, op, "new_codes");
  const int64_t num = rows.numel();
  require(new_codes.dim() == 2 && new_codes.size(0) == num && new_codes.size(1) == tables.num_tables, op, "new_codes",
          "[len(rows), L]");
  check_codes(to, num * tables.num_tables, tables.num_buckets, op, "new_codes");

  std::vector<uint8_t> touched(static_cast<size_t>(tables.num_tables * tables.num_buckets), 0);
  parallel(tables.num_tables, 1, [&](int64_t begin, int64_t end) {
    for (int64_t table = begin; table < end; ++table)
      move_rows(tables, table, moved, num, to, touched.data() + table * tables.num_buckets);
  });
  const int64_t parts = parts_per_table(tables.num_tables);
  parallel(tables.num_tables * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t table = job / parts, part = job % parts;
      fill_buckets(tables, table, tables.num_buckets * part / parts, tables.num_buckets * (part + 1) / parts,
                   touched.data() + table * tables.num_buckets, static_cast<Policy>(policy),
                   static_cast<uint64_t>(seed));
    }
  });
}

void fill_tables_(const Tensor& codes, const Tensor& buckets, const Tensor& counts, int64_t policy, int64_t seed) {
  constexpr const char* op = "fill_tables_";
  const TablesView tables = view(codes, buckets, counts, op);
  check_codes(tables.codes, tables.num_tables * tables.num_rows, tables.num_buckets, op, "codes", kNoBucket);
  const int64_t parts = parts_per_table(tables.num_tables);
  parallel(tables.num_tables * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t table = job / parts, part = job % parts;
      fill_buckets(tables, table, tables.num_buckets * part / parts, tables.num_buckets * (part + 1) / parts, nullptr,
                   static_cast<Policy>(policy), static_cast<uint64_t>(seed));
    }
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(torch_slide, m) {
  m.def(
      "update_tables_(Tensor(a!) codes, Tensor(b!) buckets, Tensor(c!) counts, Tensor rows, Tensor new_codes, "
      "int policy, int seed) -> ()");
  m.def("fill_tables_(Tensor codes, Tensor(b!) buckets, Tensor(c!) counts, int policy, int seed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(torch_slide, CPU, m) {
  m.impl("update_tables_", TORCH_BOX(&update_tables_));
  m.impl("fill_tables_", TORCH_BOX(&fill_tables_));
}

}  // namespace ts
