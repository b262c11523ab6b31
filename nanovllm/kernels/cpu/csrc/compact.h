// bf16 weights in 12 bits, to the bit: where few rows are multiplied, they wait for the memory.
//
// A trained matrix uses few exponents. Of each weight the low byte (an exponent bit and the mantissa)
// is kept as it is; the high byte (sign and seven exponent bits) becomes a code of four bits, the sign
// and the distance, up to 7, from the least exponent of its *block*. That is a range of 2^16 in
// magnitude; a block that needs more stays as it is. After "DFloat11" (Zhang et al. 2025), but with
// codes of one length, so that vectors read them.
//
// A block is 16 inputs of a panel. Of four rows of a tile, A to D, there are three lines of 64 bytes:
// codes of A and B in low halves, of C and D in high halves; low bytes of A and B; low bytes of C and
// D. Within each 16 bytes, those of A (C) come before those of B (D). These groups follow each other
// by tile, and then by depth.
#pragma once

#include "dot.h"
#include "weights.h"

namespace nanovllm {

constexpr long kBlockDepth = 16;
constexpr long kGroupDepth = 8;  // of four rows of a tile
constexpr long kGroupBytes = 3 * kLine;
constexpr long kDenseTileBytes = kBlockDepth * kTile * 2;
// From what is read to what is fetched: far enough to come in time, near enough to be of this panel.
constexpr long kCompactAhead = 6144;

inline const Block* blocks_of_panel(const Weights& w, long panel) {
  return w.blocks + panel * (w.padded_depth / kBlockDepth);
}

// The high byte that a code stands for.
inline uint8_t high_byte(const Block& block, int code) {
  return uint8_t((block.exponent + (code & 7)) | (code & 8) << 4);
}

inline Bytes high_bytes(const Block& block) {
  Bytes table;
  for (int i = 0; i < kVectorBytes; i++) table[i] = high_byte(block, i % 16);
  return table;
}

// The weights of one output in a block at `bytes`; `column` is within the panel.
inline void column_of_block(const Block& block, const uint8_t* bytes, long num_tiles, long column,
                            Bf16 out[kBlockDepth]) {
  const long tile = column / kTile, lane = column % kTile;
#pragma GCC unroll 16
  for (long k = 0; k < kBlockDepth; k++) {
    if (block.dense) {
      const uint8_t* words = bytes + tile * kDenseTileBytes + lane * 4;
      out[k] = load_raw<Bf16>(words + k / 2 * kLine + k % 2 * 2);
    } else {
      const uint8_t* group = bytes + (k / kGroupDepth * num_tiles + tile) * kGroupBytes;
      const long row = k % kGroupDepth / 2, byte = lane / 4 * 16 + row % 2 * 8 + lane % 4 * 2 + k % 2;
      const int code = group[byte] >> (row / 2 * 4) & 15;
      out[k] = {uint16_t(high_byte(block, code) << 8 | group[(1 + row / 2) * kLine + byte])};
    }
  }
}

// Vector `part` of four rows of a tile, `k` inputs into a block at `bytes` whose table of high bytes
// is given; null is a dense one. What is read a while later is fetched meanwhile.
inline void load_rows(const Bytes* table, const uint8_t* bytes, long num_tiles, long tile, long k,
                      int part, Words rows[4]) {
  const uint8_t* group = bytes + (k / kGroupDepth * num_tiles + tile) * kGroupBytes;
  if (part == 0) {
    for (int line = 0; line < 3; line++) __builtin_prefetch(group + kCompactAhead + line * kLine);
  }
  if (!table) {
    const uint8_t* dense = bytes + tile * kDenseTileBytes + k * kTile * 2;
    for (int i = 0; i < 4; i++) rows[i] = load_raw<Words>(dense + i * kLine + part * kVectorBytes);
    return;
  }
  const Bytes codes = load_raw<Bytes>(group + part * kVectorBytes);
#pragma GCC unroll 2
  for (int pair = 0; pair < 2; pair++) {
    const Bytes low = load_raw<Bytes>(group + (1 + pair) * kLine + part * kVectorBytes);
    const Bytes high = look_up(*table, pair ? codes >> 4 : codes & 15);
    rows[2 * pair] = bit_cast<Words>(interleave(low, high, false));
    rows[2 * pair + 1] = bit_cast<Words>(interleave(low, high, true));
  }
}

// Part of a compact panel, and where its tiles may be kept as those of a dense weight.
struct CompactSlice {
  CompactSlice(const Weights& w, long panel, Bf16* expanded, long tile_size)
      : bytes(static_cast<const uint8_t*>(w.data)), blocks(blocks_of_panel(w, panel)), depth(0),
        num_tiles(tiles_of_panel(w, panel)), expanded(expanded), tile_size(tile_size) {}

