// Which tokens attend to which positions together, once a step.
//
// Rows that start with the same blocks share a *segment* of them: their tokens attend to it in one
// task, so that its keys and values are read once for all (cascade attention; Juravsky et al. 2024,
// "Hydragen", section 3.2, with a tree in place of one prefix). The rest of a row is its own, cut
// into tiles of tokens and, where there is too little to share among the threads, into ranges of
// positions. A token that is in several tasks has its partial results merged.

#include <algorithm>
#include <numeric>

#include "attention.h"
#include "pool.h"

namespace nanovllm {
namespace {

constexpr long kMinShared = 256;      // positions that a shared segment must save, over all rows
constexpr long kMinSplit = 256;       // positions of a range
constexpr long kFixedSplit = 8192;    // the same where every number of rows is treated alike
constexpr long kItemsPerThread = 8;

struct Row {
  long start, length, first_token;
  const int64_t* table;
  long shareable;  // blocks before its first query
};

class Planner {
 public:
  Planner(Plan& plan, const AttentionShape& shape, std::vector<Row> rows)
      : plan_(plan), rows_(std::move(rows)), block_size_(shape.block_size) {
    const long group = shape.num_heads / shape.num_kv_heads;
    tile_tokens_ = std::max(1L, kTileQueries / group);
    split_ = shape.one_path ? round_up(kFixedSplit, block_size_) : choose_split(shape.num_kv_heads);
  }

  void build(bool cascade) {
    if (cascade && rows_.size() > 1) {
      std::sort(rows_.begin(), rows_.end(), [](const Row& a, const Row& b) {
        return std::lexicographical_compare(a.table, a.table + a.shareable, b.table,
                                            b.table + b.shareable);
      });
      share(0, rows_.size(), 0, 0);
    } else {
      for (const Row& row : rows_) add_own(row, 0);
    }
    number_partials();
    std::stable_sort(plan_.tasks.begin(), plan_.tasks.end(), [](const Task& a, const Task& b) {
      return a.count * (a.end - a.begin) > b.count * (b.end - b.begin);
    });
  }

 private:
  // Rows [low, high) have their first `depth` blocks in common, and `done` of these are planned.
  void share(size_t low, size_t high, long depth, long done) {
    if (high - low == 1) return add_own(rows_[low], done);
    // They are sorted, so what the first and the last have in common all have.
    const Row &first = rows_[low], &last = rows_[high - 1];
    const long limit = std::min(first.shareable, last.shareable);
    while (depth < limit && first.table[depth] == last.table[depth]) depth++;
    if ((depth - done) * block_size_ * long(high - low - 1) >= kMinShared) {
      std::vector<int32_t> tokens;
      for (size_t i = low; i < high; i++) append_tokens(tokens, rows_[i], 0, rows_[i].length);
      add_ranges(tokens, first.table, done * block_size_, depth * block_size_);
      done = depth;
    }
    for (size_t i = low; i < high;) {
      size_t end = i + 1;
      if (rows_[i].shareable > depth) {
        while (end < high && rows_[end].shareable > depth &&
               rows_[end].table[depth] == rows_[i].table[depth]) {
          end++;
        }
      }
      share(i, end, depth, done);
      i = end;
    }
  }

  void add_own(const Row& row, long done) {
    for (long i = 0; i < row.length; i += tile_tokens_) {
      const long count = std::min(tile_tokens_, row.length - i);
      std::vector<int32_t> tokens;
      append_tokens(tokens, row, i, count);
      add_ranges(tokens, row.table, done * block_size_, row.start + i + count);
    }
  }

  void append_tokens(std::vector<int32_t>& tokens, const Row& row, long first, long count) {
    for (long i = 0; i < count; i++) tokens.push_back(int32_t(row.first_token + first + i));
  }

  // Ranges end at multiples of the split, so that a row's do not depend on the others'.
  void add_ranges(const std::vector<int32_t>& tokens, const int64_t* table, long begin, long end) {
    for (; begin < end; begin = std::min(end, (begin / split_ + 1) * split_)) {
      const long range_end = std::min(end, (begin / split_ + 1) * split_);
      for (size_t i = 0; i < tokens.size(); i += tile_tokens_) {
        const size_t stop = std::min(tokens.size(), i + tile_tokens_);
        plan_.tasks.push_back({long(plan_.tokens.size()), long(stop - i), table, begin, range_end});
        plan_.tokens.insert(plan_.tokens.end(), tokens.begin() + i, tokens.begin() + stop);
      }
    }
  }

  long choose_split(long num_kv_heads) {
    long items = 0, longest = 1;
    for (const Row& row : rows_) {
      items += (row.length + tile_tokens_ - 1) / tile_tokens_ * num_kv_heads;
      longest = std::max(longest, row.start + row.length);
    }
    const long wanted = kItemsPerThread * num_threads();
    const long pieces = num_threads() > 1 && items > 0 ? (wanted + items - 1) / items : 1;
    return round_up(std::max(kMinSplit, (longest + pieces - 1) / pieces), block_size_);
  }

  // Tasks are in the order of their positions here, and so are a token's partial results.
  void number_partials() {
    auto& first = plan_.first_partial;
    first.assign(plan_.positions.size() + 1, 0);
    for (const int32_t token : plan_.tokens) first[token + 1]++;
    plan_.merged.clear();
    for (size_t token = 0; token + 1 < first.size(); token++) {
      if (first[token + 1] > 1) plan_.merged.push_back(int32_t(token));
      else first[token + 1] = 0;
    }
    std::partial_sum(first.begin(), first.end(), first.begin());
    std::vector<int32_t> next(first.begin(), first.end() - 1);
    plan_.partials.clear();
    for (const int32_t token : plan_.tokens) {
      plan_.partials.push_back(first[token + 1] > first[token] ? next[token]++ : -1);
    }
  }

  Plan& plan_;
  std::vector<Row> rows_;
  long block_size_, tile_tokens_ = 1, split_ = 1;
};

}  // namespace
}  // namespace nanovllm

using namespace nanovllm;

NANOVLLM_API void* nanovllm_new_plan() { return new Plan; }
NANOVLLM_API void nanovllm_free_plan(void* plan) { delete static_cast<Plan*>(plan); }

// Plans a step of `num_rows` rows: row i has queries at positions starts[i] .. starts[i] +
// lengths[i] - 1 and its blocks at tables[i, .], `table_stride` apart. Returns the number of tasks.
NANOVLLM_API int64_t nanovllm_plan_attention(void* plan_pointer, const AttentionShape* shape,
                                             int64_t num_rows, const int64_t* starts,
                                             const int64_t* lengths, const int64_t* tables,
                                             int64_t table_stride, int32_t cascade) {
  Plan& plan = *static_cast<Plan*>(plan_pointer);
  plan.tasks.clear();
  plan.tokens.clear();
  plan.positions.clear();
  plan.tables.assign(tables, tables + num_rows * table_stride);
  std::vector<Row> rows;
  for (int64_t i = 0; i < num_rows; i++) {
    rows.push_back({long(starts[i]), long(lengths[i]), long(plan.positions.size()),
                    plan.tables.data() + i * table_stride, long(starts[i] / shape->block_size)});
    for (int64_t j = 0; j < lengths[i]; j++) plan.positions.push_back(starts[i] + j);
  }
  Planner(plan, *shape, std::move(rows)).build(cascade && !shape->one_path);
  return int64_t(plan.tasks.size());
}
