// Queries, keys and values of a step, from projections to where attention reads them.

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "attention.h"
#include "pool.h"
#include "replay.h"

namespace nanovllm {
namespace {

// Normalises one head, rotates it, and leaves it in `head` as floats.
template <class T>
void prepare_head(const T* source, long dim, const float* norm, float eps, const float* cos,
                  const float* sin, float* head) {
  Floats squares{};
  for (long d = 0; d < dim; d += kWidth) {
    const Floats v = load(source + d, dim - d);
    squares += v * v;
    store(head + d, v);
  }
  if (norm) {
    const float factor = 1.0f / std::sqrt(sum(squares) / dim + eps);
    for (long d = 0; d < dim; d += kWidth) {
      store(head + d, load(head + d) * factor * load(norm + d, dim - d));
    }
  }
  if (cos) rotate_halves(head, cos, sin, dim, 1.0f, head);
}

template <class T>
struct Projections {
  const T* qkv;
  const float* q_norm;
  const float* k_norm;
  float eps;
  const float* cos;
  const float* sin;
};

// One head's key or value in the elements of the cache, which are `pack` to a lane.
template <class Element>
struct Narrow {
  alignas(64) Element elements[kMaxHeadDim];
  float scale = 1;

  // `head` is readable up to a whole vector, and what is beyond `dim` does not matter.
  Narrow(const float* head, long dim) {
    if constexpr (std::is_same_v<Element, int8_t>) {
      const auto [factor, inverse] = int8_scale(head, dim);
      scale = factor;
      for (long d = 0; d < dim; d += kWidth) {
        store_narrow(elements + d, round_to_ints(load(head + d) * inverse));
      }
    } else {
      for (long d = 0; d < dim; d += kWidth) store(elements + d, load(head + d));
    }
  }
};

// A key's lanes go to a column of its tile, one a row.
template <class Element, int kLanePack>
void store_key(const Cell& cell, Element* keys, long position, const Narrow<Element>& head,
               long dim) {
  struct Lane {
    Element elements[kLanePack];
  };
  auto* out = reinterpret_cast<Lane*>(keys + cell.key(position, 0, kLanePack));
  for (long d = 0; d < dim; d += kLanePack, out += kTile) {
    std::memcpy(out, head.elements + d, sizeof(Lane));
  }
}

// A value's elements go to their place in the lanes of a row in each tile.
template <class Element, int kLanePack>
void store_value(const Cell& cell, Element* values, long position, const Narrow<Element>& head,
                 long dim) {
  for (long d = 0; d < dim; d += kTile) {
    Element* out = values + cell.value(position, d, kLanePack);
    if constexpr (sizeof(Element) == 2) {
      // Half of each lane is another position's: blend instead of sixteen scattered stores.
      const int shift = 16 * int(position % 2);
      for (int lane = 0; lane < kTile; lane += kWidth) {
        Words* words = reinterpret_cast<Words*>(out - position % 2) + lane / kWidth;
        const auto fresh = load_raw<HalfWords>(head.elements + d + lane);
        const Words blended = (load_raw<Words>(words) & ~(0xffffu << shift)) |
                              (__builtin_convertvector(fresh, Words) << shift);
        std::memcpy(words, &blended, sizeof(blended));
      }
    } else {
      for (int lane = 0; lane < kTile; lane++) out[lane * kLanePack] = head.elements[d + lane];
    }
  }
}

template <class T, class Element>
void write_token(const AttentionShape& shape, const Cell& cell, const Projections<T>& in, long token,
                 long slot, T* q, char* cache) {
  alignas(64) float head[kMaxHeadDim] = {};
  const long dim = shape.head_dim, half = dim / 2;
  const long num_kv_heads = shape.num_kv_heads, num_heads = shape.num_heads;
  const T* row = in.qkv + token * (num_heads + 2 * num_kv_heads) * dim;
  const float* cos = in.cos ? in.cos + token * half : nullptr;
  const float* sin = in.sin ? in.sin + token * half : nullptr;
  for (long h = 0; h < num_heads; h++) {
    prepare_head(row + h * dim, dim, in.q_norm, in.eps, cos, sin, head);
    T* target = q + (token * num_heads + h) * dim;
    for (long d = 0; d < dim; d += kWidth) store(target + d, load(head + d), dim - d);
  }
  const long position = slot % shape.block_size;
  for (long h = 0; h < num_kv_heads; h++) {
    char* base = cache + (slot / shape.block_size * num_kv_heads + h) * cell.bytes;
    auto* keys = reinterpret_cast<Element*>(base);
    auto* values = keys + cell.positions * cell.dim;
    prepare_head(row + (num_heads + h) * dim, dim, in.k_norm, in.eps, cos, sin, head);
    const Narrow<Element> key(head, dim);
    store_key<Element, kPack<T>>(cell, keys, position, key, dim);
    const T* source = row + (num_heads + num_kv_heads + h) * dim;
    // Positions beyond a sequence's end are read with weight zero, so they must be finite.
    for (long d = 0; d < dim; d += kWidth) {
      const Floats v = load(source + d, dim - d);
      store(head + d, v - v == 0.0f ? v : Floats{});
    }
    const Narrow<Element> value(head, dim);
    store_value<Element, kPack<T>>(cell, values, position, value, dim);
    if constexpr (std::is_same_v<Element, int8_t>) {
      auto* scales = reinterpret_cast<float*>(values + cell.positions * cell.dim);
      scales[position] = key.scale;
      scales[cell.positions + position] = value.scale;
    }
  }
}

template <class T, class Element>
void write(const AttentionShape& shape, const Projections<T>& in, long num_tokens,
           const int64_t* slots, T* q, char* cache) {
  Session session;
  const Cell cell(shape);
  // A tile's worth of neighbours for one thread, if there are enough: they share cache lines.
  const long run = num_tokens >= 2 * kTile * num_threads() ? kTile : 1;
  // A lane of bf16 values holds two positions, which one thread has to write.
  const auto first_of_item = [&](long token) {
    const bool split = token > 0 && token < num_tokens && slots[token] == slots[token - 1] + 1 &&
                       slots[token] % shape.block_size % 2 == 1;
    return token + split;
  };
  session.parallel((num_tokens + run - 1) / run, [&](long item) {
    const long end = first_of_item(std::min(num_tokens, (item + 1) * run));
    for (long token = first_of_item(item * run); token < end; token++) {
      write_token<T, Element>(shape, cell, in, token, slots[token], q, cache);
    }
  });
}

}  // namespace
}  // namespace nanovllm

