// Randomness as a pure function of (seed, counters): runs repeat, ranks agree and thread counts do not matter.
#pragma once
#include <cstdint>

namespace ts {

// The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
inline uint64_t mix(uint64_t x) {
  x ^= x >> 30;
  x *= 0xbf58476d1ce4e5b9ull;
  x ^= x >> 27;
  x *= 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

inline uint64_t combine(uint64_t seed, uint64_t counter) { return mix(seed + 0x9e3779b97f4a7c15ull * (counter + 1)); }

// A stream is a seed with an own purpose, so that two uses of one seed never share their numbers.
class Stream {
 public:
  Stream(uint64_t seed, uint64_t purpose) : key_(combine(seed, purpose)) {}
  Stream fork(uint64_t index) const { return Stream(combine(key_, index)); }
  uint64_t bits(uint64_t counter) const { return combine(key_, counter); }
  // Uniform in [0, bound): multiply-shift; its bias is below bound / 2^64 (Lemire 2019).
  uint64_t below(uint64_t counter, uint64_t bound) const {
    return static_cast<uint64_t>((static_cast<unsigned __int128>(bits(counter)) * bound) >> 64);
  }

 private:
  explicit Stream(uint64_t key) : key_(key) {}
  uint64_t key_;
};

}  // namespace ts
