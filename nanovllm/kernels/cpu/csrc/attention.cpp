// Attention over the paged cache: one kernel for decode, prefill and shared prefixes.
//
// FlashAttention (Dao et al. 2022, algorithm 1, with the later online softmax of Dao 2023): scores of
// a chunk of positions, their softmax against the running maximum, and the weighted values, without
// ever holding a whole row of scores. Products go through `multiply`, keys and values lying in the
// cache as its tiles.

#include <algorithm>
#include <cmath>
#include <numeric>

#include "attention.h"
#include "pool.h"
#include "replay.h"

namespace nanovllm {
namespace {

constexpr long kMaxTiles = kMaxHeadDim / kTile;
constexpr long kChunkTiles = kChunk / kTile;
constexpr long kTileDepth = kTileBytes / sizeof(Bf16);  // positions that an AMX tile takes

// What a thread works in.
template <class T>
struct Workspace {
  alignas(64) Operand<T> queries[kTileQueries * (kMaxHeadDim + 32)];
  alignas(64) float scores[kTileQueries * kChunk];
  alignas(64) Operand<T> weights[kTileQueries * kChunk];
  alignas(64) float outputs[kTileQueries * kMaxHeadDim];
  alignas(64) T keys[kExpandedChunk * kMaxHeadDim];  // of a chunk of int8, expanded
  alignas(64) T values[kExpandedChunk * kMaxHeadDim];  // the same, or put together for AMX
  alignas(64) float key_scales[kExpandedChunk];
  alignas(64) float value_scales[kExpandedChunk];
  float top[kTileQueries];    // the largest score of each row so far
  float total[kTileQueries];  // the sum of its weights
};

template <class T>
Workspace<T>& workspace() {
  static thread_local Workspace<T> instance;
  return instance;
}

// Partial results of a token and head: its largest score, the sum of weights, and the output.
struct Partials {
  float* data;
  long num_heads, dim;
  float* at(long partial, long head) const {
    return data + (partial * num_heads + head) * (dim + kWidth);
  }
};

// Columns of scores are the positions of a sequence's cells, gaps between ragged blocks included.
struct Columns {
  long block_size, cell_positions;
  long of(long position) const {
    return position / block_size * cell_positions + position % block_size;
  }
};

template <class T>
class TileAttention {
 public:
  TileAttention(const AttentionShape& shape, const Plan& plan, const Task& task, long kv_head,
                long first_head, long num_heads, const char* cache, long window)
      : shape_(shape), cell_(shape), plan_(plan), task_(task), kv_head_(kv_head),
        first_head_(first_head), num_heads_(num_heads), cache_(cache), window_(window),
        columns_{shape.block_size, cell_.positions}, rows_(task.count * num_heads),
        chunk_(shape.cache == kInt8 ? kExpandedChunk : kChunk),
        segment_(std::gcd(cell_.positions, chunk_)),
        value_segment_(uses_tiles<T>(rows_, kTileDepth, shape.one_path)
                           ? std::max(segment_, kTileDepth)
                           : segment_),
        space_(workspace<T>()) {}

  void run(const T* q, T* out, const Partials& partials) {
    load_queries(q);
    std::fill_n(space_.outputs, rows_ * cell_.dim, 0.0f);
    std::fill_n(space_.top, rows_, -kInfinity);
    std::fill_n(space_.total, rows_, 0.0f);
    long earliest = plan_.positions[token(0)];
    for (long i = 1; i < task_.count; i++) {
      earliest = std::min<long>(earliest, plan_.positions[token(i)]);
    }
    // Chunks are counted from the task's begin, whatever a window leaves out, so that the order of
    // a row's sums does not depend on its neighbours.
    const long first = columns_.of(task_.begin), end = columns_.of(task_.end - 1) + 1;
    const long seen = window_ ? std::max(task_.begin, earliest - window_ + 1) : task_.begin;
    for (long column = first + (columns_.of(seen) - first) / chunk_ * chunk_; column < end;
         column += chunk_) {
      attend_chunk(column, std::min(chunk_, round_up(end - column, segment_)));
    }
    store_outputs(out, partials);
  }

