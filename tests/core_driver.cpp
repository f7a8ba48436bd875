// Calls every algorithm of csrc/core on memory of exactly the size that it may use, for memcheck and the sanitizers;
// sanitize.sh builds and runs it without torch or Python. Results are compared with oracles by the Python tests; here
// they are only read to the last bit, so that a value nobody wrote is noticed.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <numeric>
#include <vector>

#include "core/augment.h"
#include "core/by_row.h"
#include "core/candidate_loss.h"
#include "core/centroids.h"
#include "core/random.h"
#include "core/rows.h"
#include "core/sampled_linear.h"
#include "core/select.h"
#include "core/simhash.h"
#include "core/tables.h"
#include "core/winners.h"
#include "kernels/kernels.h"

namespace {

using namespace ts;

// Uninitialised, unlike a vector: memcheck tells what was written.
template <typename T>
std::unique_ptr<T[]> room(size_t n) {
  return std::unique_ptr<T[]>(new T[n]);
}

uint64_t digest = 0;

template <typename T>
void read(const T* values, size_t n) {
  const auto* const bytes = reinterpret_cast<const unsigned char*>(values);
  for (size_t i = 0; i < n * sizeof(T); ++i) digest = mix(digest ^ bytes[i]);
}

template <typename T>
void read(const std::vector<T>& values) {
  read(values.data(), values.size());
}

std::vector<float> noise(size_t n, uint64_t seed) {
  const Stream stream(seed, 1);
  std::vector<float> values(n);
  for (size_t i = 0; i < n; ++i) values[i] = static_cast<float>(stream.below(i, 2001)) / 1000.0f - 1.0f;
  return values;
}

template <typename T>
std::vector<T> below(size_t n, uint64_t bound, uint64_t seed) {
  const Stream stream(seed, 2);
  std::vector<T> values(n);
  for (size_t i = 0; i < n; ++i) values[i] = static_cast<T>(stream.below(i, bound));
  return values;
}

std::vector<float> packed(const std::vector<float>& matrix, size_t d, size_t columns) {
  std::vector<float> panels(panels_for(columns) * d * kPanelWidth);
  for (size_t p = 0; p < panels_for(columns); ++p)
    pack_panel(matrix.data() + p * kPanelWidth, d, columns, std::min(kPanelWidth, columns - p * kPanelWidth),
               panels.data() + p * d * kPanelWidth);
  return panels;
}

void hashing(size_t n, size_t d) {
  constexpr size_t tables = 3, bits = 5, probes = 4, centroids = 32;
  const std::vector<float> x = noise(n * d, n + d), bias = noise(n, d);
  const Rows rows{x.data(), bias.data(), d};
  const auto augmented = room<float>(n * (d + 2));
  for (size_t i = 0; i < n; ++i) rows.augment(i, 1e3 + rows.norm(i), augmented.get() + i * (d + 2));
  read(augmented.get(), n * (d + 2));

  const std::vector<float> projections = packed(noise(d * tables * bits, 3), d, tables * bits);
  const auto codes = room<int32_t>(n * tables * probes);
  const std::vector<uint32_t> flips = flips_by_size(bits, probes);
  SimHash{{projections.data(), d, panels_for(tables * bits)}, tables, bits, flips}.codes(x.data(), n, codes.get());
  read(codes.get(), n * tables * probes);

  std::vector<float> means;
  for (size_t table = 0; table < tables; ++table) {
    const std::vector<float> one = packed(noise(d * centroids, table), d, centroids);
    means.insert(means.end(), one.begin(), one.end());
  }
  const Centroids nearest{{means.data(), d, tables * panels_for(centroids)}, tables, centroids};
  nearest.codes(x.data(), n, probes, codes.get());
  read(codes.get(), n * tables * probes);

  const std::vector<int32_t> clusters = below<int32_t>(n, centroids, 5);
  const auto sums = room<float>(centroids * d);
  Members(clusters.data(), n, centroids).sum(x.data(), d, 0, centroids, sums.get());
  read(sums.get(), centroids * d);

  constexpr size_t bins = 2 * tables, detours = 3;
  const std::vector<int32_t> coordinates = below<int32_t>(bins * kBinSize, d, 6);
  const std::vector<int32_t> roads = below<int32_t>(bins * detours, bins, 7);
  const std::vector<uint8_t> labels = below<uint8_t>(bins * d, 8, 8);
  for (const bool densified : {false, true}) {
    const Bins set{coordinates.data(), bins, tables, densified, roads.data(), detours};
    winner_codes(set, x.data(), n, d, codes.get());
    read(codes.get(), n * tables);
    minhash_codes(set, labels.data(), d / 2, x.data(), n, d, codes.get());
    read(codes.get(), n * tables);
  }
}

void tables_and_selection(int64_t n, int64_t capacity, bool sorted) {
  constexpr int64_t num_tables = 3, num_buckets = 8, probes = 2, queries = 5;
  std::vector<int32_t> codes = below<int32_t>(num_tables * n, num_buckets, 11);
  const auto buckets = room<int32_t>(num_tables * num_buckets * capacity);
  const auto counts = room<int32_t>(num_tables * num_buckets);
  const TablesView view{codes.data(), buckets.get(), counts.get(), num_tables, n, num_buckets, capacity};
  for (const Policy policy : {Policy::reservoir, Policy::fifo})
    for (int64_t table = 0; table < num_tables; ++table) {
      fill_buckets(view, table, 0, num_buckets, nullptr, policy, 12);
      const std::vector<int64_t> moved{0, n / 2, n - 1};
      const std::vector<int32_t> new_codes = below<int32_t>(moved.size() * num_tables, num_buckets, 13);
      std::vector<uint8_t> touched(num_buckets, 0);
      move_rows(view, table, moved.data(), static_cast<int64_t>(moved.size()), new_codes.data(), touched.data());
      fill_buckets(view, table, 0, num_buckets, touched.data(), policy, 12);
    }
  read(buckets.get(), num_tables * num_buckets * capacity);
  read(counts.get(), num_tables * num_buckets);

  Selector selector;
  const std::vector<int64_t> labels = below<int64_t>(7, n, 14), hubs = {0, n - 1};
  const std::vector<int32_t> wanted = below<int32_t>(queries * num_tables * probes, num_buckets, 15);
  const std::vector<int64_t> drawn = below<int64_t>(9, n, 18);
  const GivenTail given{drawn.data(), static_cast<int64_t>(drawn.size())};
  const TablesQuery query{buckets.get(), counts.get(), num_tables, num_buckets, capacity};
  for (const Strategy strategy : {Strategy::vanilla, Strategy::topk, Strategy::threshold})
    for (const int64_t num_active : {int64_t{1}, n / 3 + 1, n}) {
      const Group group{labels.data(), static_cast<int64_t>(labels.size()), wanted.data(), queries, probes};
      std::vector<int64_t> ids;
      std::vector<Kind> kinds;
      const auto positions = room<int64_t>(labels.size());
      const Budget budget{n, num_active, num_active / 4, strategy, 2, sorted};
      for (const GivenTail* tail : {static_cast<const GivenTail*>(nullptr), &given}) {
        selector.select(group, hubs.data(), static_cast<int64_t>(hubs.size()), query, tail, budget, 16, 17, ids, kinds,
                        positions.get());
        read(ids);
        read(kinds);
        read(positions.get(), labels.size());
      }
    }
}

constexpr auto in_series = [](int64_t n, int64_t, const auto& work) {
  for (int64_t i = 0; i < n; ++i) work(i, i + 1);
};

struct Grouped {
  Grouped(const std::vector<int64_t>& ids, int64_t num_keys) {
    const RowSort sort(ids.data(), static_cast<int64_t>(ids.size()), num_keys, in_series);
    num_rows = sort.num_rows();
    rows = room<int64_t>(num_rows);
    starts = room<int64_t>(num_rows + 1);
    entries = room<int32_t>(ids.size());
    sort.write(rows.get(), starts.get(), entries.get(), in_series);
  }
  ByRow view() const { return {rows.get(), starts.get(), entries.get(), num_rows}; }

