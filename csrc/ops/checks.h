// Checks that several ops share. They run before anything is changed, and outside parallel regions.
#pragma once
#include <algorithm>
#include <limits>
#include <string>
#include <type_traits>

#include "ops/common.h"

namespace ts {

template <typename Exception = std::invalid_argument>
[[noreturn]] void reject(const char* op, const char* argument, const std::string& requirement,
                         const std::string& actual) {
  throw Exception(std::string(op) + ": expected " + argument + " to be " + requirement + ", got " + actual);
}

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i > 0 ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

inline void require_shape(const Tensor& tensor, std::initializer_list<int64_t> sizes, const char* op,
                          const char* argument) {
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  std::string wanted;
  int64_t dim = 0;
  for (const int64_t size : sizes) {
    same = same && tensor.size(dim) == size;
    wanted += (dim++ > 0 ? ", " : "") + std::to_string(size);
  }
  if (!same) reject(op, argument, "of shape [" + wanted + "]", shape_of(tensor));
}

// Offsets of consecutive lists over `total` elements: int64 [lists + 1], ascending from 0 to total.
inline const int64_t* checked_offsets(const Tensor& tensor, int64_t total, const char* op, const char* argument) {
  const int64_t* const offsets = data<int64_t>(tensor, op, argument);
  const int64_t last = tensor.numel() - 1;
  if (tensor.dim() != 1 || last < 0) reject(op, argument, "a vector of at least one offset", shape_of(tensor));
  if (offsets[0] != 0) reject(op, argument, "ascending from 0", std::to_string(offsets[0]) + " at first");
  for (int64_t i = 0; i < last; ++i)
    if (offsets[i] > offsets[i + 1])
      reject(op, argument, "ascending",
             std::to_string(offsets[i]) + " before " + std::to_string(offsets[i + 1]) + " at " + std::to_string(i));
  if (offsets[last] != total) reject(op, argument, "ending at " + std::to_string(total), std::to_string(offsets[last]));
  return offsets;
}

// A number outside [0, bound) is negative, or its distance from the last one is. All signs at once, without a branch
// for each, so that the compiler makes vector code of it on every processor: these lists are long.
template <typename Int>
bool all_below(const Int* numbers, int64_t num, int64_t bound, Int least = 0) {
  using Bits = std::make_unsigned_t<Int>;
  const auto last = static_cast<Bits>(std::min<int64_t>(bound - 1, std::numeric_limits<Int>::max()));
  Bits signs = bound > 0 || num == 0 ? 0 : ~Bits{0};
  for (int64_t i = 0; i < num; ++i)
    signs |= (static_cast<Bits>(numbers[i]) - static_cast<Bits>(least)) | (last - static_cast<Bits>(numbers[i]));
  return static_cast<Int>(signs) >= 0;
}

// Numbers in [0, bound).
inline const int64_t* checked_indices(const Tensor& tensor, int64_t bound, const char* op, const char* argument) {
  const int64_t* const indices = data<int64_t>(tensor, op, argument);
  if (tensor.dim() != 1) reject(op, argument, "a vector", shape_of(tensor));
  const int64_t num = tensor.numel();
  if (all_below(indices, num, bound)) return indices;
  for (int64_t i = 0; i < num; ++i)
    if (indices[i] < 0 || indices[i] >= bound)
      reject<std::out_of_range>(op, argument, "in [0, " + std::to_string(bound) + ")",
                                std::to_string(indices[i]) + " at " + std::to_string(i));
  return indices;
}

constexpr int32_t kNoBucket = -1;

// Bucket numbers, or where least is kNoBucket that as well.
inline void check_codes(const int32_t* codes, int64_t num, int64_t num_buckets, const char* op, const char* argument,
                        int32_t least = 0) {
  if (all_below(codes, num, num_buckets, least)) return;
  for (int64_t i = 0; i < num; ++i)
    if (codes[i] < least || codes[i] >= num_buckets)
      reject(op, argument, "bucket numbers in [" + std::to_string(least) + ", " + std::to_string(num_buckets) + ")",
             std::to_string(codes[i]) + " at " + std::to_string(i));
}

}  // namespace ts
