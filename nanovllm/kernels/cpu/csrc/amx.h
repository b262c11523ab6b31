// AMX tiles behind plain names. Without the hardware they are emulated, so that the kernels on top
// can be tested anywhere.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

// Old versions of Clang spell the macros without the second underscore.
#if defined(NANOVLLM_EMULATE_AMX) || (defined(__AMX_BF16__) && defined(__AMX_INT8__)) || \
    (defined(__AMXBF16__) && defined(__AMXINT8__))
#define NANOVLLM_AMX 1
#endif

namespace nanovllm {

constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;  // of a row

#if !defined(NANOVLLM_AMX)

inline void configure_tiles() {}

#elif defined(NANOVLLM_EMULATE_AMX)

inline thread_local uint32_t emulated_tile[8][kTileRows][16];

inline void configure_tiles() {}

#define TILE_ZERO(t) std::memset(emulated_tile[t], 0, sizeof(emulated_tile[t]))
#define TILE_LOAD(t, p, stride) tile_load(t, p, stride)
#define TILE_STORE(t, p, stride) tile_store(t, p, stride)
#define TILE_DOT_BF16(c, a, b) tile_dot_bf16(c, a, b)
#define TILE_DOT_INT8(c, a, b) tile_dot_int8(c, a, b)

inline void tile_load(int t, const void* p, long stride) {
  for (int i = 0; i < kTileRows; i++) {
    std::memcpy(emulated_tile[t][i], static_cast<const char*>(p) + i * stride, kTileBytes);
  }
}
inline void tile_store(int t, void* p, long stride) {
  for (int i = 0; i < kTileRows; i++) {
    std::memcpy(static_cast<char*>(p) + i * stride, emulated_tile[t][i], kTileBytes);
  }
}
inline void tile_dot_bf16(int c, int a, int b) {
  for (int m = 0; m < 16; m++) {
    for (int n = 0; n < 16; n++) {
      float total = bit_cast<float>(emulated_tile[c][m][n]);
      for (int k = 0; k < 16; k++) {
        const uint32_t x = emulated_tile[a][m][k], w = emulated_tile[b][k][n];
        total += bit_cast<float>(x << 16) * bit_cast<float>(w << 16);
        total += bit_cast<float>(x & 0xffff0000u) * bit_cast<float>(w & 0xffff0000u);
      }
      emulated_tile[c][m][n] = bit_cast<uint32_t>(total);
    }
  }
}
inline void tile_dot_int8(int c, int a, int b) {
  for (int m = 0; m < 16; m++) {
    for (int n = 0; n < 16; n++) {
      int32_t total = int32_t(emulated_tile[c][m][n]);
      for (int k = 0; k < 16; k++) {
        for (int byte = 0; byte < 32; byte += 8) {
          total += int8_t(emulated_tile[a][m][k] >> byte) * int32_t(uint8_t(emulated_tile[b][k][n] >> byte));
        }
      }
      emulated_tile[c][m][n] = uint32_t(total);
    }
  }
}

#else

// Palette 1, eight tiles of 16 rows of 64 bytes. Called anew in every session, because other
// libraries configure and release the tiles of the caller's thread as well.
inline void configure_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int t = 0; t < 8; t++) config.bytes[t] = kTileBytes, config.rows[t] = kTileRows;
  // Not _tile_loadconfig: gcc 12 drops the stores to a local that only it reads.
  asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
}

#define TILE_ZERO(t) _tile_zero(t)
// Nor _tile_loadd, which does not tell gcc that it reads memory.
#define TILE_LOAD(t, p, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(p), "r"(long(stride)) : "memory")
#define TILE_STORE(t, p, stride) _tile_stored(t, p, stride)
#define TILE_DOT_BF16(c, a, b) _tile_dpbf16ps(c, a, b)
// Activations are signed, weights are not.
#define TILE_DOT_INT8(c, a, b) _tile_dpbsud(c, a, b)

#endif

}  // namespace nanovllm