 private:
  long token(long i) const { return plan_.tokens[task_.first + i]; }
  long query_stride() const { return cell_.dim + 32; }

  const char* cell(long column) const {
    const int64_t block = task_.block_table[column / cell_.positions];
    return cache_ + (block * shape_.num_kv_heads + kv_head_) * cell_.bytes;
  }

  void load_queries(const T* q) {
    for (long i = 0; i < task_.count; i++) {
      for (long h = 0; h < num_heads_; h++) {
        const T* source = q + (token(i) * shape_.num_heads + first_head_ + h) * shape_.head_dim;
        auto* target = space_.queries + (i * num_heads_ + h) * query_stride();
        for (long d = 0; d < cell_.dim; d += kWidth) {
          const long count = shape_.head_dim - d;
          store(target + d, count > 0 ? load(source + d, count) : Floats{});
        }
      }
    }
  }

  void attend_chunk(long column, long width) {
    const T* keys[kChunkTiles];
    const T* values[kChunkTiles * kMaxTiles];
    const long value_width = round_up(width, value_segment_);
    const int num_segments = int(value_width / value_segment_);
    const int value_tiles = int(cell_.dim / kTile);
    point_to_keys(column, width, keys);
    point_to_values(column, width, values);
    const bool tiled_scores = uses_tiles<T>(rows_, cell_.dim, shape_.one_path);
    multiply<T>(tiled_scores, space_.queries, query_stride(), rows_, keys, int(width / kTile), 0, 1,
                cell_.dim, space_.scores, kChunk, false);
    for (long i = 0; i < task_.count; i++) {
      const long position = plan_.positions[token(i)];
      const long low = window_ ? std::max(task_.begin, position - window_ + 1) : task_.begin;
      const long high = std::min(task_.end, position + 1);
      for (long h = 0; h < num_heads_; h++) {
        const long row = i * num_heads_ + h;
        weigh(row, column, width, columns_.of(low), high > low ? columns_.of(high - 1) + 1 : 0);
        for (long c = width; c < value_width; c += kWidth) {
          store(space_.weights + row * kChunk + c, Floats{});
        }
      }
    }
    const bool tiled_values = uses_tiles<T>(rows_, value_segment_, shape_.one_path);
    multiply<T>(tiled_values, space_.weights, kChunk, rows_, values, value_tiles, value_tiles,
                num_segments, value_segment_, space_.outputs, cell_.dim, true);
  }

  void point_to_keys(long column, long width, const T** keys) {
    constexpr int pack = kPack<T>;
    const bool quantized = shape_.cache == kInt8;
    for (long c = 0; c < width; c += kTile) {
      const char* source = cell(column + c);
      const long position = (column + c) % cell_.positions;
      const long first = cell_.key(position, 0, pack);
      if (!quantized) {
        keys[c / kTile] = reinterpret_cast<const T*>(source) + first;
        continue;
      }
      T* target = space_.keys + c * cell_.dim;
      expand(reinterpret_cast<const int8_t*>(source) + first, kTile * cell_.dim, target, column + c);
      keys[c / kTile] = target;
      const auto* scales =
          reinterpret_cast<const float*>(source + 2 * cell_.positions * cell_.dim);
      std::memcpy(space_.key_scales + c, scales + position, kTile * 4);
      std::memcpy(space_.value_scales + c, scales + cell_.positions + position, kTile * 4);
    }
  }

