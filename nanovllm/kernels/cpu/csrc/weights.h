// A packed weight, as Python hands it over (see packing.py, which mirrors this struct).
#pragma once

#include <cstdint>

namespace nanovllm {

enum Format : int32_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2, kInt4 = 3, kCompact = 4 };

inline long bits_of(int32_t format) {
  return format == kFloat32 ? 32 : format == kInt8 ? 8 : format == kInt4 ? 4 : 16;
}

constexpr int32_t kInt8Zero = 128;  // added to signed codes, so that they are unsigned
constexpr int32_t kInt4Zero = 8;    // where a weight has no zero points of its own

// Where a block of a compact weight lies, and how; see compact.h.
struct Block {
  uint32_t line;     // its first cache line
  uint8_t exponent;  // the upper seven bits of the least exponent
  uint8_t dense;     // whether it is not compact
};
static_assert(sizeof(Block) == 8);  // as Python takes memory for it

struct Weights {
  int32_t format;
  int32_t activation;   // kFloat32 or kBFloat16
  int32_t group_size;   // of int4
  int32_t gate;         // see gate.h; if there is one, tiles alternate between gate and up
  int32_t has_zeros;    // int4: whether groups have zero points of their own
  int64_t columns;      // outputs, gate and up counted both
  int64_t depth;        // inputs
  int64_t padded_depth; // zeros fill it up to what the format needs
  int64_t num_tiles;
  const void* data;     // [num_tiles, padded_depth / pack, 16, pack]; int4: panels; compact: blocks
  const float* scales;  // int8: [num_tiles * 16]
  const float* bias;    // [num_tiles * 16], or null
  const Block* blocks;  // compact: [panels * padded_depth / 16 + 1]
};

}  // namespace nanovllm
