// Weights into their packed form and back, row by row as they come from a checkpoint.

#include <algorithm>

#include "compact.h"
#include "int4.h"
#include "pool.h"

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
uint32_t word_of_codes(const uint8_t* codes, long count) {
  uint32_t word = 0;
  for (int i = 0; i < 8; i++) {
    const uint32_t code = i < count ? codes[i] : kInt4Zero;
    word |= code << (8 * (i % 4) + 4 * (i / 4));
  }
  return word;
}

// One row of int4 with its scales and zero points, which may be null, [source_groups].
void pack_int4_row(const Weights& w, const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros,
                   long column) {
  const Int4Panel panel(w, column / kPanel);
  const long tile = column % kPanel / kTile, lane = column % kTile;
  for (long g = 0; g * w.group_size < w.padded_depth; g++) {
    char* out = const_cast<char*>(panel.codes(g, tile)) + lane * 4;
    for (long k = g * w.group_size; k < (g + 1) * w.group_size; k += Int4Panel::kStep) {
      const uint32_t word = word_of_codes(codes + k, w.depth - k);
      std::memcpy(out, &word, 4);
      out += panel.stride();
    }
    const_cast<uint16_t*>(panel.scales(g, tile))[lane] = scales[g];
    if (w.has_zeros) const_cast<uint8_t*>(panel.zeros(g, tile))[lane] = zeros ? zeros[g] : kInt4Zero;
  }
}

float half_to_float(uint16_t half) {
  uint16_t padded[kWidth] = {half};
  return load_half(padded)[0];
}

float int4_at(const Weights& w, long column, long k) {
  const Int4Panel panel(w, column / kPanel);
  const long group = k / w.group_size, tile = column % kPanel / kTile, lane = column % kTile;
  const long step = k % w.group_size / Int4Panel::kStep;
  const uint32_t word = word_at(panel.codes(group, tile) + step * panel.stride() + lane * 4);
  const int i = int(k % Int4Panel::kStep);
  const int code = word >> (8 * (i % 4) + 4 * (i / 4)) & 15;
  const int zero = w.has_zeros ? panel.zeros(group, tile)[lane] : kInt4Zero;
  return float(code - zero) * half_to_float(panel.scales(group, tile)[lane]);
}

float weight_at(const Weights& w, long column, long k) {
  if (w.format == kInt4) return int4_at(w, column, k);
  const auto* words = static_cast<const uint32_t*>(w.data);
  const int pack = pack_of(w.format);
  const uint32_t word = words[word_index(column, w.padded_depth, k, pack)];
  const int i = int(k % pack);
  switch (w.format) {
    case kFloat32: return bit_cast<float>(word);
    case kBFloat16: return to_float(Bf16{uint16_t(word >> (16 * i))});
    default: return float(int32_t((word >> (8 * i)) & 255) - kInt8Zero) * w.scales[column];
  }
}

template <class Out>
void expand_compact_row(const Weights& w, long column, Out* out) {
  const long panel = column / kPanel, num_tiles = tiles_of_panel(w, panel);
  const Block* block = blocks_of_panel(w, panel);
  for (long k = 0; k < w.depth; k += kBlockDepth, block++) {
    const auto* bytes = static_cast<const uint8_t*>(w.data) + block->line * kLine;
    alignas(64) Bf16 chunk[kBlockDepth];
    column_of_block(*block, bytes, num_tiles, column % kPanel, chunk);
    for (long i = 0; i < std::min(kBlockDepth, w.depth - k); i += kWidth) {
      store(out + k + i, load(chunk + i), w.depth - k - i);
    }
  }
}

// One row of a packed weight, expanded.
template <class Out>
void expand_row(const Weights& w, long column, Out* out) {
  if (w.format == kCompact) return expand_compact_row(w, column, out);
  alignas(64) float chunk[kWidth];
  for (long k = 0; k < w.depth; k += kWidth) {
    const long count = std::min<long>(kWidth, w.depth - k);
    for (long i = 0; i < count; i++) chunk[i] = weight_at(w, column, k + i);
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
  const long source_groups = w->format == kInt4 ? (w->depth + w->group_size - 1) / w->group_size : 1;
  const int bytes = w->format == kFloat32 ? 4 : w->format == kBFloat16 ? 2 : 1;
  // Sixteen rows at a time, so that two threads do not write to one tile's cache lines.
  session.parallel((rows + kTile - 1) / kTile, [&](long block) {
    for (long i = block * kTile; i < std::min<long>(rows, (block + 1) * kTile); i++) {
      const long column = place.column(i);
      const char* row = static_cast<const char*>(source) + i * w->depth * bytes;
      if (w->format == kInt4) {
        pack_int4_row(*w, reinterpret_cast<const uint8_t*>(row),
                      static_cast<const uint16_t*>(scales) + i * source_groups,
                      zeros ? zeros + i * source_groups : nullptr, column);
        continue;
      }
      scatter_row(row, w->depth, bytes, words, column, w->padded_depth);
      if (w->format == kInt8) {
        const_cast<float*>(w->scales)[column] = static_cast<const float*>(scales)[i];
      }
    }
  });
}

// out[i] = row ids[i] of the weight, in its activation type: an embedding on the head's one copy.
NANOVLLM_API void nanovllm_embed(const Weights* w, const int64_t* ids, int64_t num_ids, void* out) {
  Session session;
  session.parallel_rows(num_ids, [&](long i) {
    if (w->activation == kFloat32) {
      expand_row(*w, ids[i], static_cast<float*>(out) + i * w->depth);
    } else {
      expand_row(*w, ids[i], static_cast<Bf16*>(out) + i * w->depth);
    }
  });
}
