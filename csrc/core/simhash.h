// Signs of random projections (Charikar, STOC 2002), K to a code, with the neighbouring buckets of multi-probe LSH
// (Lv et al., VLDB 2007).
#pragma once
#include <vector>

#include "core/panels.h"

namespace ts {

// The sets of bits that successive probes flip, over the ranks of the bits by nearness to their hyperplane: the empty
// set, then the sets of one, of two, ..., each size in ascending order as an integer.
std::vector<uint32_t> flips_by_size(size_t bits, size_t probes);

struct SimHash {
  Panels projections;
  size_t num_tables;
  size_t bits;
  const std::vector<uint32_t>& flips;

  // x [n, d] -> codes [n, num_tables, flips.size()]; bit k of a code is the sign of the table's k-th projection.
  void codes(const float* x, size_t n, int32_t* codes) const;
};

}  // namespace ts
