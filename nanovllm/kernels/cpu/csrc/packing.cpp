// Weights into their packed form and back, row by row as they come from a checkpoint.

#include <algorithm>

#include "dot.h"
#include "pool.h"
#include "weights.h"

namespace nanovllm {
namespace {

// Where output i of a part goes: parts follow each other, but gate and up alternate by tiles.
struct Place {
  long first, step, phase;
  long column(long i) const {
    const long c = first + i;
    return (c / kTile * step + phase) * kTile + c % kTile;
  }
};

int pack_of(int32_t format) { return int(32 / bits_of(format)); }

// Element k of a column lies at this word of its tile; a word of int4 holds eight elements.
long word_index(long column, long padded_depth, long k, int pack) {
  return (column / kTile * (padded_depth / pack) + k / pack) * kTile + column % kTile;
}

// Copies words of a row-major row; `row` has `depth` elements of `bytes` each.
void scatter_row(const char* row, long depth, int bytes, uint32_t* words, long column,
                 long padded_depth) {
  const int pack = 4 / bytes;
  uint32_t* out = words + word_index(column, padded_depth, 0, pack);
  long k = 0;
  for (; k + pack <= depth; k += pack, out += kTile) *out = word_at(row + k * bytes);
  if (k < depth) {
    uint32_t word = 0;
    std::memcpy(&word, row + k * bytes, (depth - k) * bytes);
    *out = word;
  }
}

// Byte i of an int4 word holds element i in its low half and element i + 4 in its high half.
void scatter_nibbles(const uint8_t* codes, long depth, uint8_t zero, uint32_t* words, long column,
                     long padded_depth) {
  uint32_t* out = words + word_index(column, padded_depth, 0, 8);
  for (long k = 0; k < padded_depth; k += 8, out += kTile) {
    uint32_t word = 0;
    for (int i = 0; i < 8; i++) {
      const uint32_t code = k + i < depth ? codes[k + i] : zero;
      word |= code << (8 * (i % 4) + 4 * (i / 4));
    }
    *out = word;
  }
}

float code_at(const Weights& w, long column, long k) {
  const auto* words = static_cast<const uint32_t*>(w.data);
  const int pack = pack_of(w.format);
  const uint32_t word = words[word_index(column, w.padded_depth, k, pack)];
  const int i = int(k % pack);
  switch (w.format) {
    case kFloat32: return bit_cast<float>(word);
    case kBFloat16: return to_float(Bf16{uint16_t(word >> (16 * i))});
    case kInt8: return float(int32_t((word >> (8 * i)) & 255) - kInt8Zero);
    default: return float((word >> (8 * (i % 4) + 4 * (i / 4))) & 15);
  }
}

float half_to_float(uint16_t half) {
  uint16_t padded[kWidth] = {half};
  return load_half(padded)[0];
}

// One row of a packed weight, expanded.
template <class Out>
void expand_row(const Weights& w, long column, Out* out) {
  const long groups = w.format == kInt4 ? w.padded_depth / w.group_size : 1;
  alignas(64) float chunk[kWidth];
  for (long k = 0; k < w.depth; k += kWidth) {
    const long count = std::min<long>(kWidth, w.depth - k);
    for (long i = 0; i < count; i++) {
      float value = code_at(w, column, k + i);
      if (w.format == kInt8) value *= static_cast<const float*>(w.scales)[column];
      if (w.format == kInt4) {
        const long g = (column / kTile * groups + (k + i) / w.group_size) * kTile + column % kTile;
        value -= w.zeros ? w.zeros[g] : kInt4Zero;
        value *= half_to_float(static_cast<const uint16_t*>(w.scales)[g]);
      }
      chunk[i] = value;
    }
    store(out + k, load(chunk), count);
  }
}

}  // namespace
}  // namespace nanovllm

using namespace nanovllm;

// Packs float32 or bf16 rows [rows, depth] of the weights' own type, or the codes [rows, depth] of
// int8 (unsigned, zero point 128) or int4 with their scales [rows, groups] (int8: float, one group;
// int4: half) and zero points [rows, groups] or null.
NANOVLLM_API void nanovllm_pack(const Weights* w, const void* source, const void* scales,
                              const uint8_t* zeros, int64_t rows, int64_t first, int64_t step,
                              int64_t phase) {
  Session session;
  const Place place{long(first), long(step), long(phase)};
  auto* words = static_cast<uint32_t*>(const_cast<void*>(w->data));
  const long groups = w->format == kInt4 ? w->padded_depth / w->group_size : 1;
  const long source_groups = w->format == kInt4 ? (w->depth + w->group_size - 1) / w->group_size : 1;
  const int bytes = w->format == kFloat32 ? 4 : w->format == kBFloat16 ? 2 : 1;
  // Sixteen rows at a time, so that two threads do not write to one tile's cache lines.
  session.parallel((rows + kTile - 1) / kTile, [&](long block) {
    for (long i = block * kTile; i < std::min<long>(rows, (block + 1) * kTile); i++) {
      const long column = place.column(i);
      const char* row = static_cast<const char*>(source) + i * w->depth * bytes;
      if (w->format != kInt4) {
        scatter_row(row, w->depth, bytes, words, column, w->padded_depth);
        if (w->format == kInt8) {
          static_cast<float*>(const_cast<void*>(w->scales))[column] =
              static_cast<const float*>(scales)[i];
        }
        continue;
      }
      scatter_nibbles(reinterpret_cast<const uint8_t*>(row), w->depth, kInt4Zero, words, column,
                      w->padded_depth);
      for (long g = 0; g < source_groups; g++) {
        const long at = (column / kTile * groups + g) * kTile + column % kTile;
        static_cast<uint16_t*>(const_cast<void*>(w->scales))[at] =
            static_cast<const uint16_t*>(scales)[i * source_groups + g];
        if (w->zeros) {
          const_cast<uint8_t*>(w->zeros)[at] = zeros ? zeros[i * source_groups + g] : kInt4Zero;
        }
      }
    }
  });
}

// out[i] = row ids[i] of the weight, in its activation type: an embedding on the head's one copy.
NANOVLLM_API void nanovllm_embed(const Weights* w, const int64_t* ids, int64_t num_ids, void* out) {
  Session session;
  session.parallel(num_ids, [&](long i) {
    if (w->activation == kFloat32) {
      expand_row(*w, ids[i], static_cast<float*>(out) + i * w->depth);
    } else {
      expand_row(*w, ids[i], static_cast<Bf16*>(out) + i * w->depth);
    }
  });
}