using namespace nanovllm;

NANOVLLM_API int64_t nanovllm_cell_bytes(const AttentionShape* shape) { return Cell(*shape).bytes; }

// Norms the heads of queries and keys (null: not), rotates them (null: not), writes keys and values
// to their slots, and leaves the queries in q.
//
// qkv is [num_tokens, (num_heads + 2 num_kv_heads) head_dim], cos and sin [num_tokens, head_dim / 2].
NANOVLLM_API void nanovllm_write_kv(const AttentionShape* shape, int64_t num_tokens, const void* qkv,
                                    const float* q_norm, const float* k_norm, float eps,
                                    const float* cos, const float* sin, const int64_t* slots,
                                    void* q, void* cache) {
  const auto call = [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    const Projections<T> in{static_cast<const T*>(qkv), q_norm, k_norm, eps, cos, sin};
    auto* cells = static_cast<char*>(cache);
    if (shape->cache == kInt8) write<T, int8_t>(*shape, in, num_tokens, slots, typed, cells);
    else write<T, T>(*shape, in, num_tokens, slots, typed, cells);
  };
  if (shape->activation == kFloat32) call(static_cast<float*>(q));
  else call(static_cast<Bf16*>(q));
}
NANOVLLM_REPLAYABLE(nanovllm_write_kv)
