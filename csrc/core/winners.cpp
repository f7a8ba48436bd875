#include "core/winners.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <vector>

#include "kernels/kernels.h"

namespace ts {
namespace {

// The hashes of kLanes vectors at a time.
class Round {
 public:
  Round(const Bins& bins, size_t d)
      : bins_(bins), lanes_(d * kLanes), winners_(bins.num_bins * kLanes), occupied_(bins.num_bins) {}

  float& coordinate(size_t i, size_t lane) { return lanes_[i * kLanes + lane]; }
  float& winner(size_t bin, size_t lane) { return winners_[bin * kLanes + lane]; }
  bool empty(size_t bin, size_t lane) const { return (occupied_[bin] >> lane & 1) == 0; }

  void load(const float* x, size_t rows, size_t d) {
    for (size_t i = 0; i < d; ++i)
      for (size_t lane = 0; lane < kLanes; ++lane) coordinate(i, lane) = lane < rows ? x[lane * d + i] : 0.0f;
  }
  void clear() { std::fill(lanes_.begin(), lanes_.end(), 0.0f); }
  void find_winners() {
    kernels().hash.bin_argmax(lanes_.data(), bins_.coordinates, bins_.num_bins, winners_.data(), occupied_.data());
  }

  // The bin whose winner stands in for an empty one: the first occupied of its detours (optimal densification,
  // Shrivastava, ICML 2017), else the nearest to its right (Shrivastava and Li, UAI 2014); itself when all are empty.
  size_t donor(size_t bin, size_t lane) const {
    if (!empty(bin, lane)) return bin;
    for (size_t t = 0; t < bins_.num_detours; ++t) {
      const auto candidate = static_cast<size_t>(bins_.detours[bin * bins_.num_detours + t]);
      if (!empty(candidate, lane)) return candidate;
    }
    for (size_t step = 1; step < bins_.num_bins; ++step) {
      const size_t candidate = (bin + step) % bins_.num_bins;
      if (!empty(candidate, lane)) return candidate;
    }
    return bin;
  }

  void pack(size_t rows, int32_t* codes) const {
    const size_t per_table = bins_.num_bins / bins_.num_tables;
    for (size_t table = 0; table < bins_.num_tables; ++table) {
      int32_t packed[kLanes] = {};
      for (size_t k = per_table; k-- > 0;) {
        const float* const digit = winners_.data() + (table * per_table + k) * kLanes;
        for (size_t lane = 0; lane < kLanes; ++lane)
          packed[lane] = packed[lane] << kBitsPerWinner | static_cast<int32_t>(digit[lane]);
      }
      for (size_t lane = 0; lane < rows; ++lane) codes[lane * bins_.num_tables + table] = packed[lane];
    }
  }

 private:
  const Bins& bins_;
  std::vector<float> lanes_;    // [d, kLanes]
  std::vector<float> winners_;  // [num_bins, kLanes]
  std::vector<uint16_t> occupied_;
};

// Calls member(i) for the at most `top` largest positive coordinates; among equals the first ones.
template <typename Member>
void for_each_top(const float* x, size_t d, size_t top, std::vector<uint64_t>& keys, const Member& member) {
  keys.clear();
  for (size_t i = 0; i < d; ++i)
    if (x[i] > 0.0f) {
      uint32_t bits;  // of a positive float: ordered as the float is
      std::memcpy(&bits, x + i, sizeof bits);
      keys.push_back(static_cast<uint64_t>(bits) << 32 | (UINT32_MAX - static_cast<uint32_t>(i)));
    }
  if (keys.size() > top) {
    std::nth_element(keys.begin(), keys.begin() + static_cast<std::ptrdiff_t>(top), keys.end(), std::greater<>());
    keys.resize(top);
  }
  for (const uint64_t key : keys) member(UINT32_MAX - static_cast<uint32_t>(key));
}

}  // namespace

void winner_codes(const Bins& bins, const float* x, size_t n, size_t d, int32_t* codes) {
  Round round(bins, d);
  for (size_t begin = 0; begin < n; begin += kLanes) {
    const size_t rows = std::min(kLanes, n - begin);
    round.load(x + begin * d, rows, d);
    round.find_winners();
    for (size_t bin = 0; bins.densified && bin < bins.num_bins; ++bin)
      for (size_t lane = 0; lane < rows; ++lane)
        if (round.empty(bin, lane)) round.winner(bin, lane) = round.winner(round.donor(bin, lane), lane);
    round.pack(rows, codes + begin * bins.num_tables);
  }
}

void minhash_codes(const Bins& bins, const uint8_t* labels, size_t top, const float* x, size_t n, size_t d,
                   int32_t* codes) {
  Round round(bins, d);
  std::vector<uint64_t> keys;
  std::vector<float> folded(bins.num_bins);
  for (size_t begin = 0; begin < n; begin += kLanes) {
    const size_t rows = std::min(kLanes, n - begin);
    round.clear();
    for (size_t lane = 0; lane < rows; ++lane)
      for_each_top(x + (begin + lane) * d, d, top, keys, [&](size_t i) { round.coordinate(i, lane) = 1.0f; });
    round.find_winners();
    for (size_t lane = 0; lane < rows; ++lane) {
      for (size_t bin = 0; bin < bins.num_bins; ++bin) {
        const size_t donor = round.donor(bin, lane);
        const auto first = static_cast<size_t>(round.winner(donor, lane));
        const auto element = static_cast<size_t>(bins.coordinates[donor * kBinSize + first]);
        folded[bin] = round.empty(donor, lane) ? 0.0f : static_cast<float>(labels[bin * d + element]);
      }
      for (size_t bin = 0; bin < bins.num_bins; ++bin) round.winner(bin, lane) = folded[bin];
    }
    round.pack(rows, codes + begin * bins.num_tables);
  }
}

}  // namespace ts
