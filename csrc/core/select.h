// Which neurons take part: labels always, then hubs, then table hits ranked by votes, then a tail: uniform, or drawn by
// the caller.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace ts {

enum class Strategy : int64_t { vanilla = 0, topk = 1, threshold = 2 };
enum class Kind : uint8_t {
  label = 0,
  hub = 1,
  hit = 2,
  tail = 3,
  certain_label = 4,  // that would have been a hub or a hit, had it been nobody's label
};

// Read-only tables; num_tables == 0 selects without hashing.
struct TablesQuery {
  const int32_t* buckets;  // [L, num_buckets, capacity]
  const int32_t* counts;   // [L, num_buckets]
  int64_t num_tables, num_buckets, capacity;
};

struct Budget {
  int64_t num_rows;     // N
  int64_t num_active;   // candidates beyond the labels
  int64_t min_uniform;  // of which at least so many are left to the tail
  Strategy strategy;
  int64_t threshold;
  bool sorted;  // ascending ids; otherwise labels, hubs, hits and tail follow each other
};

// Rows that the caller drew for the tail, instead of a uniform one: those that are candidates already, and repeats, are
// passed over.
struct GivenTail {
  const int64_t* rows;
  int64_t num_rows;
};

// One candidate set: for the queries of a whole batch, or of one sample.
struct Group {
  const int64_t* labels;  // may repeat
  int64_t num_labels;
  const int32_t* codes;  // [num_queries, L, probes]
  int64_t num_queries, probes;
};

struct Counts {
  int64_t labels = 0, hubs = 0, hits = 0, tail = 0;
  int64_t found_labels = 0;  // distinct labels that the tables found by themselves
};

// Scratch of one thread, kept between calls: O(N) bytes once, O(candidates) work each time.
class Selector {
 public:
  // Writes the group's ids and kinds, and for every label of the group its position among these ids.
  // tail_seed is the same for all groups of a batch: each tail is uniform, and together they touch few rows. It is not
  // used where there is a given tail.
  Counts select(const Group& group, const int64_t* hubs, int64_t num_hubs, const TablesQuery& tables,
                const GivenTail* tail, const Budget& budget, uint64_t seed, uint64_t tail_seed,
                std::vector<int64_t>& ids, std::vector<Kind>& kinds, int64_t* label_positions);

 private:
  struct Candidate {
    int32_t id;
    Kind kind;
  };
  // Many votes make a high rank; among equals, luck does.
  struct Probed {
    uint64_t rank;
    int64_t bucket;
  };
  void reserve(int64_t num_rows, int64_t num_buckets);
  void vote(const Group& group, const TablesQuery& tables, bool by_rank, int64_t most_members, uint64_t seed);
  void collect_in_table_order(const Group& group, const TablesQuery& tables, int64_t wanted, uint64_t seed);
  // What makes a row a hit: more than `tied` votes, or so many and luck.
  struct Lottery {
    uint32_t tied;
    int64_t places, rows;
  };
  Lottery rank_hits(int64_t wanted, const Budget& budget, uint64_t seed);
  void sort_chosen(int64_t num_rows);
  void draw_tail(int64_t wanted, int64_t num_rows, uint64_t seed);
  void take_tail(const GivenTail& tail);
  void take(int64_t id, Kind kind);
  void prefetch(int64_t id) const { __builtin_prefetch(&votes_[id], 1); }
  uint32_t touched_votes(size_t i) const;
  bool taken(int64_t id) const { return (votes_[id] & kTaken) != 0; }

  static constexpr int64_t kMembersPerHit = 32;
  static constexpr uint32_t kTaken = 1u << 31;
  static constexpr uint32_t kHub = 1u << 30;  // a label that is a hub as well
  static constexpr uint32_t kVotes = kHub - 1;
  static constexpr uint32_t kSeen = 1u;  // a label met on the way through the tables
  std::vector<uint32_t> votes_;          // [N], zero between calls
  std::vector<uint32_t> tally_;          // [L * num_buckets], zero between calls
  std::vector<Probed> probed_;           // buckets with a tally
  std::vector<int32_t> touched_;         // rows with a vote
  std::vector<uint64_t> present_;        // [N] bits, zero between calls
  std::vector<int64_t> rows_with_;       // so many votes
  std::vector<Candidate> chosen_;
};

}  // namespace ts
