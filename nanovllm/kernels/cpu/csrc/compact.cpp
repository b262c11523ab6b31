// Packed bf16 weights into their compact form; see compact.h.

#include "compact.h"

#include <algorithm>

#include "pool.h"

namespace nanovllm {
namespace {

constexpr int kReach = 7;  // of a code, from the least exponent of its block

int exponent(uint16_t bits) { return bits >> 8 & 127; }

const uint16_t* dense_tile(const Weights& w, long tile, long k) {
  return static_cast<const uint16_t*>(w.data) + (tile * w.padded_depth + k) * kTile;
}

Block plan_block(const Weights& dense, long panel, long k) {
  int least = 127, greatest = 0;
  for (long j = 0; j < tiles_of_panel(dense, panel); j++) {
    const uint16_t* weights = dense_tile(dense, panel * kMaxColumnTiles + j, k);
    for (long i = 0; i < kBlockDepth * kTile; i++) {
      least = std::min(least, exponent(weights[i]));
      greatest = std::max(greatest, exponent(weights[i]));
    }
  }
  return {0, uint8_t(least), greatest - least > kReach};
}

// Four rows of a tile.
void compact_group(const uint16_t* weights, const Block& block, uint8_t* out) {
  const auto code = [&](uint16_t bits) {
    return (exponent(bits) - block.exponent) | (bits >> 15 << 3);
  };
  for (int byte = 0; byte < kLine; byte++) {
    const int at = byte / 8 % 2 * 2 * kTile + byte / 16 * 8 + byte % 8;
    const uint16_t first = weights[at], second = weights[at + 4 * kTile];
    out[byte] = uint8_t(code(first) | code(second) << 4);
    out[kLine + byte] = uint8_t(first);
    out[2 * kLine + byte] = uint8_t(second);
  }
}

}  // namespace
}  // namespace nanovllm

using namespace nanovllm;

// Fills in the blocks of a dense bf16 weight, and one more where they end. Returns the bytes that
// they take.
NANOVLLM_API int64_t nanovllm_plan_blocks(const Weights* dense, Block* blocks) {
  Session session;
  const long panels = (dense->num_tiles + kMaxColumnTiles - 1) / kMaxColumnTiles;
  const long depth_blocks = dense->padded_depth / kBlockDepth;
  session.parallel(panels, [&](long panel) {
    for (long b = 0; b < depth_blocks; b++) {
      blocks[panel * depth_blocks + b] = plan_block(*dense, panel, b * kBlockDepth);
    }
  });
  uint32_t line = 0;
  for (long i = 0; i < panels * depth_blocks; i++) {
    blocks[i].line = line;
    const long tile_bytes = blocks[i].dense ? kDenseTileBytes : kBlockDepth / kGroupDepth * kGroupBytes;
    line += uint32_t(tiles_of_panel(*dense, i / depth_blocks) * tile_bytes / kLine);
  }
  blocks[panels * depth_blocks] = {line, 0, 0};
  return int64_t(line) * kLine;
}

// Copies a dense weight to where its blocks were planned.
NANOVLLM_API void nanovllm_compact(const Weights* dense, const Weights* compact) {
  Session session;
  const long panels = (dense->num_tiles + kMaxColumnTiles - 1) / kMaxColumnTiles;
  session.parallel(panels, [&](long panel) {
    const Block* block = blocks_of_panel(*compact, panel);
    const long num_tiles = tiles_of_panel(*compact, panel);
    for (long k = 0; k < dense->padded_depth; k += kBlockDepth, block++) {
      uint8_t* out = static_cast<uint8_t*>(const_cast<void*>(compact->data)) + block->line * kLine;
      for (long j = 0; j < num_tiles; j++) {
        const uint16_t* weights = dense_tile(*dense, panel * kMaxColumnTiles + j, k);
        if (block->dense) {
          std::memcpy(out + j * kDenseTileBytes, weights, kDenseTileBytes);
          continue;
        }
        for (long g = 0; g < kBlockDepth / kGroupDepth; g++) {
          compact_group(weights + g * kGroupDepth * kTile, *block, out + (g * num_tiles + j) * kGroupBytes);
        }
      }
    }
  });
}
