#include "core/centroids.h"

#include <array>
#include <limits>

#include "kernels/kernels.h"

namespace ts {
namespace {

// The best centroids of every row of a block so far, best first.
class Leaders {
 public:
  explicit Leaders(size_t probes) : probes_(probes), values_(kRowBlock * probes), numbers_(kRowBlock * probes) {}

  void clear() {
    bounds_.fill(-std::numeric_limits<float>::infinity());
    std::fill(values_.begin(), values_.end(), -std::numeric_limits<float>::infinity());
    for (size_t i = 0; i < numbers_.size(); ++i) numbers_[i] = static_cast<int32_t>(i % probes_);
  }

  const float* bounds() const { return bounds_.data(); }
  const int32_t* numbers(size_t row) const { return numbers_.data() + row * probes_; }

  // Centroids arrive in ascending order, so that among equals the earlier one stays ahead.
  void offer(size_t row, float value, size_t number) {
    float* const values = values_.data() + row * probes_;
    int32_t* const numbers = numbers_.data() + row * probes_;
    if (!(value > bounds_[row])) return;
    size_t at = probes_ - 1;
    for (; at > 0 && value > values[at - 1]; --at) {
      values[at] = values[at - 1];
      numbers[at] = numbers[at - 1];
    }
    values[at] = value;
    numbers[at] = static_cast<int32_t>(number);
    bounds_[row] = values[probes_ - 1];
  }

 private:
  size_t probes_;
  std::array<float, kRowBlock> bounds_;  // what a centroid has to exceed
  std::vector<float> values_;
  std::vector<int32_t> numbers_;
};

}  // namespace

void Centroids::codes(const float* x, size_t n, size_t probes, int32_t* codes) const {
  const HashKernels& kernel = kernels().hash;
  const size_t panels_per_table = panels.count / num_tables;
  std::array<float, kRowBlock * kPanelWidth> y;
  std::array<uint32_t, kRowBlock> masks;
  Leaders leaders(probes);
  for (size_t begin = 0; begin < n; begin += kRowBlock) {
    const size_t rows = std::min(kRowBlock, n - begin);
    for (size_t table = 0; table < num_tables; ++table) {
      leaders.clear();
      for (size_t p = 0; p < panels_per_table; ++p) {
        const size_t first = p * kPanelWidth, width = std::min(kPanelWidth, per_table - first);
        kernel.project(x + begin * panels.d, rows, panels.d, panels[table * panels_per_table + p], y.data(),
                       kPanelWidth);
        kernel.above(y.data(), rows, kPanelWidth, leaders.bounds(), masks.data(), 1);
        for (size_t r = 0; r < rows; ++r)
          for (uint32_t mask = masks[r] & (UINT32_MAX >> (kPanelWidth - width)); mask != 0; mask &= mask - 1) {
            const auto c = static_cast<size_t>(__builtin_ctz(mask));
            leaders.offer(r, y[r * kPanelWidth + c], first + c);
          }
      }
      for (size_t r = 0; r < rows; ++r)
        std::copy_n(leaders.numbers(r), probes, codes + ((begin + r) * num_tables + table) * probes);
    }
  }
}

Members::Members(const int32_t* codes, size_t n, size_t num_clusters) : offsets(num_clusters + 1), rows(n) {
  for (size_t i = 0; i < n; ++i) ++offsets[static_cast<size_t>(codes[i]) + 1];
  for (size_t c = 0; c < num_clusters; ++c) offsets[c + 1] += offsets[c];
  std::vector<size_t> next(offsets.begin(), offsets.end() - 1);
  for (size_t i = 0; i < n; ++i) rows[next[static_cast<size_t>(codes[i])]++] = i;
}

void Members::sum(const float* x, size_t d, size_t begin, size_t end, float* sums) const {
  for (size_t c = begin; c < end; ++c) {
    float* const total = sums + c * d;
    std::fill(total, total + d, 0.0f);
    for (size_t at = offsets[c]; at < offsets[c + 1]; ++at)
      for (size_t i = 0; i < d; ++i) total[i] += x[rows[at] * d + i];
  }
}

}  // namespace ts
