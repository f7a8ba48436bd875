// The one compatibility header: everything the ops use of torch, and the checks they share.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <string>

namespace ts {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
constexpr ScalarType scalar_type_of();
template <>
constexpr ScalarType scalar_type_of<float>() {
  return ScalarType::Float;
}
template <>
constexpr ScalarType scalar_type_of<double>() {
  return ScalarType::Double;
}
template <>
constexpr ScalarType scalar_type_of<int32_t>() {
  return ScalarType::Int;
}
template <>
constexpr ScalarType scalar_type_of<int64_t>() {
  return ScalarType::Long;
}
template <>
constexpr ScalarType scalar_type_of<int8_t>() {
  return ScalarType::Char;
}
template <>
constexpr ScalarType scalar_type_of<uint8_t>() {
  return ScalarType::Byte;
}
// Kernels take bfloat16 as uint16_t; torch's own uint16 has no use here.
template <>
constexpr ScalarType scalar_type_of<uint16_t>() {
  return ScalarType::BFloat16;
}

// std::invalid_argument reaches Python as ValueError. Called before any parallel region: an exception thrown inside
// one loses its message.
inline void require(bool holds, const char* op, const char* argument, const std::string& requirement) {
  if (!holds) throw std::invalid_argument(std::string(op) + ": expected " + argument + " to be " + requirement);
}

// The data of a contiguous CPU tensor of the stated type; these ops sit behind torch_slide/_ops.py, which gives the
// user-facing messages, so here a short one is enough.
template <typename T>
const T* data(const Tensor& tensor, const char* op, const char* argument) {
  require(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == scalar_type_of<T>(), op, argument,
          "a contiguous CPU tensor of the documented dtype");
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor, const char* op, const char* argument) {
  require(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == scalar_type_of<T>(), op, argument,
          "a contiguous CPU tensor of the documented dtype");
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename T>
Tensor empty(std::initializer_list<int64_t> sizes) {
  return torch::stable::empty(sizes, scalar_type_of<T>());
}

// work(begin, end) for ranges that cover [0, n), of at least `grain` each but the last. Also how csrc/core, which knows
// no torch, gets torch's threads.
inline constexpr auto parallel = [](int64_t n, int64_t grain, const auto& work) {
  if (n > 0) torch::stable::parallel_for(0, n, grain, work);
};

}  // namespace ts