  int64_t num_rows;
  std::unique_ptr<int64_t[]> rows, starts;
  std::unique_ptr<int32_t[]> entries;
};

template <typename Value, typename Row>
void sampled(int64_t samples, int64_t active, int64_t d, const std::vector<Row>& weight, const std::vector<Row>& bias) {
  const int64_t n = static_cast<int64_t>(bias.size()), nnz = samples * active;
  const std::vector<float> drawn = noise(samples * d, 21);
  const std::vector<Value> hidden(drawn.begin(), drawn.end());
  const std::vector<int64_t> ids = below<int64_t>(nnz, n, 22);
  std::vector<int32_t> of_sample(nnz);
  const Grouped grouped(ids, n);
  for (int64_t i = 0; i < nnz; ++i) of_sample[i] = static_cast<int32_t>(grouped.entries[i] / active);
  const SampledView<Value, Row> view{hidden.data(), weight.data(), grouped.view(), of_sample.data(), d};
  const int64_t distinct = view.uses.num_rows;

  const auto values = room<Value>(nnz);
  sampled_dots(view, bias.data(), 0, distinct, values.get());
  read(values.get(), nnz);
  const auto grad_rows = room<Value>(distinct * d), grad_bias = room<Value>(distinct);
  std::vector<Value> grad_hidden(samples * d, Value(0));
  sampled_gradients(view, values.get(), 0, distinct, grad_rows.get(), grad_bias.get(), grad_hidden.data());
  read(grad_rows.get(), distinct * d);
  read(grad_bias.get(), distinct);
  read(grad_hidden);
}

std::vector<uint16_t> shortened(const std::vector<float>& values) {
  std::vector<uint16_t> upper(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &values[i], sizeof bits);
    upper[i] = static_cast<uint16_t>(bits >> 16);
  }
  return upper;
}