  // Values where they lie, or copied: int8 is expanded, and blocks too short for an AMX tile are
  // put together.
  void point_to_values(long column, long width, const T** values) {
    constexpr int pack = kPack<T>;
    const bool quantized = shape_.cache == kInt8;
    T* target = space_.values;
    for (long c = 0; c < width; c += value_segment_) {
      for (long d = 0; d < cell_.dim; d += kTile) {
        *values++ = target;
        for (long s = c; s < c + value_segment_; s += segment_) {
          const long size = segment_ * kTile;
          if (s >= width) {
            std::memset(target, 0, size * sizeof(T));
          } else {
            const char* source = cell(column + s);
            const long first = cell_.positions * cell_.dim +
                               cell_.value((column + s) % cell_.positions, d, pack);
            const T* run = reinterpret_cast<const T*>(source) + first;
            if (quantized) {
              expand(reinterpret_cast<const int8_t*>(source) + first, size, target, column + s);
            } else if (value_segment_ == segment_) {
              values[-1] = run;
              continue;
            } else {
              std::memcpy(target, run, size * sizeof(T));
            }
          }
          target += size;
        }
      }
    }
  }

  // int8 to T, unscaled: the scales go into the scores and the weights. Meanwhile the same place a
  // chunk later is fetched: runs are too short for the processor to foresee the next.
  void expand(const int8_t* codes, long count, T* target, long column) const {
    const long later = column + chunk_;
    const int8_t* ahead = codes;
    if (later / cell_.positions <= (task_.end - 1) / shape_.block_size) {
      ahead = reinterpret_cast<const int8_t*>(cell(later)) +
              (codes - reinterpret_cast<const int8_t*>(cell(column)));
    }
    for (long i = 0; i < count; i += 64) {
      __builtin_prefetch(ahead + i, 0, 2);
      for (long j = i; j < i + 64; j += kWidth) store(target + j, load(codes + j));
    }
  }

  // Scores of a row to weights, by the online softmax; columns outside [low, high) are not seen.
  void weigh(long row, long column, long width, long low, long high) {
    float* scores = space_.scores + row * kChunk;
    auto* weights = space_.weights + row * kChunk;
    const bool quantized = shape_.cache == kInt8;
    const bool ragged = cell_.positions != shape_.block_size;
    const float scale = shape_.scale * kLog2E;
    Floats best = splat(-kInfinity);
    for (long c = 0; c < width; c += kWidth) {
      Floats s = load(scores + c) * scale;
      if (quantized) s *= load(space_.key_scales + c);
      if (ragged || column + c < low || column + c + kWidth > high) s = hide(s, column + c, low, high);
      best = vector_max(s, best);
      store(scores + c, s);
    }
    const float top = std::max(space_.top[row], max(best));
    // While nothing is seen all weights are zero, but a NaN, which is no largest score, stays one.
    const float base = top == -kInfinity ? 0.0f : top;
    Floats sums{};
    for (long c = 0; c < width; c += kWidth) {
      Floats w = exp2(load(scores + c) - base);
      sums += w;
      if (quantized) w *= load(space_.value_scales + c);
      store(weights + c, w);
    }
    const float shrink = std::exp2(space_.top[row] - base);
    space_.total[row] = space_.total[row] * shrink + sum(sums);
    space_.top[row] = top;
    if (shrink != 1.0f) {
      float* output = space_.outputs + row * cell_.dim;
      for (long d = 0; d < cell_.dim; d += kWidth) store(output + d, load(output + d) * shrink);
    }
  }

  // Hides scores of columns outside [low, high), and of gaps. All columns of a vector are in one cell.
  Floats hide(Floats scores, long column, long low, long high) const {
    const Ints c = lanes() + int32_t(column), position = lanes() + int32_t(column % cell_.positions);
    const Ints hidden = (c < int32_t(low)) | (c >= int32_t(high)) | (position >= shape_.block_size);
    return hidden ? splat(-kInfinity) : scores;
  }

  void store_outputs(T* out, const Partials& partials) const {
    for (long i = 0; i < task_.count; i++) {
      const long partial = plan_.partials[task_.first + i];
      for (long h = 0; h < num_heads_; h++) {
        const long row = i * num_heads_ + h, head = first_head_ + h;
        const float* output = space_.outputs + row * cell_.dim;
        if (partial >= 0) {
          float* target = partials.at(partial, head);
          target[0] = space_.top[row];
          target[1] = space_.total[row];
          std::memcpy(target + kWidth, output, cell_.dim * 4);
          continue;
        }
        T* target = out + (token(i) * shape_.num_heads + head) * shape_.head_dim;
        const float inverse = 1.0f / space_.total[row];
        for (long d = 0; d < shape_.head_dim; d += kWidth) {
          store(target + d, load(output + d) * inverse, shape_.head_dim - d);
        }
      }
    }
  }

