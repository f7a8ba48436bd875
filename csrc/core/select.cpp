#include "core/select.h"

#include <algorithm>
#include <limits>

#include "core/random.h"

namespace ts {
namespace {
enum Purpose : uint64_t { kTieBreak = 2, kTail = 3, kTableOrder = 4, kLabelTies = 5, kBucketTies = 6 };

// At millions of rows their votes lie in memory, not in a cache: whoever walks a list of rows asks for those a few
// places ahead.
constexpr size_t kRowsAhead = 16;
}  // namespace

void Selector::reserve(int64_t num_rows, int64_t num_buckets) {
  if (static_cast<int64_t>(votes_.size()) < num_rows) votes_.resize(num_rows, 0);
  if (static_cast<int64_t>(present_.size()) * 64 < num_rows) present_.resize((num_rows + 63) / 64, 0);
  if (static_cast<int64_t>(tally_.size()) < num_buckets) tally_.resize(num_buckets, 0);
}

uint32_t Selector::touched_votes(size_t i) const {
  if (i + kRowsAhead < touched_.size()) prefetch(touched_[i + kRowsAhead]);
  return votes_[touched_[i]];
}

void Selector::take(int64_t id, Kind kind) {
  votes_[id] |= kTaken;
  chosen_.push_back({static_cast<int32_t>(id), kind});
}

// A bucket that many queries probe is read once: its members get all those votes together. Buckets with most votes come
// first (any order among equals), until most_members are read: the members of all others have a vote or two to add.
// With `by_rank` the likeliest of a query's P probes has P votes, the last one has one; else every probe has one.
void Selector::vote(const Group& group, const TablesQuery& tables, bool by_rank, int64_t most_members, uint64_t seed) {
  for (int64_t q = 0; q < group.num_queries; ++q)
    for (int64_t table = 0; table < tables.num_tables; ++table)
      for (int64_t probe = 0; probe < group.probes; ++probe) {
        const int32_t code = group.codes[(q * tables.num_tables + table) * group.probes + probe];
        const int64_t bucket = table * tables.num_buckets + code;
        if (tally_[bucket] == 0) probed_.push_back({0, bucket});
        tally_[bucket] += by_rank ? static_cast<uint32_t>(group.probes - probe) : 1u;
      }
  const auto size_of = [&](int64_t bucket) { return std::min<int64_t>(tables.counts[bucket], tables.capacity); };
  int64_t left = most_members, members_probed = 0;
  for (const Probed& probed : probed_) members_probed += size_of(probed.bucket);
  if (members_probed > left) {
    const Stream luck(seed, kBucketTies);
    for (Probed& probed : probed_) probed.rank = uint64_t{tally_[probed.bucket]} << 32 | luck.bits(probed.bucket) >> 32;
    std::sort(probed_.begin(), probed_.end(), [](const Probed& a, const Probed& b) { return a.rank > b.rank; });
  }
  for (size_t i = 0; i < probed_.size(); ++i) {
    constexpr size_t ahead = 8;
    if (i + ahead < probed_.size()) __builtin_prefetch(tables.buckets + probed_[i + ahead].bucket * tables.capacity);
    const int64_t bucket = probed_[i].bucket;
    const uint32_t votes = tally_[bucket];
    tally_[bucket] = 0;
    if (left <= 0) continue;
    const auto size = static_cast<size_t>(size_of(bucket));
    left -= static_cast<int64_t>(size);
    const int32_t* const members = tables.buckets + bucket * tables.capacity;
    for (size_t j = 0; j < size; ++j) {
      if (j + kRowsAhead < size) prefetch(members[j + kRowsAhead]);
      uint32_t& row_votes = votes_[members[j]];
      if (row_votes == 0) touched_.push_back(members[j]);
      row_votes += votes;
    }
  }
  probed_.clear();
}

// SLIDE's vanilla sampling: whole buckets, tables in random order, until enough are found.
void Selector::collect_in_table_order(const Group& group, const TablesQuery& tables, int64_t wanted, uint64_t seed) {
  std::vector<int64_t> order(tables.num_tables);
  const Stream stream(seed, kTableOrder);
  for (int64_t i = 0; i < tables.num_tables; ++i) {
    const auto j = static_cast<int64_t>(stream.below(i, i + 1));
    order[i] = order[j];
    order[j] = i;
  }
  for (const int64_t table : order)
    for (int64_t q = 0; q < group.num_queries; ++q)
      for (int64_t probe = 0; probe < group.probes; ++probe) {
        const int32_t code = group.codes[(q * tables.num_tables + table) * group.probes + probe];
        const int64_t bucket = table * tables.num_buckets + code;
        const int64_t size = std::min<int64_t>(tables.counts[bucket], tables.capacity);
        const int32_t* const members = tables.buckets + bucket * tables.capacity;
        for (int64_t j = 0; j < size; ++j) {
          if (taken(members[j])) {
            votes_[members[j]] |= kSeen;
            continue;
          }
          if (wanted-- <= 0) return;
          take(members[j], Kind::hit);
        }
      }
}

// Most votes first. Among rows with just enough votes each is as likely as any other: selection sampling (Knuth, TAOCP
// 2, 3.4.2, algorithm S) in the order of discovery, from random numbers that change from draw to draw.
Selector::Lottery Selector::rank_hits(int64_t wanted, const Budget& budget, uint64_t seed) {
  const uint32_t least = budget.strategy == Strategy::threshold ? static_cast<uint32_t>(budget.threshold) : 1u;
  if (wanted <= 0) return {kVotes, 0, 1};
  rows_with_.clear();
  int64_t found = 0;
  if (static_cast<int64_t>(touched_.size()) > wanted)
    for (size_t i = 0; i < touched_.size(); ++i) {
      const uint32_t votes = touched_votes(i);
      if ((votes & kTaken) != 0 || votes < least) continue;
      if (votes >= rows_with_.size()) rows_with_.resize(votes + 1, 0);
      ++rows_with_[votes];
      ++found;
    }

  const bool too_many = found > wanted;
  uint32_t enough = least;
  int64_t tied = wanted;  // places for rows with just enough votes
  if (too_many)
    for (enough = static_cast<uint32_t>(rows_with_.size() - 1); rows_with_[enough] < tied; --enough)
      tied -= rows_with_[enough];
  int64_t undecided = too_many ? rows_with_[enough] : 0;
  const Lottery lottery = too_many ? Lottery{enough, tied, undecided} : Lottery{least - 1, 0, 1};
  const Stream stream(seed, kTieBreak);
  for (size_t i = 0; i < touched_.size(); ++i) {
    const uint32_t votes = touched_votes(i);
    if ((votes & kTaken) != 0 || votes < enough) continue;
    if (too_many && votes == enough) {
      const bool chosen = static_cast<int64_t>(stream.below(undecided, undecided)) < tied;
      --undecided;
      if (!chosen) continue;
      --tied;
    }
    take(touched_[i], Kind::hit);
  }
  return lottery;
}

void Selector::draw_tail(int64_t wanted, int64_t num_rows, uint64_t seed) {
  const int64_t rest = num_rows - static_cast<int64_t>(chosen_.size());
  wanted = std::min(wanted, rest);
  const Stream stream(seed, kTail);
  if (wanted * 2 <= rest && rest * 2 >= num_rows) {
    // At most three quarters of the rows are ever taken here, so that four attempts a row do on average.
    for (uint64_t attempt = 0; wanted > 0; ++attempt) {
      const auto id = static_cast<int64_t>(stream.below(attempt, num_rows));
      if (taken(id)) continue;
      take(id, Kind::tail);
      --wanted;
    }
    return;
  }
  // Selection sampling (Knuth, TAOCP 2, 3.4.2, algorithm S): one pass over the rows that are left.
  int64_t left = rest;
  for (int64_t id = 0; wanted > 0; ++id) {
    if (taken(id)) continue;
    if (static_cast<int64_t>(stream.below(id, left)) < wanted) {
      take(id, Kind::tail);
      --wanted;
    }
    --left;
  }
}

void Selector::take_tail(const GivenTail& tail) {
  for (int64_t i = 0; i < tail.num_rows; ++i)
    if (!taken(tail.rows[i])) take(tail.rows[i], Kind::tail);
}

// By a bitmap of the rows: a pass over N / 64 words costs less than comparisons.
void Selector::sort_chosen(int64_t num_rows) {
  for (const Candidate& candidate : chosen_) {
    present_[candidate.id / 64] |= uint64_t{1} << candidate.id % 64;
    votes_[candidate.id] = static_cast<uint32_t>(candidate.kind);
  }
  size_t next = 0;
  for (int64_t word = 0; word * 64 < num_rows; ++word) {
    for (uint64_t bits = present_[word]; bits != 0; bits &= bits - 1) {
      const auto id = static_cast<int32_t>(word * 64 + __builtin_ctzll(bits));
      chosen_[next++] = {id, static_cast<Kind>(votes_[id])};
    }
    present_[word] = 0;
  }
}

Counts Selector::select(const Group& group, const int64_t* hubs, int64_t num_hubs, const TablesQuery& tables,
                        const GivenTail* tail, const Budget& budget, uint64_t seed, uint64_t tail_seed,
                        std::vector<int64_t>& ids, std::vector<Kind>& kinds, int64_t* label_positions) {
  reserve(budget.num_rows, tables.num_tables * tables.num_buckets);
  chosen_.clear();
  touched_.clear();
  const bool by_votes = budget.strategy != Strategy::vanilla;
  if (by_votes && tables.num_tables > 0) {
    // Whoever asks for all rows with enough votes wants every vote counted, and each as one.
    const bool all = budget.strategy == Strategy::threshold;
    const int64_t wanted = std::max<int64_t>(budget.num_active - budget.min_uniform, 1);
    vote(group, tables, !all, all ? std::numeric_limits<int64_t>::max() : kMembersPerHit * wanted, seed);
  }

  Counts counts;
  for (int64_t i = 0; i < group.num_labels; ++i) {
    const int64_t label = group.labels[i];
    if (taken(label)) continue;
    take(label, Kind::label);
    ++counts.labels;
  }
  const int64_t hub_budget = std::min(num_hubs, budget.num_active - budget.min_uniform);
  for (int64_t i = 0; i < hub_budget; ++i) {
    const int64_t hub = hubs[i];
    if (taken(hub)) {
      votes_[hub] |= kHub;
      continue;
    }
    take(hub, Kind::hub);
    ++counts.hubs;
  }
  const int64_t before_hits = static_cast<int64_t>(chosen_.size());
  const int64_t hit_budget = budget.num_active - budget.min_uniform - counts.hubs;
  Lottery lottery{0, 0, 1};
  if (by_votes)
    lottery = rank_hits(hit_budget, budget, seed);
  else
    collect_in_table_order(group, tables, hit_budget, seed);
  counts.hits = static_cast<int64_t>(chosen_.size()) - before_hits;
  const Stream luck(seed, kLabelTies);
  for (int64_t i = 0; i < counts.labels; ++i) {
    const uint32_t flags = votes_[chosen_[i].id], votes = flags & kVotes;
    counts.found_labels += votes != 0;
    const bool lucky = votes == lottery.tied && static_cast<int64_t>(luck.below(i, lottery.rows)) < lottery.places;
    if ((flags & kHub) != 0 || votes > lottery.tied || lucky) chosen_[i].kind = Kind::certain_label;
  }
  if (tail != nullptr)
    take_tail(*tail);
  else
    draw_tail(budget.num_active - counts.hubs - counts.hits, budget.num_rows, tail_seed);
  counts.tail = static_cast<int64_t>(chosen_.size()) - before_hits - counts.hits;

  for (const int32_t row : touched_) votes_[row] = 0;
  if (budget.sorted) sort_chosen(budget.num_rows);
  ids.resize(chosen_.size());
  kinds.resize(chosen_.size());
  for (size_t i = 0; i < chosen_.size(); ++i) {
    ids[i] = chosen_[i].id;
    kinds[i] = chosen_[i].kind;
    votes_[chosen_[i].id] = group.num_labels > 0 ? static_cast<uint32_t>(i) : 0;
  }
  if (group.num_labels > 0) {
    for (int64_t i = 0; i < group.num_labels; ++i) label_positions[i] = votes_[group.labels[i]];
    for (const Candidate& candidate : chosen_) votes_[candidate.id] = 0;
  }
  return counts;
}

}  // namespace ts
