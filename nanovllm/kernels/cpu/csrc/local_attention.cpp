// Attention within short sequences of equal length, in both directions and without a cache.
//
// A work item is a sequence and a KV head with the query heads that share it. Both products go
// through `multiply` in float, whatever the type: keys lie in its tiles by position, so that a
// vector has the scores of one query.

#include <algorithm>
#include <cmath>
#include <vector>

#include "dot.h"
#include "pool.h"
#include "replay.h"
#include "weights.h"

namespace nanovllm {
namespace {

struct Local {
  const float* cos;  // [length, head_dim / 2], or null
  const float* sin;
  long length, num_heads, num_kv_heads, head_dim;

  long group() const { return num_heads / num_kv_heads; }
  long rows() const { return group() * length; }
  long row_width() const { return (num_heads + 2 * num_kv_heads) * head_dim; }
  long padded_dim() const { return round_up(head_dim, kTile); }
  long padded_length() const { return round_up(length, kTile); }
};

// What a thread works in.
struct Space {
  std::vector<float> head, queries, scores, outputs, keys, values;

  void fit(const Local& local) {
    grow(head, local.padded_dim() + kWidth);
    grow(queries, local.rows() * local.head_dim);
    grow(scores, local.rows() * local.padded_length());
    grow(outputs, local.rows() * local.padded_dim());
    grow(keys, local.padded_length() * local.head_dim);
    grow(values, local.length * local.padded_dim());
  }

  static void grow(std::vector<float>& buffer, long count) {
    if (long(buffer.size()) < count) buffer.resize(count);
  }
};

// The head times `scale`, rotated by its position.
template <class T>
void rotate(const Local& local, const T* source, long position, float scale, float* out) {
  const long dim = local.head_dim, half = dim / 2;
  if (!local.cos) {
    for (long d = 0; d < dim; d += kWidth) {
      store(out + d, load(source + d, dim - d) * scale, dim - d);
    }
    return;
  }
  rotate_halves(source, local.cos + position * half, local.sin + position * half, dim, scale, out);
}

// Scores in units of log2, to weights; lanes past the length are left zero.
void softmax(const Local& local, float* scores) {
  const long length = local.length;
  Floats top = splat(-kInfinity);
  for (long j = 0; j < length; j += kWidth) {
    const Ints lane = lanes() + int32_t(j);
    const Floats v = load(scores + j);
    top = vector_max(top, lane < int32_t(length) ? v : splat(-kInfinity));
  }
  const float largest = max(top);
  Floats total{};
  for (long j = 0; j < length; j += kWidth) {
    const Ints lane = lanes() + int32_t(j);
    const Floats weight = exp2(load(scores + j) - largest);
    const Floats kept = lane < int32_t(length) ? weight : Floats{};
    store(scores + j, kept);
    total += kept;
  }
  const float inverse = 1.0f / sum(total);
  for (long j = 0; j < length; j += kWidth) store(scores + j, load(scores + j) * inverse);
}

// Rotated keys by position within tiles, and values by dimension.
template <class T>
void load_keys_and_values(const Local& local, const T* qkv, long kv_head, Space& space) {
  const long dim = local.head_dim, padded_length = local.padded_length();
  std::fill_n(space.keys.begin(), padded_length * dim, 0.0f);
  for (long p = 0; p < local.length; p++) {
    const T* key = qkv + p * local.row_width() + (local.num_heads + kv_head) * dim;
    const T* value = key + local.num_kv_heads * dim;
    rotate(local, key, p, 1.0f, space.head.data());
    float* column = space.keys.data() + p / kTile * dim * kTile + p % kTile;
    for (long d = 0; d < dim; d++) column[d * kTile] = space.head[d];
    for (long d = 0; d < local.padded_dim(); d += kWidth) {
      const long count = dim - d;
      store(space.values.data() + (d / kTile * local.length + p) * kTile + d % kTile,
            count > 0 ? load(value + d, count) : Floats{});
    }
  }
}

template <class T>
void load_queries(const Local& local, const T* qkv, long kv_head, Space& space) {
  const float scale = kLog2E / std::sqrt(float(local.head_dim));
  for (long p = 0; p < local.length; p++) {
    const T* heads = qkv + p * local.row_width() + kv_head * local.group() * local.head_dim;
    for (long g = 0; g < local.group(); g++) {
      rotate(local, heads + g * local.head_dim, p, scale,
             space.queries.data() + (p * local.group() + g) * local.head_dim);
    }
  }
}

// One product on tiles that lie one after the other.
void product(const float* a, long a_stride, long rows, const float* tiles, long num_tiles,
             long depth, float* c) {
  for (long j = 0; j < num_tiles; j += kMaxColumnTiles) {
    const int count = int(std::min<long>(kMaxColumnTiles, num_tiles - j));
    const float* pointers[kMaxColumnTiles];
    for (int i = 0; i < count; i++) pointers[i] = tiles + (j + i) * depth * kTile;
    multiply<float>(false, a, a_stride, rows, pointers, count, 0, 1, depth, c + j * kTile,
                    num_tiles * kTile, false);
  }
}

// `qkv` and `out` of one sequence.
template <class T>
void attend(const Local& local, const T* qkv, long kv_head, T* out) {
  static thread_local Space space;
  space.fit(local);
  load_keys_and_values(local, qkv, kv_head, space);
  load_queries(local, qkv, kv_head, space);
  const long dim = local.head_dim, width = local.padded_length(), rows = local.rows();
  product(space.queries.data(), dim, rows, space.keys.data(), width / kTile, dim,
          space.scores.data());
  for (long r = 0; r < rows; r++) softmax(local, space.scores.data() + r * width);
  product(space.scores.data(), width, rows, space.values.data(), local.padded_dim() / kTile,
          local.length, space.outputs.data());
  for (long r = 0; r < rows; r++) {
    const long position = r / local.group(), head = kv_head * local.group() + r % local.group();
    T* target = out + (position * local.num_heads + head) * dim;
    const float* source = space.outputs.data() + r * local.padded_dim();
    for (long d = 0; d < dim; d += kWidth) store(target + d, load(source + d), dim - d);
  }
}

}  // namespace
}  // namespace nanovllm

using namespace nanovllm;

// Attends within `seqs` sequences of `length` positions. qkv is
// [seqs * length, (num_heads + 2 num_kv_heads) head_dim], out [seqs * length, num_heads * head_dim];
// cos and sin, float [length, head_dim / 2], are null where there are no positions.
NANOVLLM_API void nanovllm_local_attention(int32_t type, const void* qkv, const float* cos,
                                           const float* sin, int64_t seqs, int64_t length,
                                           int64_t num_heads, int64_t num_kv_heads,
                                           int64_t head_dim, void* out) {
  const Local local{cos, sin, length, num_heads, num_kv_heads, head_dim};
  Session session;
  const auto run = [&](const auto* source, auto* target) {
    session.parallel(seqs * num_kv_heads, [&](long item) {
      const long sequence = item / num_kv_heads;
      attend(local, source + sequence * length * local.row_width(), item % num_kv_heads,
             target + sequence * length * num_heads * head_dim);
    });
  };
  if (type == kFloat32) run(static_cast<const float*>(qkv), static_cast<float*>(out));
  else run(static_cast<const Bf16*>(qkv), static_cast<Bf16*>(out));
}
NANOVLLM_REPLAYABLE(nanovllm_local_attention)