  const AttentionShape& shape_;
  const Cell cell_;
  const Plan& plan_;
  const Task& task_;
  const long kv_head_, first_head_, num_heads_;
  const char* cache_;
  const long window_;  // 0 is none
  const Columns columns_;
  const long rows_;
  const long chunk_;          // positions whose scores are held at a time
  const long segment_;        // those whose values lie in one run
  const long value_segment_;  // the same after runs were put together
  Workspace<T>& space_;
};

// Partial softmaxes over parts of the positions into the whole one.
template <class T>
void merge(const AttentionShape& shape, const Plan& plan, const Partials& partials, long token,
           long head, T* out) {
  const long first = plan.first_partial[token], last = plan.first_partial[token + 1];
  float top = -kInfinity;
  for (long p = first; p < last; p++) top = std::max(top, partials.at(p, head)[0]);
  alignas(64) float sums[kMaxHeadDim] = {};
  float total = 0;
  for (long p = first; p < last; p++) {
    const float* partial = partials.at(p, head);
    if (partial[1] == 0) continue;  // saw nothing; a NaN is not that
    const float weight = std::exp2(partial[0] - top);
    total += weight * partial[1];
    for (long d = 0; d < partials.dim; d += kWidth) {
      store(sums + d, load(sums + d) + load(partial + kWidth + d) * weight);
    }
  }
  T* target = out + (token * shape.num_heads + head) * shape.head_dim;
  for (long d = 0; d < shape.head_dim; d += kWidth) {
    store(target + d, load(sums + d) * (1.0f / total), shape.head_dim - d);
  }
}

template <class T>
void attend(const AttentionShape& shape, const Plan& plan, const T* q, const char* cache,
            long window, T* out) {
  Session session;
  const long group = shape.num_heads / shape.num_kv_heads;
  const long parts = (group + kTileQueries - 1) / kTileQueries;  // of a group too large for a tile
  const Partials partials{
      static_cast<float*>(session.scratch(
          3, (plan.first_partial.back() + 1) * shape.num_heads *
                 (Cell(shape).dim + kWidth) * sizeof(float))),
      shape.num_heads, Cell(shape).dim};
  const long items = shape.num_kv_heads * parts;
  session.parallel(long(plan.tasks.size()) * items, [&](long item) {
    const long kv_head = item % items / parts, part = item % parts;
    const long first = part * kTileQueries;
    TileAttention<T>(shape, plan, plan.tasks[item / items], kv_head, kv_head * group + first,
                     std::min(kTileQueries, group - first), cache, window)
        .run(q, out, partials);
  });
  if (plan.merged.empty()) return;
  session.parallel(long(plan.merged.size()), [&](long i) {
    for (long head = 0; head < shape.num_heads; head++) {
      merge(shape, plan, partials, plan.merged[i], head, out);
    }
  });
}

}  // namespace
}  // namespace nanovllm

using namespace nanovllm;

// out = softmax(q K^T scale) V over what the plan says; q and out are [num_tokens, num_heads,
// head_dim]. A query sees the `window` positions up to its own, all if that is 0.
NANOVLLM_API void nanovllm_attend(const AttentionShape* shape, const void* plan, const void* q,
                                  const void* cache, int64_t window, void* out) {
  const auto call = [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    attend(*shape, *static_cast<const Plan*>(plan), static_cast<const T*>(q),
           static_cast<const char*>(cache), window, typed);
  };
  if (shape->activation == kFloat32) call(static_cast<float*>(out));
  else call(static_cast<Bf16*>(out));
}
NANOVLLM_REPLAYABLE(nanovllm_attend)
