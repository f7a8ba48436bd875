// Codes by the nearest of a table's centroids, and the sums that train them (spherical k-means: Dhillon and Modha,
// Machine Learning 2001).
#pragma once
#include <vector>

#include "core/panels.h"

namespace ts {

struct Centroids {
  Panels panels;  // the panels of one table behind those of another
  size_t num_tables;
  size_t per_table;
  // With guides every panel of centroids is a group, with one guide (its direction) for each: only centroids of the
  // groups with the best guides are looked at, as in a tree of two levels (Nister and Stewenius, CVPR 2006).
  Panels guides{nullptr, 0, 0};

  // x [n, d] -> codes [n, num_tables, probes]: the centroids of largest inner product, best first, ties by number.
  void codes(const float* x, size_t n, size_t probes, int32_t* codes) const;

  // How many groups are looked at for so many probes.
  static size_t groups_for(size_t probes) { return 8 + probes / 2; }

 private:
  void all_codes(const float* x, size_t n, size_t probes, int32_t* codes) const;
  void guided_codes(const float* x, size_t n, size_t probes, int32_t* codes) const;
};

// The rows of every cluster in ascending order: those of cluster c are rows[offsets[c]] to rows[offsets[c + 1] - 1].
struct Members {
  Members(const int32_t* codes, size_t n, size_t num_clusters);
  // sums[c] = the sum over the rows of cluster c, in ascending order, for begin <= c < end. x is [n, d].
  void sum(const float* x, size_t d, size_t begin, size_t end, float* sums) const;

  std::vector<size_t> offsets;
  std::vector<size_t> rows;
};

}  // namespace ts
