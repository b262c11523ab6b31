// Where a panel of int4 keeps what it is made of: all in the order in which it is read.
//
// A panel is its groups of inputs, one after the other. A group is its codes, a line of 64 bytes for
// eight inputs of a tile, by depth and then by tile; then the tiles' scales (fp16), and where there
// are some their zero points (uint8), 16 each.
#pragma once

#include "dot.h"
#include "weights.h"

namespace nanovllm {

class Int4Panel {
 public:
  static constexpr long kStep = 8;  // inputs of a line

  Int4Panel(const Weights& w, long panel)
      : num_tiles_(tiles_of_panel(w, panel)),
        code_bytes_(num_tiles_ * (w.group_size / kStep) * kLine),
        group_bytes_(num_tiles_ * tile_bytes(w)),
        data_(static_cast<const char*>(w.data) +
              panel * kMaxColumnTiles * tile_bytes(w) * (w.padded_depth / w.group_size)) {}

  // Bytes that a group of a tile takes.
  static long tile_bytes(const Weights& w) {
    return w.group_size / kStep * kLine + kTile * (w.has_zeros ? 3 : 2);
  }

  // Codes of the first inputs of a group; others follow every `stride()` bytes.
  const char* codes(long group, long tile) const { return at(group) + tile * kLine; }
  long stride() const { return num_tiles_ * kLine; }

  const uint16_t* scales(long group, long tile) const {
    return reinterpret_cast<const uint16_t*>(at(group) + code_bytes_) + tile * kTile;
  }
  const uint8_t* zeros(long group, long tile) const {
    return reinterpret_cast<const uint8_t*>(scales(group, num_tiles_)) + tile * kTile;
  }

 private:
  const char* at(long group) const { return data_ + group * group_bytes_; }

  long num_tiles_, code_bytes_, group_bytes_;
  const char* data_;
};

}  // namespace nanovllm
