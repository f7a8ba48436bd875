// Hashes that name the winner of a bin of eight coordinates, three bits each: winner-take-all (Yagnik et al., ICCV
// 2011), its densified form for sparse vectors (Chen and Shrivastava, UAI 2018), and one-permutation minwise hashing
// of the largest coordinates (Li, Owen and Zhang, NIPS 2012), whose winner is the first member of the set.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/hash_kernels.h"

namespace ts {

constexpr size_t kBitsPerWinner = 3;

struct Bins {
  const int32_t* coordinates;  // [num_bins, kBinSize]
  size_t num_bins;
  size_t num_tables;
  bool densified;          // whether an empty bin borrows a winner
  const int32_t* detours;  // [num_bins, num_detours]: the bins that it asks first
  size_t num_detours;
};

// x [n, d] -> codes [n, num_tables]; a code holds the winners of the table's bins, the first in its lowest bits.
void winner_codes(const Bins& bins, const float* x, size_t n, size_t d, int32_t* codes);

// The set is that of the at most `top` largest positive coordinates; a hash is the label of the winning coordinate.
// labels [num_bins, d] in [0, 8); an empty set has the code 0.
void minhash_codes(const Bins& bins, const uint8_t* labels, size_t top, const float* x, size_t n, size_t d,
                   int32_t* codes);

}  // namespace ts
