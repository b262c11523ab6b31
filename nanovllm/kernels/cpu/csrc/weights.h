// A packed weight, as Python hands it over (see packing.py, which mirrors this struct).
#pragma once

#include <cstdint>

namespace nanovllm {

enum Format : int32_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2, kInt4 = 3 };

inline long bits_of(int32_t format) {
  return format == kFloat32 ? 32 : format == kBFloat16 ? 16 : format == kInt8 ? 8 : 4;
}

constexpr int32_t kInt8Zero = 128;  // added to signed codes, so that they are unsigned
constexpr int32_t kInt4Zero = 8;    // where a weight has no zero points of its own

struct Weights {
  int32_t format;
  int32_t activation;   // kFloat32 or kBFloat16
  int32_t group_size;   // of int4
  int32_t gated;        // tiles alternate between gate and up
  int64_t columns;      // outputs, gate and up counted both
  int64_t depth;        // inputs
  int64_t padded_depth; // zeros fill it up to what the format needs
  int64_t num_tiles;
  const void* data;     // [num_tiles, padded_depth / pack, 16, pack]
  const void* scales;   // int8: float [num_tiles * 16]; int4: half [num_tiles, groups, 16]
  const uint8_t* zeros; // int4: [num_tiles, groups, 16], or null
  const float* bias;    // [num_tiles * 16], or null
};

}  // namespace nanovllm
