#include <vector>

#include "core/centroids.h"
#include "core/simhash.h"
#include "core/winners.h"
#include "kernels/kernels.h"
#include "ops/common.h"

namespace ts {
namespace {

template <typename T>
std::vector<float> pack(const T* matrix, size_t d, size_t columns, size_t num_tables) {
  const size_t per_table = columns / num_tables, panels_per_table = panels_for(per_table);
  std::vector<float> panels(num_tables * panels_per_table * d * kPanelWidth);
  parallel(num_tables * panels_per_table, 4, [&](int64_t begin, int64_t end) {
    for (size_t panel = begin; panel < static_cast<size_t>(end); ++panel) {
      const size_t table = panel / panels_per_table, first = panel % panels_per_table * kPanelWidth;
      pack_panel(matrix + table * per_table + first, d, columns, std::min(kPanelWidth, per_table - first),
                 panels.data() + panel * d * kPanelWidth);
    }
  });
  return panels;
}

void require_columns(const Tensor& x, const Tensor& columns, int64_t num_tables, const char* op, const char* argument) {
  require(x.dim() == 2 && columns.dim() == 2 && x.size(1) == columns.size(0), op, argument, "as high as x is wide");
  require(num_tables >= 1 && columns.size(1) % num_tables == 0 && columns.size(1) > 0, op, argument,
          "as wide for every table");
}

void require_indices(const Tensor& indices, int64_t bound, const char* op, const char* argument) {
  const int32_t* const first = data<int32_t>(indices, op, argument);
  for (int64_t i = 0; i < indices.numel(); ++i)
    require(first[i] >= 0 && first[i] < bound, op, argument, "within [0, " + std::to_string(bound) + ")");
}

Bins bins_of(const Tensor& x, const Tensor& bins, const std::optional<Tensor>& detours, int64_t num_tables,
             const char* op) {
  require(x.dim() == 2 && x.size(1) > 0, op, "x", "[n, d]");
  require(bins.dim() == 2 && bins.size(0) > 0 && bins.size(1) == kBinSize, op, "bins", "[num_bins, 8]");
  require(num_tables >= 1 && bins.size(0) % num_tables == 0, op, "bins", "as many for every table");
  require_indices(bins, x.size(1), op, "bins");
  Bins view{data<int32_t>(bins, op, "bins"),
            static_cast<size_t>(bins.size(0)),
            static_cast<size_t>(num_tables),
            detours.has_value(),
            nullptr,
            0};
  if (detours.has_value()) {
    require(detours->dim() == 2 && detours->size(0) == bins.size(0), op, "detours", "[num_bins, any]");
    require_indices(*detours, bins.size(0), op, "detours");
    view.detours = data<int32_t>(*detours, op, "detours");
    view.num_detours = detours->size(1);
  }
  return view;
}

}  // namespace

// x [n, d], columns [d, p] -> [n, p], bit-equal for every instruction set and number of threads
Tensor project(const Tensor& x, const Tensor& columns) {
  constexpr const char* op = "project";
  require_columns(x, columns, 1, op, "columns");
  const size_t n = x.size(0), d = x.size(1), p = columns.size(1);
  const float* const px = data<float>(x, op, "x");
  const std::vector<float> packed = pack(data<float>(columns, op, "columns"), d, p, 1);
  const Panels panels{packed.data(), d, panels_for(p)};
  Tensor y = empty<float>({x.size(0), columns.size(1)});
  float* const py = mutable_data<float>(y, op, "y");
  parallel(n, kRowBlock, [&](int64_t begin, int64_t end) {
    std::vector<float> block(kRowBlock * kPanelWidth);
    for (size_t row = begin; row < static_cast<size_t>(end); row += kRowBlock)
      for (size_t panel = 0; panel < panels.count; ++panel) {
        const size_t rows = std::min(kRowBlock, end - row), first = panel * kPanelWidth;
        kernels().hash.project(px + row * d, rows, d, panels[panel], block.data(), kPanelWidth);
        for (size_t r = 0; r < rows; ++r)
          std::copy_n(block.data() + r * kPanelWidth, std::min(kPanelWidth, p - first), py + (row + r) * p + first);
      }
  });
  return y;
}

// x [n, d], projections int8 [d, L * K] -> int32 [n, L, probes]
Tensor simhash(const Tensor& x, const Tensor& projections, int64_t num_tables, int64_t probes) {
  constexpr const char* op = "simhash";
  require_columns(x, projections, num_tables, op, "projections");
  const size_t d = x.size(1), columns = projections.size(1), bits = columns / num_tables;
  require(bits <= 24, op, "projections", "at most 24 for a table");
  require(probes >= 1 && probes <= int64_t{1} << bits, op, "probes", "between 1 and the number of codes");
  const float* const px = data<float>(x, op, "x");
  const std::vector<float> panels = pack(data<int8_t>(projections, op, "projections"), d, columns, 1);
  const std::vector<uint32_t> flips = flips_by_size(bits, probes);
  const SimHash hash{{panels.data(), d, panels_for(columns)}, static_cast<size_t>(num_tables), bits, flips};
  Tensor codes = empty<int32_t>({x.size(0), num_tables, probes});
  int32_t* const to = mutable_data<int32_t>(codes, op, "codes");
  parallel(x.size(0), kRowBlock, [&](int64_t begin, int64_t end) {
    hash.codes(px + begin * d, end - begin, to + begin * num_tables * probes);
  });
  return codes;
}

// x [n, d], bins int32 [L * K, 8], detours int32 [L * K, any] or none -> int32 [n, L, 1]
Tensor winner_take_all(const Tensor& x, const Tensor& bins, const std::optional<Tensor>& detours, int64_t num_tables) {
  constexpr const char* op = "winner_take_all";
  const Bins view = bins_of(x, bins, detours, num_tables, op);
  const float* const px = data<float>(x, op, "x");
  const int64_t d = x.size(1);
  Tensor codes = empty<int32_t>({x.size(0), num_tables, 1});
  int32_t* const to = mutable_data<int32_t>(codes, op, "codes");
  parallel(x.size(0), kLanes, [&](int64_t begin, int64_t end) {
    winner_codes(view, px + begin * d, end - begin, d, to + begin * num_tables);
  });
  return codes;
}

// x [n, d], bins and detours as above, labels uint8 [L * K, d] -> int32 [n, L, 1]
Tensor minhash(const Tensor& x, const Tensor& bins, const Tensor& detours, const Tensor& labels, int64_t num_tables,
               int64_t top) {
  constexpr const char* op = "minhash";
  const Bins view = bins_of(x, bins, detours, num_tables, op);
  require(labels.dim() == 2 && labels.size(0) == bins.size(0) && labels.size(1) == x.size(1), op, "labels",
          "[num_bins, d]");
  require(top >= 1, op, "top", "at least 1");
  const float* const px = data<float>(x, op, "x");
  const uint8_t* const label = data<uint8_t>(labels, op, "labels");
  for (int64_t i = 0; i < labels.numel(); ++i) require(label[i] < 1 << kBitsPerWinner, op, "labels", "below 8");
  const int64_t d = x.size(1);
  Tensor codes = empty<int32_t>({x.size(0), num_tables, 1});
  int32_t* const to = mutable_data<int32_t>(codes, op, "codes");
  parallel(x.size(0), kLanes, [&](int64_t begin, int64_t end) {
    minhash_codes(view, label, top, px + begin * d, end - begin, d, to + begin * num_tables);
  });
  return codes;
}

// x [n, d], centroids [d, L * C] -> int32 [n, L, probes]
Tensor nearest_centroids(const Tensor& x, const Tensor& centroids, int64_t num_tables, int64_t probes,
                         const std::optional<Tensor>& guides) {
  constexpr const char* op = "nearest_centroids";
  require_columns(x, centroids, num_tables, op, "centroids");
  const size_t d = x.size(1), columns = centroids.size(1), per_table = columns / num_tables;
  require(probes >= 1 && probes <= static_cast<int64_t>(per_table), op, "probes", "between 1 and a table's centroids");
  const float* const px = data<float>(x, op, "x");
  const std::vector<float> panels = pack(data<float>(centroids, op, "centroids"), d, columns, num_tables);
  Centroids tables{{panels.data(), d, num_tables * panels_for(per_table)}, static_cast<size_t>(num_tables), per_table};
  std::vector<float> guide_panels;
  if (guides.has_value()) {
    require_columns(x, *guides, num_tables, op, "guides");
    const size_t guide_columns = guides->size(1), groups = guide_columns / num_tables;
    require(groups * kPanelWidth == per_table, op, "guides", "one for every 32 centroids");
    require(probes <= static_cast<int64_t>(kPanelWidth), op, "probes", "at most 32 with guides");
    guide_panels = pack(data<float>(*guides, op, "guides"), d, guide_columns, num_tables);
    tables.guides = {guide_panels.data(), d, num_tables * panels_for(groups)};
  }
  Tensor codes = empty<int32_t>({x.size(0), num_tables, probes});
  int32_t* const to = mutable_data<int32_t>(codes, op, "codes");
  parallel(x.size(0), kRowBlock, [&](int64_t begin, int64_t end) {
    tables.codes(px + begin * d, end - begin, probes, to + begin * num_tables * probes);
  });
  return codes;
}

// x [n, d], codes int32 [n] -> [num_clusters, d]: the sum over the rows of each cluster, in ascending order
Tensor cluster_sums(const Tensor& x, const Tensor& codes, int64_t num_clusters) {
  constexpr const char* op = "cluster_sums";
  require(x.dim() == 2 && codes.dim() == 1 && codes.size(0) == x.size(0), op, "codes", "one for each row of x");
  require(num_clusters >= 1, op, "num_clusters", "at least 1");
  require_indices(codes, num_clusters, op, "codes");
  const float* const px = data<float>(x, op, "x");
  const int64_t d = x.size(1);
  const Members members(data<int32_t>(codes, op, "codes"), x.size(0), num_clusters);
  Tensor sums = empty<float>({num_clusters, d});
  float* const to = mutable_data<float>(sums, op, "sums");
  parallel(num_clusters, 8, [&](int64_t begin, int64_t end) { members.sum(px, d, begin, end, to); });
  return sums;
}

STABLE_TORCH_LIBRARY_FRAGMENT(torch_slide, m) {
  m.def("project(Tensor x, Tensor columns) -> Tensor");
  m.def("simhash(Tensor x, Tensor projections, int num_tables, int probes) -> Tensor");
  m.def("winner_take_all(Tensor x, Tensor bins, Tensor? detours, int num_tables) -> Tensor");
  m.def("minhash(Tensor x, Tensor bins, Tensor detours, Tensor labels, int num_tables, int top) -> Tensor");
  m.def("nearest_centroids(Tensor x, Tensor centroids, int num_tables, int probes, Tensor? guides=None) -> Tensor");
  m.def("cluster_sums(Tensor x, Tensor codes, int num_clusters) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torch_slide, CPU, m) {
  m.impl("project", TORCH_BOX(&project));
  m.impl("simhash", TORCH_BOX(&simhash));
  m.impl("winner_take_all", TORCH_BOX(&winner_take_all));
  m.impl("minhash", TORCH_BOX(&minhash));
  m.impl("nearest_centroids", TORCH_BOX(&nearest_centroids));
  m.impl("cluster_sums", TORCH_BOX(&cluster_sums));
}

}  // namespace ts
