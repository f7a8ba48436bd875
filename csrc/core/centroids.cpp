#include "core/centroids.h"

#include <algorithm>
#include <limits>

#include "kernels/kernels.h"

namespace ts {
namespace {

// The best columns for every row of a block so far, best first.
class Leaders {
 public:
  Leaders(size_t rows, size_t probes)
      : probes_(probes),
        bounds_(rows),
        values_(rows * probes),
        numbers_(rows * probes),
        y_(rows * kPanelWidth),
        masks_(rows) {}

  void clear() {
    std::fill(bounds_.begin(), bounds_.end(), -std::numeric_limits<float>::infinity());
    std::fill(values_.begin(), values_.end(), -std::numeric_limits<float>::infinity());
    for (size_t i = 0; i < numbers_.size(); ++i) numbers_[i] = static_cast<int32_t>(i % probes_);
  }

  const int32_t* numbers(size_t row) const { return numbers_.data() + row * probes_; }

  // Inner products of rows [n, d] with the `width` columns of a panel, of which the first has the number `first`; row i
  // is known here as row_of(i). Columns have to come in ascending order: among equals the earlier one stays ahead.
  template <typename RowOf>
  void meet(const float* rows, size_t n, size_t d, const float* panel, size_t first, size_t width,
            const RowOf& row_of) {
    const HashKernels& kernel = kernels().hash;
    kernel.project(rows, n, d, panel, y_.data(), kPanelWidth);
    bounds_met_.resize(n);
    for (size_t i = 0; i < n; ++i) bounds_met_[i] = bounds_[row_of(i)];
    kernel.above(y_.data(), n, kPanelWidth, bounds_met_.data(), masks_.data(), 1);
    for (size_t i = 0; i < n; ++i)
      for (uint32_t mask = masks_[i] & (UINT32_MAX >> (kPanelWidth - width)); mask != 0; mask &= mask - 1) {
        const auto c = static_cast<size_t>(__builtin_ctz(mask));
        offer(row_of(i), y_[i * kPanelWidth + c], first + c);
      }
  }

 private:
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

  size_t probes_;
  std::vector<float> bounds_;  // what a column has to exceed
  std::vector<float> values_;
  std::vector<int32_t> numbers_;
  std::vector<float> y_;
  std::vector<float> bounds_met_;
  std::vector<uint32_t> masks_;
};

constexpr auto kInOrder = [](size_t i) { return i; };

// The columns of one table's panels that lead for each of few rows.
void meet_all(Leaders& leaders, const float* rows, size_t n, const Panels& panels, size_t table, size_t num_tables,
              size_t columns) {
  const size_t per_table = panels.count / num_tables;
  leaders.clear();
  for (size_t p = 0; p < per_table; ++p) {
    const size_t first = p * kPanelWidth;
    leaders.meet(rows, n, panels.d, panels[table * per_table + p], first, std::min(kPanelWidth, columns - first),
                 kInOrder);
  }
}

}  // namespace

void Centroids::codes(const float* x, size_t n, size_t probes, int32_t* codes) const {
  if (guides.count == 0)
    all_codes(x, n, probes, codes);
  else
    guided_codes(x, n, probes, codes);
}

void Centroids::all_codes(const float* x, size_t n, size_t probes, int32_t* codes) const {
  Leaders leaders(kRowBlock, probes);
  for (size_t begin = 0; begin < n; begin += kRowBlock) {
    const size_t rows = std::min(kRowBlock, n - begin);
    for (size_t table = 0; table < num_tables; ++table) {
      meet_all(leaders, x + begin * panels.d, rows, panels, table, num_tables, per_table);
      for (size_t r = 0; r < rows; ++r)
        std::copy_n(leaders.numbers(r), probes, codes + ((begin + r) * num_tables + table) * probes);
    }
  }
}

// The rows of a large block that look at one group are multiplied with its panel together.
void Centroids::guided_codes(const float* x, size_t n, size_t probes, int32_t* codes) const {
  constexpr size_t most_rows = 32 * kRowBlock;
  const size_t d = panels.d, groups = per_table / kPanelWidth, looked_at = std::min(groups, groups_for(probes));
  const size_t room = std::min(n, most_rows);
  Leaders nearest(kRowBlock, looked_at), leaders(room, probes);
  std::vector<int32_t> group_of(room * looked_at);
  std::vector<float> packed(room * d);
  for (size_t begin = 0; begin < n; begin += most_rows) {
    const size_t rows = std::min(most_rows, n - begin);
    const float* const block = x + begin * d;
    for (size_t table = 0; table < num_tables; ++table) {
      for (size_t first = 0; first < rows; first += kRowBlock) {
        const size_t some = std::min(kRowBlock, rows - first);
        meet_all(nearest, block + first * d, some, guides, table, num_tables, groups);
        for (size_t r = 0; r < some; ++r)
          std::copy_n(nearest.numbers(r), looked_at, group_of.data() + (first + r) * looked_at);
      }
      const Members members(group_of.data(), rows * looked_at, groups);
      leaders.clear();
      for (size_t group = 0; group < groups; ++group) {
        const size_t* const members_here = members.rows.data() + members.offsets[group];
        const size_t count = members.offsets[group + 1] - members.offsets[group];
        const auto row_of = [&](size_t i) { return members_here[i] / looked_at; };
        for (size_t i = 0; i < count; ++i) std::copy_n(block + row_of(i) * d, d, packed.data() + i * d);
        leaders.meet(packed.data(), count, d, panels[table * groups + group], group * kPanelWidth, kPanelWidth, row_of);
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