template <typename T>
void losses(int64_t size, int64_t num_labels) {
  const std::vector<float> drawn = noise(size, 31);
  std::vector<T> logits(drawn.begin(), drawn.end());
  const std::vector<T> weights(size, T(0.5)), shares(num_labels, T(1) / T(num_labels + 1));
  std::vector<int64_t> positions(num_labels);
  std::iota(positions.begin(), positions.end(), 0);
  const RowLabels<T> labels{positions.data(), shares.data(), num_labels};
  const auto scratch = room<T>(num_labels);
  const T results[] = {
      softmax_cross_entropy<T>({logits.data(), weights.data(), size}, nullptr, labels, scratch.get()),
      softmax_cross_entropy<T>({logits.data(), weights.data(), size}, weights.data(), labels, scratch.get()),
      bce_with_logits<T>({logits.data(), weights.data(), size}, labels, nullptr, nullptr, scratch.get()),
      bce_with_logits<T>({logits.data(), weights.data(), size}, labels, weights.data(), weights.data(), scratch.get()),
  };
  read(results, std::size(results));
  read(logits);
}

void row_updates(size_t n, size_t d) {
  const std::vector<int64_t> ids = below<int64_t>(3 * n, n, 41);
  const std::vector<float> values = noise(3 * n * d, 42);
  const Grouped grouped(ids, static_cast<int64_t>(n));
  const auto distinct = static_cast<size_t>(grouped.num_rows);
  const auto sums = room<float>(distinct * d);
  sum_entries(grouped.view(), values.data(), nullptr, nullptr, d, sums.get(), 0, grouped.num_rows);
  read(sums.get(), distinct * d);

  const AdamScalars adam{1.0f, 0.1f, 0.99f, 0.9f, 0.1f, 0.99f, 0.01f, 0.1f, 1.0f, 1e-8f};
  const auto update = [&](const auto& drawn) {
    using T = std::decay_t<decltype(drawn[0])>;
    std::vector<T> weight(drawn.begin(), drawn.begin() + static_cast<std::ptrdiff_t>(n * d)), first = weight,
                                                                                              second = weight;
    const RowGrad<T> grad{grouped.rows.get(), drawn.data(), d};
    std::vector<float> total(n, 0.0f);
    lazy_adam_rows<T>(adam, weight.data(), first.data(), second.data(), grad, 7, 0, distinct);
    rowwise_adam_rows<T>(adam, weight.data(), first.data(), total.data(), grad, 7, 0, distinct);
    rowwise_adagrad_rows<T>({1.0f, 0.1f, 0.1f, 1e-8f}, weight.data(), total.data(), grad, 7, 0, distinct);
    sgd_rows<T>({1.0f, 0.1f, 0.1f, 0.9f, 0.7f, true}, weight.data(), first.data(), grad, 7, 0, distinct);
    sgd_rows<T>({1.0f, 0.0f, 0.1f, 0.0f, 1.0f, false}, weight.data(), nullptr, grad, 7, 0, distinct);
    read(weight);
    read(second);
    read(total);
  };
  update(noise(3 * n * d, 43));
  update(below<uint16_t>(3 * n * d, 0x4000, 44));
}

}  // namespace

int main() {
  if (!isa_error().empty()) {
    std::puts(isa_error().c_str());
    return 2;
  }
  for (const size_t d : {1, 7, 16, 37, 130})
    for (const size_t n : {1, 17, 50}) {
      hashing(n, d);
      row_updates(n, d);
      const std::vector<float> weight = noise(n * d, 51), bias = noise(n, 52);
      const auto samples = static_cast<int64_t>(n % 5 + 1), width = static_cast<int64_t>(d);
      sampled<float, float>(samples, 9, width, weight, bias);
      sampled<float, uint16_t>(samples, 9, width, shortened(weight), shortened(bias));
      sampled<double, double>(samples, 9, width, {weight.begin(), weight.end()}, {bias.begin(), bias.end()});
    }
  for (const int64_t n : {1, 2, 31, 400})
    for (const int64_t capacity : {1, 8, 400}) {
      tables_and_selection(n, capacity, true);
      tables_and_selection(n, capacity, false);
    }
  for (const int64_t size : {1, 15, 16, 33, 300, 5000}) {
    losses<float>(size, 1);
    losses<double>(size, size / 2);
  }
  std::printf("%s: %016llx\n", kernels().isa, static_cast<unsigned long long>(digest));
}