  const uint8_t* bytes;
  const Block* blocks;
  long depth;
  int num_tiles;
  Bf16* expanded;
  long tile_size;  // elements from one tile of `expanded` to the next
};

// Expands a slice without a product.
inline void expand(const CompactSlice slice) {
  for (long k = 0; k < slice.depth; k += kBlockDepth) {
    const Block block = slice.blocks[k / kBlockDepth];
    const uint8_t* bytes = slice.bytes + block.line * kLine;
    const Bytes table = high_bytes(block);
    for (long g = 0; g < kBlockDepth; g += kGroupDepth) {
      for (int j = 0; j < slice.num_tiles; j++) {
        Bf16* out = slice.expanded + j * slice.tile_size + (k + g) * kTile;
        for (int part = 0; part < kSplits; part++) {
          Words rows[4];
          load_rows(block.dense ? nullptr : &table, bytes, slice.num_tiles, j, g, part, rows);
          for (int i = 0; i < 4; i++) {
            std::memcpy(out + 2 * i * kTile + part * kWidth * 2, &rows[i], kVectorBytes);
          }
        }
      }
    }
  }
}

// R rows times C tiles of a slice, in the order of `multiply`. With kKeep the tiles are kept.
template <int R, int C, bool kKeep>
inline void compact_dot(const CompactSlice slice, int tile, const Operand<Bf16>* a, long a_stride, float* c,
                        long c_stride, bool accumulate) {
  Sums<Floats, R, C> sums;
  if (accumulate) sums.load(c, c_stride);
  const Block* block = slice.blocks;
  for (long k = 0; k < slice.depth; k += kBlockDepth, block++) {
    const uint8_t* bytes = slice.bytes + block->line * kLine;
    const Bytes table = high_bytes(*block);
    const Bytes* coded = block->dense ? nullptr : &table;
#pragma GCC unroll 2
    for (long g = 0; g < kBlockDepth; g += kGroupDepth) {
#pragma GCC unroll 4
      for (int j = 0; j < C; j++) {
#pragma GCC unroll 4
        for (int part = 0; part < kSplits; part++) {
          Words rows[4];
          load_rows(coded, bytes, slice.num_tiles, tile + j, g, part, rows);
#pragma GCC unroll 4
          for (int i = 0; i < 4; i++) {
            if constexpr (kKeep) {
              Bf16* kept = slice.expanded + (tile + j) * slice.tile_size + (k + g + 2 * i) * kTile;
              std::memcpy(kept + part * kWidth * 2, &rows[i], kVectorBytes);
            }
#pragma GCC unroll 2
            for (int half = 0; half < kParts<Bf16>; half++) {
              const Words w = part_of(Bf16{}, rows[i], half);
#pragma GCC unroll 8
              for (int r = 0; r < R; r++) {
                const Words x = splat_word(word_at(a + r * a_stride + k + g + 2 * i + half));
                Floats& total = sums.at[r][j * kSplits + part];
                total = multiply_add(total, Bf16{}, x, w);
              }
            }
          }
        }
      }
    }
  }
  sums.store(c, c_stride);
}

// Up to kDotRows rows times all tiles of a slice.
template <bool kKeep>
inline void multiply_compact(const CompactSlice& slice, const Operand<Bf16>* a, long a_stride, long rows,
                             float* c, long c_stride, bool accumulate) {
  for_rows(rows, [&](auto num_rows) {
    constexpr int R = num_rows();
    constexpr int C = kDotTiles<R>;
    int j = 0;
    for (; j + C <= slice.num_tiles; j += C) {
      compact_dot<R, C, kKeep>(slice, j, a, a_stride, c + j * kTile, c_stride, accumulate);
    }
    for (; j < slice.num_tiles; j++) {
      compact_dot<R, 1, kKeep>(slice, j, a, a_stride, c + j * kTile, c_stride, accumulate);
    }
  });
}

}  // namespace nanovllm
