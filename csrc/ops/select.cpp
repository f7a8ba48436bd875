#include "core/select.h"

#include <algorithm>
#include <cmath>

#include "core/random.h"
#include "ops/checks.h"
#include "ops/common.h"

namespace ts {
namespace {

struct GroupResult {
  std::vector<int64_t> ids;
  std::vector<Kind> kinds;
  Counts counts;
};

// A tail that the caller drew, with the probability of every row to be in it: the same for all rows of a class. Without
// classes each row is its own.
class CallersTail {
 public:
  CallersTail(const Tensor& rows, const std::optional<Tensor>& classes, const Tensor& inclusion, int64_t num_rows,
              const char* op)
      : rows_{checked_indices(rows, num_rows, op, "tail_rows"), rows.numel()},
        classes_(classes ? data<int32_t>(*classes, op, "tail_classes") : nullptr),
        inclusion_(data<float>(inclusion, op, "tail_inclusion")),
        num_classes_(classes ? inclusion.numel() : num_rows) {
    if (classes) require_shape(*classes, {num_rows}, op, "tail_classes");
    require_shape(inclusion, {num_classes_}, op, "tail_inclusion");
    check(rows_.rows, rows_.num_rows, op);
  }

  // Of rows that will be asked for: a check of all N classes would cost more than the selection.
  void check(const int64_t* rows, int64_t num, const char* op) const {
    for (int64_t i = 0; i < num; ++i) {
      const int64_t c = class_of(rows[i]);
      if (c < 0 || c >= num_classes_)
        reject(op, "tail_classes", "in [0, " + std::to_string(num_classes_) + ")",
               std::to_string(c) + " of row " + std::to_string(rows[i]));
      if (!(inclusion_[c] >= 0.0f && inclusion_[c] <= 1.0f))
        reject(op, "tail_inclusion", "probabilities",
               std::to_string(inclusion_[c]) + " of row " + std::to_string(rows[i]));
    }
  }

  const GivenTail& rows() const { return rows_; }
  double inclusion(int64_t row) const { return inclusion_[class_of(row)]; }

 private:
  int64_t class_of(int64_t row) const { return classes_ == nullptr ? row : classes_[row]; }

  GivenTail rows_;
  const int32_t* classes_;  // [N] or null
  const float* inclusion_;  // [num_classes]
  int64_t num_classes_;
};

std::optional<CallersTail> callers_tail(const std::optional<Tensor>& rows, const std::optional<Tensor>& classes,
                                        const std::optional<Tensor>& inclusion, int64_t num_rows, const char* op) {
  require(rows.has_value() == inclusion.has_value() && (rows.has_value() || !classes.has_value()), op,
          "tail_rows and tail_inclusion", "both given or none, and tail_classes with them alone");
  if (!rows) return std::nullopt;
  return CallersTail(*rows, classes, *inclusion, num_rows, op);
}

// How many rows a candidate stands for: the reciprocal of its probability of being one (Horvitz and Thompson 1952).
// Hubs and hits are certain. The other rows come in as a label of some sample, as often as they were labels before, or
// else in the tail. Without counts the labels are certain as well.
class Inclusion {
 public:
  Inclusion(const Counts& found, int64_t num_rows, const CallersTail* tail, const int32_t* label_counts,
            int64_t batches)
      : tail_(tail), label_counts_(label_counts), batches_(static_cast<double>(std::max<int64_t>(1, batches))) {
    const int64_t rest = num_rows - (found.labels + found.hubs + found.hits);
    in_uniform_tail_ = rest > 0 ? static_cast<double>(found.tail) / static_cast<double>(rest) : 1.0;
  }

  float log_weight(int64_t id, Kind kind) const {
    if (kind != Kind::label && kind != Kind::tail) return 0.0f;
    const double as_label = label_counts_ != nullptr ? std::min(1.0, label_counts_[id] / batches_)
                            : kind == Kind::label    ? 1.0
                                                     : 0.0;
    const double in_tail = tail_ != nullptr ? tail_->inclusion(id) : in_uniform_tail_;
    const double probability = as_label + (1.0 - as_label) * in_tail;
    return probability > 0.0 ? static_cast<float>(-std::log(probability)) : 0.0f;
  }

