// The KV cache's layout, and the plan of a step's attention.
#pragma once

#include <cstdint>
#include <vector>

#include "dot.h"
#include "weights.h"

namespace nanovllm {

constexpr long kMaxHeadDim = 512;
constexpr long kTileQueries = 96;  // queries that a task handles together

// Positions whose scores are held at a time. The more, the less is done for each besides products; but
// what is copied by the chunk, int8 that is expanded or short blocks for AMX, shall stay in the caches.
constexpr long kExpandedChunk = 128;
#if defined(NANOVLLM_AMX)
constexpr long kChunk = kExpandedChunk;
#else
constexpr long kChunk = 512;
#endif

// As Python hands it over (see attention.py, which mirrors this struct).
struct AttentionShape {
  int32_t activation;  // of queries and outputs: kFloat32 or kBFloat16
  int32_t cache;       // of keys and values: the same, or kInt8
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t block_size;
  float scale;
  int32_t one_path;  // treat every number of rows alike
};

// Where a layer keeps the keys and values of one block and head, a *cell*: keys as tiles of 16
// positions over the head's dimensions, values as tiles of 16 dimensions over the positions, then
// with int8 the scale of each position's key and value.
struct Cell {
  long positions;   // of a block, rounded up to whole tiles
  long dim;         // of a head, rounded up to the depth of an AMX tile
  long bytes;

  explicit Cell(const AttentionShape& shape)
      : positions(round_up(shape.block_size, kTile)), dim(round_up(shape.head_dim, 32)) {
    const long element = shape.cache == kInt8 ? 1 : shape.cache == kBFloat16 ? 2 : 4;
    bytes = 2 * positions * dim * element + (shape.cache == kInt8 ? 2 * positions * 4 : 0);
  }

  // Index of an element, whose lane holds `pack` of them.
  long key(long position, long d, int pack) const {
    return ((position / kTile * (dim / pack) + d / pack) * kTile + position % kTile) * pack +
           d % pack;
  }
  long value(long position, long d, int pack) const {
    return ((d / kTile * (positions / pack) + position / pack) * kTile + d % kTile) * pack +
           position % pack;
  }
};

// Some tokens that attend to the same positions of the same blocks.
struct Task {
  long first, count;           // of the plan's `tokens`
  const int64_t* block_table;  // of a sequence that has these blocks
  long begin, end;             // positions
};

struct Plan {
  std::vector<Task> tasks;         // the most work first
  std::vector<int32_t> tokens;     // of one task after the other
  std::vector<int32_t> partials;   // where each of them leaves its partial result, or -1
  std::vector<int64_t> positions;  // of each token of the step
  std::vector<int32_t> first_partial;  // of each token, and the end
  std::vector<int32_t> merged;     // tokens with several partial results
  std::vector<int64_t> tables;     // the step's block tables
};

}  // namespace nanovllm