 private:
  const CallersTail* tail_;      // null for a uniform one
  const int32_t* label_counts_;  // [N], batches in which a row was a label; may be null
  double batches_, in_uniform_tail_;
};

uint8_t number_of(Kind kind) { return static_cast<uint8_t>(kind == Kind::certain_label ? Kind::label : kind); }

}  // namespace

// One candidate set for each group of labels: the whole batch (one group), or every sample (as many as queries).
// -> ids [total], group_offsets [G + 1], kinds [total], log_weights [total], label_positions [len(labels)]
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> select(
    const Tensor& labels, const Tensor& label_offsets, const Tensor& hubs, const Tensor& query_codes,
    const Tensor& buckets, const Tensor& bucket_counts, const Tensor& draw, const Tensor& counters,
    std::optional<Tensor> label_counts, std::optional<Tensor> tail_rows, std::optional<Tensor> tail_classes,
    std::optional<Tensor> tail_inclusion, int64_t batches, int64_t num_rows, int64_t num_active, int64_t min_uniform,
    int64_t strategy, int64_t threshold, bool sorted, bool correction, int64_t seed) {
  constexpr const char* op = "select";
  const int64_t* const label_ids = checked_indices(labels, num_rows, op, "labels");
  const int64_t* const offsets = checked_offsets(label_offsets, labels.numel(), op, "label_offsets");
  const int64_t num_groups = label_offsets.numel() - 1;
  if (num_groups < 1) reject(op, "label_offsets", "those of at least one group", "none");
  const int64_t* const hub_ids = checked_indices(hubs, num_rows, op, "hubs");
  require(query_codes.dim() == 3 && query_codes.size(0) % num_groups == 0, op, "query_codes", "[queries, L, probes]");
  require(buckets.dim() == 3 && bucket_counts.dim() == 2, op, "buckets", "[L, num_buckets, capacity]");
  const TablesQuery tables{data<int32_t>(buckets, op, "buckets"), data<int32_t>(bucket_counts, op, "bucket_counts"),
                           query_codes.size(1), buckets.size(1), buckets.size(2)};
  require(tables.num_tables <= buckets.size(0), op, "query_codes", "of the tables' L");
  const int32_t* const codes = data<int32_t>(query_codes, op, "query_codes");
  check_codes(codes, query_codes.numel(), tables.num_buckets, op, "query_codes");

  const int32_t* const counts_of_labels = label_counts ? data<int32_t>(*label_counts, op, "label_counts") : nullptr;
  if (label_counts) require_shape(*label_counts, {num_rows}, op, "label_counts");
  const std::optional<CallersTail> tail = callers_tail(tail_rows, tail_classes, tail_inclusion, num_rows, op);
  if (tail) tail->check(label_ids, labels.numel(), op);
  const Budget budget{num_rows, num_active, min_uniform, static_cast<Strategy>(strategy), threshold, sorted};
  const int64_t queries = query_codes.size(0) / num_groups, probes = query_codes.size(2);
  const auto step_seed = combine(static_cast<uint64_t>(seed), *data<int64_t>(draw, op, "draw"));
  Tensor positions = empty<int64_t>({labels.numel()});
  int64_t* const label_positions = mutable_data<int64_t>(positions, op, "label_positions");
  std::vector<GroupResult> groups(static_cast<size_t>(num_groups));
  parallel(num_groups, 1, [&](int64_t begin, int64_t end) {
    // Kept for the thread's life: clearing O(N) counters for every call would cost more than the selection.
    static thread_local Selector selector;
    for (int64_t g = begin; g < end; ++g) {
      const Group group{label_ids + offsets[g], offsets[g + 1] - offsets[g],
                        codes + g * queries * tables.num_tables * probes, queries, probes};
      GroupResult& result = groups[g];
      result.counts =
          selector.select(group, hub_ids, hubs.numel(), tables, tail ? &tail->rows() : nullptr, budget,
                          combine(step_seed, g), step_seed, result.ids, result.kinds, label_positions + offsets[g]);
    }
  });

  Tensor group_offsets = empty<int64_t>({num_groups + 1});
  int64_t* const starts = mutable_data<int64_t>(group_offsets, op, "group_offsets");
  starts[0] = 0;
  for (int64_t g = 0; g < num_groups; ++g) starts[g + 1] = starts[g] + static_cast<int64_t>(groups[g].ids.size());
  Tensor ids = empty<int64_t>({starts[num_groups]});
  Tensor kinds = empty<uint8_t>({starts[num_groups]});
  Tensor log_weights = empty<float>({starts[num_groups]});
  int64_t* const id = mutable_data<int64_t>(ids, op, "ids");
  uint8_t* const kind = mutable_data<uint8_t>(kinds, op, "kinds");
  float* const log_weight = mutable_data<float>(log_weights, op, "log_weights");
  parallel(num_groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const GroupResult& result = groups[g];
      const Inclusion inclusion(result.counts, num_rows, tail ? &*tail : nullptr, counts_of_labels, batches);
      std::copy(result.ids.begin(), result.ids.end(), id + starts[g]);
      std::transform(result.kinds.begin(), result.kinds.end(), kind + starts[g], number_of);
      std::transform(result.ids.begin(), result.ids.end(), result.kinds.begin(), log_weight + starts[g],
                     [&](int64_t row, Kind k) { return correction ? inclusion.log_weight(row, k) : 0.0f; });
    }
  });
  Counts total;
  for (const GroupResult& result : groups) {
    total.labels += result.counts.labels;
    total.hubs += result.counts.hubs;
    total.hits += result.counts.hits;
    total.tail += result.counts.tail;
    total.found_labels += result.counts.found_labels;
  }
  require(counters.numel() == 6, op, "counters", "of 6 elements");
  const int64_t last[] = {num_groups, total.labels, total.hubs, total.hits, total.tail, total.found_labels};
  std::copy(std::begin(last), std::end(last), mutable_data<int64_t>(counters, op, "counters"));
  return {ids, group_offsets, kinds, log_weights, positions};
}

STABLE_TORCH_LIBRARY_FRAGMENT(torch_slide, m) {
  m.def(
      "select(Tensor labels, Tensor label_offsets, Tensor hubs, Tensor query_codes, Tensor buckets, "
      "Tensor bucket_counts, Tensor draw, Tensor(a!) counters, Tensor? label_counts, Tensor? tail_rows, "
      "Tensor? tail_classes, Tensor? tail_inclusion, int batches, int num_rows, int num_active, int min_uniform, "
      "int strategy, int threshold, bool sorted, bool correction, int seed) "
      "-> (Tensor ids, Tensor group_offsets, Tensor kinds, Tensor log_weights, Tensor label_positions)");
}

STABLE_TORCH_LIBRARY_IMPL(torch_slide, CPU, m) { m.impl("select", TORCH_BOX(&select)); }

}  // namespace ts
